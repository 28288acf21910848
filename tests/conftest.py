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
    from tests.models import save_tiny

    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty short documents."""
    from tests.models import write_texts

    return write_texts(tmp_path_factory.mktemp("text"))
