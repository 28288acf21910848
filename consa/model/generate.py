"""Generate text with a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from consa.data.prompts import for_prompts
from consa.errors import ConsaError
from consa.model.convert import load
from consa.model.layout import max_positions

SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
"""Settings of generation_config.json that decide how a token is drawn, besides penalties."""
PENALTIES = ("repetition_penalty", "no_repeat_ngram_size")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to choose the next token."""

    temperature: float = 0.0  # 0 always takes the most likely token
    top_p: float = 1.0  # share of the probability to sample from, if temperature > 0
    seed: int = 0
    of_model: bool = False  # follow the model's generation_config.json instead of `temperature` and `top_p`

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ConsaError(f"temperature must be at least 0, got {self.temperature!r}")
        if not 0 < self.top_p <= 1:
            raise ConsaError(f"top_p must be a share in (0, 1], got {self.top_p!r}")
        if not 0 <= self.seed < 2**63:
            raise ConsaError(f"seed must be an integer >= 0 and below 2**63, got {self.seed!r}")

    def options(self, model: PreTrainedModel) -> dict[str, Any]:
        """The settings for a `GenerationConfig`."""
        if self.of_model:
            return {name: getattr(model.generation_config, name, None) for name in (*SAMPLING, *PENALTIES)}
        if self.temperature == 0:
            return {"do_sample": False}
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}


@contextmanager
def own_settings(model: PreTrainedModel, **settings: Any) -> Iterator[None]:
    """Within the block `model.generate` follows these settings alone, and nothing that the model's files say.

    `generate` fills whatever a caller leaves open from the model's own settings, so they are set aside.
    """
    before: Any = model.generation_config
    model.generation_config = GenerationConfig(**settings)
    try:
        yield
    finally:
        model.generation_config = before


def load_with_tokenizer(
    folder: str | Path, *, device: str | None = None, dtype: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a converted model, as `consa.load`, and its tokenizer.

    Raises:
        ConsaError: as `consa.load`, or the tokenizer is missing.
    """
    model = load(folder, device=device, dtype=dtype)
    try:
        return model, AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers may raise anything
        raise ConsaError(
            f"{folder} holds no tokenizer that can be read; convert the model again with its tokenizer"
        ) from error


def generate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    chat: bool = False,
    on_text: Callable[[str], None] | None = None,
    **options: Any,
) -> str:
    """Continue a prompt, up to a token that ends a text by the tokenizer or by the model's generation_config.json.

    Args:
        model: any causal language model.
        tokenizer: the tokenizer of the model.
        prompt: nonempty text.
        chat: put the prompt into the tokenizer's chat template, as a user's message.
        on_text: called with each piece of text as soon as it is final.
        options: keyword arguments of `generate_texts`.

    Returns:
        The new text.

    Raises:
        ConsaError: the tokenizer has no chat template, or as `generate_texts`.
    """
    if chat and not tokenizer.chat_template:
        raise ConsaError("the tokenizer has no chat template; pass the prompt as plain text")
    if chat:
        messages = [{"role": "user", "content": prompt}]
        prompt = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    streamer: Any = None
    if on_text:
        streamer = TextStreamer(cast(Any, tokenizer), skip_prompt=True, skip_special_tokens=True)
        streamer.on_finalized_text = lambda text, stream_end=False: text and on_text(text)  # instead of printing
    own: Any = getattr(model.generation_config, "eos_token_id", None)
    named: list[Any] = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    ends = [end for end in dict.fromkeys(named) if end is not None]
    options |= {"add_special_tokens": not chat, "streamer": streamer, "eos_token_id": ends or None}
    (text,) = generate_texts(model, tokenizer, [prompt], **options)
    return text


def generate_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 256,
    sampling: Sampling | None = None,
    add_special_tokens: bool = True,
    **options: Any,
) -> list[str]:
    """Continue several prompts at once, shorter ones padded on the left; no setting of the model's files applies.

    Args:
        model: any causal language model.
        tokenizer: the tokenizer of the model.
        prompts: nonempty texts.
        max_new_tokens: maximum number of new tokens per prompt.
        sampling: None is greedy.
        add_special_tokens: whether the tokenizer adds its special tokens; a chat template includes them.
        options: keyword arguments of `model.generate`, for example a cache or `prefill_chunk_size`.

    Returns:
        The new texts.

    Raises:
        ConsaError: an empty prompt, or more tokens than the model has positions.
    """
    if max_new_tokens < 1:
        raise ConsaError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if any(prompt.encode(errors="replace").decode() != prompt for prompt in prompts):
        raise ConsaError("a prompt must be text in UTF-8; it contains other bytes")
    encode = for_prompts(tokenizer)
    texts = [encode(prompt, add_special_tokens=add_special_tokens)["input_ids"] for prompt in prompts]
    if not all(texts):
        raise ConsaError("the prompt is empty; pass some text")
    length = max(map(len, texts))
    embeddings: Any = model.get_input_embeddings()
    known: int = embeddings.num_embeddings
    if (largest := max(map(max, texts))) >= known:
        raise ConsaError(
            f"the prompt holds {tokenizer.convert_ids_to_tokens(largest)!r}, token {largest} of the tokenizer, but the"
            f" model has embeddings for {known} tokens; remove it from the prompt"
        )
    longest = max_positions(model.config)
    if longest is not None and length + max_new_tokens > longest:
        raise ConsaError(
            f"the prompt's {length} tokens and {max_new_tokens} new tokens exceed the {longest} positions of the model;"
            " shorten the prompt or lower max_new_tokens"
        )
    sampling = sampling or Sampling()
    torch.manual_seed(sampling.seed)
    candidates: Any = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    padding = next((token for token in candidates if token is not None and token < known), 0)
    missing = torch.tensor([[length - len(text)] for text in texts])
    ids = torch.tensor([[padding] * (length - len(text)) + text for text in texts])
    generate: Any = model.generate  # a Module's attributes have a broad type
    settings = {"max_new_tokens": max_new_tokens, "pad_token_id": padding, "eos_token_id": tokenizer.eos_token_id}
    with own_settings(model, **settings | sampling.options(model)):
        output = generate(
            ids.to(model.device), attention_mask=(torch.arange(length) >= missing).long().to(model.device), **options
        )
    ends = options.get("eos_token_id", tokenizer.eos_token_id)
    ends = set(ends) if isinstance(ends, (list, tuple)) else {ends}
    rows = [_until(row, ends) for row in output[:, length:].tolist()]
    return tokenizer.batch_decode(rows, skip_special_tokens=True)


def _until(tokens: list[int], ends: set[Any]) -> list[int]:
    """The tokens up to the first of `ends`; what follows is padding."""
    return next((tokens[: i + 1] for i, token in enumerate(tokens) if token in ends), tokens)
