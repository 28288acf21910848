"""Twenty steps of `Trainer` and `SFTTrainer` on a hybrid: the losses of a dense mask, checkpoints, resuming, LoRA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from consa import convert, load
from tests.models import allocate, exact, save_tiny, tiny, tokens

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing` is deprecated:FutureWarning")
pytest.importorskip("accelerate", reason="Trainer needs accelerate")
STEPS = 20
ROWS: list[dict[str, Any]] = [{"input_ids": ids, "labels": ids} for ids in tokens(STEPS, 40)]
SETTINGS: dict[str, Any] = {
    "max_steps": STEPS,
    "save_steps": 10,
    "logging_steps": 1,
    "per_device_train_batch_size": 1,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 1e9,
    "use_cpu": True,
    "report_to": [],
    "disable_tqdm": True,
    "seed": 1,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "hybrid"
    model = tiny()
    convert(model, allocate(model), folder)
    return folder


def with_lora(model: Any) -> Any:
    """The model with LoRA weights that already change it."""
    peft = pytest.importorskip("peft", reason="needs consa[lora]")
    options = peft.LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    torch.manual_seed(2)
    return peft.get_peft_model(model, options)


def train(model: Any, out: Path, **options: Any) -> list[float]:
    """Train with `Trainer` and return the loss of every step, those before a resumed checkpoint included."""
    trainer = Trainer(model=model, args=TrainingArguments(str(out), **SETTINGS), train_dataset=ROWS)
    trainer.train(**options)
    return losses_of(trainer)


def losses_of(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(tokens(2, 40, seed=9)).logits


@pytest.mark.parametrize("lora", [False, True])
def test_twenty_steps_of_trainer_have_the_losses_of_a_dense_mask(folder: Path, tmp_path: Path, lora: bool):
    adapt = with_lora if lora else lambda model: model
    dense = tiny()
    with exact(dense, allocate(dense)):
        dense.config.use_cache = False
        wanted = train(adapt(dense), tmp_path / "dense")
    model: Any = adapt(AutoModelForCausalLM.from_pretrained(folder))
    losses = train(model, tmp_path / "hybrid")
    assert len(losses) == STEPS
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(wanted), atol=2e-4, rtol=0)
    full = train(adapt(tiny()), tmp_path / "full")
    assert max(abs(a - b) for a, b in zip(full, wanted, strict=True)) > 1e-2, "there is something to get wrong"

    checkpoint = tmp_path / "hybrid" / f"checkpoint-{STEPS}"
    if lora:
        import peft

        saved = peft.PeftModel.from_pretrained(load(folder), checkpoint)
    else:
        saved = AutoModelForCausalLM.from_pretrained(checkpoint)
        assert torch.equal(logits(load(checkpoint)), logits(saved))
    assert torch.equal(logits(saved), logits(model))

    again = adapt(AutoModelForCausalLM.from_pretrained(folder))
    resumed = train(again, tmp_path / "hybrid", resume_from_checkpoint=str(tmp_path / "hybrid" / "checkpoint-10"))
    assert resumed == losses
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("lora", [False, True])
def test_twenty_steps_of_sft_trainer_from_a_folder(tmp_path: Path, lora: bool):
    trl = pytest.importorskip("trl", reason="needs trl")
    from datasets import Dataset

    peft = pytest.importorskip("peft", reason="needs consa[lora]")
    dense = AutoModelForCausalLM.from_pretrained(save_tiny(tmp_path / "tiny"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tiny")
    tokenizer.pad_token = tokenizer.eos_token = tokenizer.convert_ids_to_tokens(5)
    allocation = allocate(dense)
    convert(dense, allocation, tmp_path / "hybrid", tokenizer=tokenizer)
    rows = Dataset.from_list([{"text": " ".join(f"{i * k % 97:x}" for k in range(30))} for i in range(1, STEPS + 1)])

    def sft(model: Any, name: str, **options: Any) -> Any:
        trainer = trl.SFTTrainer(
            model=model,
            args=trl.SFTConfig(str(tmp_path / name), max_length=64, bf16=False, **SETTINGS),
            train_dataset=rows,
            processing_class=tokenizer,
            peft_config=peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM") if lora else None,
        )
        trainer.train(**options)
        return trainer

    done = sft(str(tmp_path / "hybrid"), "out")
    with exact(dense, allocation):
        dense.config.use_cache = False
        wanted = losses_of(sft(dense, "dense"))
    assert len(wanted) == STEPS
    torch.testing.assert_close(torch.tensor(losses_of(done)), torch.tensor(wanted), atol=2e-4, rtol=0)
    checkpoint = tmp_path / "out" / f"checkpoint-{STEPS}"
    if lora:
        saved = peft.PeftModel.from_pretrained(load(tmp_path / "hybrid"), checkpoint)
    else:
        saved = load(checkpoint)
        assert json.loads((checkpoint / "config.json").read_text())["model_type"] == "consa"
    assert torch.equal(logits(saved), logits(done.model))
    resumed = sft(str(tmp_path / "hybrid"), "out", resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-10"))
    torch.testing.assert_close(torch.tensor(losses_of(resumed)), torch.tensor(losses_of(done)), atol=0, rtol=0)
