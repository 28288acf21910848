"""What holds for every test: no network, and no deadline per example, since machines differ."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything imports huggingface_hub

settings.register_profile("consa", deadline=None, print_blob=True)
settings.load_profile("consa")


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 4 layers x 3 KV heads with a byte-level tokenizer, as a folder to load."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from tests.models import tiny

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(["the quick brown fox jumps over the lazy dog"], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    folder = tmp_path_factory.mktemp("model")
    tiny(vocab_size=len(tokenizer), bos_token_id=None, pad_token_id=None).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty short documents."""
    folder = tmp_path_factory.mktemp("text")
    for number in range(40):
        words = [f"{(number * 37 + place * place) % 101:x}" for place in range(150)]
        (folder / f"{number:02}.txt").write_text(f"Document {number}.\n" + " ".join(words))
    return folder
