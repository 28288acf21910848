"""Low-rank adapters (LoRA, arXiv 2106.09685) on a model's linear layers, by peft: added, saved, merged."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.utils.peft_utils import check_peft_version

from consa.config import AdaptConfig
from consa.errors import ConsaError, missing_extra
from consa.files import write_atomically
from consa.model.load import quiet
from consa.settings import words_of
from consa.training import distributed

ADAPTER = "adapter"  # folder, in the format of peft
EVERY_LINEAR = "all-linear"  # peft's word for all linear layers but the output layer


def check_lora(model: PreTrainedModel, config: AdaptConfig) -> None:
    """Raise ConsaError if the config asks for LoRA and `model` cannot have it."""
    if config.method != "lora":
        return
    if not find_spec("peft"):
        raise missing_extra("method lora", "lora")
    try:
        check_peft_version(MIN_PEFT_VERSION)
    except ValueError as error:
        raise ConsaError(
            f"method lora: {error}; run: pip install 'peft>={MIN_PEFT_VERSION}', or install an older transformers"
        ) from error
    names = [name for name, module in model.base_model.named_modules() if isinstance(module, torch.nn.Linear)]
    known = sorted({name.rpartition(".")[2] for name in names})
    for target in words_of(config.lora_targets):
        if target not in (*known, EVERY_LINEAR):
            raise ConsaError(
                f"lora_targets must be linear layers of {type(model).__name__}"
                f" ({', '.join([EVERY_LINEAR, *known])}), got {target!r}"
            )


@contextmanager
def adapters(model: PreTrainedModel, config: AdaptConfig, run_dir: Path | None) -> Iterator[None]:
    """Within the block only LoRA adapters are trainable; then they are saved and merged, or dropped if it failed."""
    check_lora(model, config)
    from peft import LoraConfig
    from peft.tuners.tuners_utils import BaseTunerLayer

    targets = words_of(config.lora_targets)
    described = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,  # pyright: ignore[reportArgumentType]
        target_modules=EVERY_LINEAR if EVERY_LINEAR in targets else list(targets),
        task_type="CAUSAL_LM",
    )
    added = succeeded = False
    try:
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            model.add_adapter(described)
            added = True
        yield
        if run_dir and distributed.is_main():
            _save(model, run_dir / ADAPTER)
        succeeded = True
    finally:
        layers = [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
        for _, module in layers if succeeded else ():
            module.merge()
        places = [(model.get_submodule(n.rpartition(".")[0]), n.rpartition(".")[2], module) for n, module in layers]
        for outer, child, module in places:
            if not isinstance(outer, BaseTunerLayer):  # those of one module's several parameters are nested
                setattr(outer, child, module.get_base_layer())
        if added:
            model.delete_adapter("default")


def _save(model: PreTrainedModel, folder: Path) -> None:
    try:
        with tempfile.TemporaryDirectory() as temporary, quiet():
            model.save_pretrained(temporary)
            for path in Path(temporary).iterdir():
                write_atomically(folder / path.name, path.read_bytes())
    except (OSError, SafetensorError) as error:  # the latter is what a full disk raises
        raise ConsaError(f"cannot write {folder}: {error}; make room there and in {tempfile.gettempdir()}") from error
