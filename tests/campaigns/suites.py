"""Run transformers' own generation and modelling tests on hybrids: `python -m tests.campaigns.suites TESTS`.

TESTS is the folder `tests` of transformers' repository, at the tag of the installed version. The tests of each family
run on the dense model, on hybrids (each config that a test builds holds an allocation, as that of a converted model)
and inside `attached`, at sparsity 0 and 0.5. A failure that the dense model does not have is a refusal if consa raised
a ConsaError, which is printed with the number of tests, and otherwise a fault, which is printed by name and makes the
exit code 1. The tests need the packages parameterized and pytest-timeout. The five runs of a
family take 3 minutes on one core.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

from consa import Allocation, attached, rules
from consa.cache.split import by_start
from consa.errors import ConsaError

FAMILIES = ["llama", "qwen2", "qwen3", "gemma2"]
MODES = ["hybrid", "attached"]
SPARSITIES = [0.0, 0.5]
WINDOW, SINKS = 3, 1  # the prompts of the tests have about 7 tokens
# Left out: what needs a GPU, the network or many minutes, and what does not run a model.
LEFT_OUT = (
    "flash pipeline overfit deepspeed tensor_parallel tp_ fsdp export kernels rope_scaling parallelism offload"
    " compile flex can_be_initialized conversion reverse_loading"
)
REASONS = {
    "test_can_set_attention_dynamically: AssertionError": "the test sets eager attention, which is left out here",
    "test_config_attn_implementation_setter: ValueError": "the test sets eager attention, which is left out here",
}
"""Parts of "test: error", of tests that fail because of themselves -> why."""


def allocation_for(config: Any, sparsity: float) -> Allocation:
    """Every second KV head of each layer keeps full attention at sparsity 0.5, all at 0; none where a model slides."""
    kinds = getattr(config, "layer_types", None) or []
    native = {i: config.sliding_window for i, kind in enumerate(kinds) if kind == "sliding_attention"}
    shape = (config.num_hidden_layers, config.num_key_value_heads)
    full = rules.uniform_heads(*shape, sparsity=sparsity, window=WINDOW, num_sink_tokens=SINKS).full_attention.copy()
    full[list(native)] = False
    return Allocation(full_attention=full, window=WINDOW, num_sink_tokens=SINKS, native_windows=native)


class Plugin:
    """Turns the models of the tests into hybrids, and records how each test ended."""

    def __init__(self, mode: str, sparsity: float) -> None:
        self.mode, self.sparsity = mode, sparsity
        self.outcomes: dict[str, list[str]] = {}

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """Patch the classes that the collected tests use."""
        for tests in {item.cls for item in items if hasattr(item.cls, "model_tester_class")}:
            if self.mode != "dense":
                _leave_out_eager()
                _pad_on_the_left(tests.model_tester_class)
                _show_caches()
            if self.mode == "hybrid":
                _hold_allocations(tests.model_tester_class, self.sparsity)
            elif self.mode == "attached":
                _attach_to(tests.model_tester_class, self.sparsity)

    def pytest_runtest_setup(self, item: Any) -> None:
        """Say that a hybrid returns no attention weights, except to a test that only compares logits."""
        item.cls.has_attentions = self.mode == "dense" or item.name == "test_left_padding_compatibility"

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: Any, call: Any) -> Any:
        """Keep the outcome, and what was raised."""
        report = yield
        if report.when == "call" or report.outcome != "passed":
            error = call.excinfo.value if call.excinfo and report.failed else None
            while error is not None and not isinstance(error, ConsaError) and error.__context__ is not None:
                error = error.__context__
            kind = "refused" if isinstance(error, ConsaError) else report.outcome
            text = " ".join(str(error or "").split())[:300]
            self.outcomes[item.name] = [kind, text if kind == "refused" else f"{type(error).__name__}: {text}"]
        return report


def _leave_out_eager() -> None:
    """Some tests choose eager attention to see its weights; a hybrid would refuse and the rest remain untested."""
    from transformers import PreTrainedConfig

    from consa.model.register import get_attention, set_attention

    def choose(config: Any, value: Any) -> None:
        set_attention(config, None if value == "eager" else value)

    PreTrainedConfig._attn_implementation_internal = property(get_attention, choose)  # pyright: ignore[reportAttributeAccessIssue]


def _pad_on_the_left(tester: Any) -> None:
    """A hybrid refuses masks with holes. The tests pad prompts on the right, and some mask each random token 1."""
    stock = tester.prepare_config_and_inputs_for_common

    def prepare(self: Any) -> Any:
        config, inputs = stock(self)
        ids = inputs["input_ids"]
        return config, inputs | {"attention_mask": inputs["attention_mask"].flip(1), "input_ids": ids + (ids == 1)}

    tester.prepare_config_and_inputs_for_common = prepare


def _show_caches() -> None:
    """Some tests check the shape of `keys` and `values` of cache layers, or compare those of two caches.

    A layer of a hybrid's cache has neither, since FA and SWA heads keep other numbers of tokens. The tests see a tensor
    `(batch, kv_heads, columns, head_dim)` with what the layer keeps, and zeros for what it has dropped.
    """
    from consa.cache.layer import HybridLayer

    for index, name in enumerate(("keys", "values")):

        def read(layer: Any, index: int = index) -> Any:
            return _kept(layer, index)

        # The base class sets both to None.
        setattr(HybridLayer, name, property(read, lambda layer, value: None))


def _kept(layer: Any, index: int) -> torch.Tensor | None:
    """Keys (index 0) or values (index 1) that a `HybridLayer` keeps, each in its column, and zeros elsewhere."""
    if not layer.is_initialized:
        return None
    full = (layer.full_keys, layer.full_values)[index]
    sliding = (layer.sliding_keys, layer.sliding_values)[index]
    (batch, _, _, head_dim), split, length = (sliding if full is None else full).shape, layer.split, layer.length
    columns = max(length, layer.get_max_length())  # a static layer shows its capacity
    out = torch.zeros(batch, len(split.full) + len(split.sliding), columns, head_dim, dtype=layer.dtype)
    if full is not None:
        out[:, list(split.full), :length] = full[:, :, :length].cpu()
    for rows, start in by_start(layer.first) if sliding is not None else []:
        tokens = layer.read_sliding(rows, start)[index].cpu()
        column = torch.arange(start, max(start, length))
        if len(column) > split.kept:
            column = torch.cat([column[: split.num_sink_tokens], column[len(column) - split.window :]])
        of_rows = out[rows]
        for i, head in enumerate(split.sliding):
            of_rows[:, head, column] = tokens[:, i]
        out[rows] = of_rows
    return out


def _hold_allocations(tester: Any, sparsity: float) -> None:
    from consa.model.register import config_record

    stock = tester.get_config

    def get_config(self: Any) -> Any:
        config = stock(self)
        config.consa = config_record(allocation_for(config, sparsity))
        return config

    tester.get_config = get_config


def _attach_to(tester: Any, sparsity: float) -> None:
    model_class = tester.causal_lm_class or tester(None).causal_lm_class
    stock = model_class.__init__

    def construct(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        stock(self, copy.deepcopy(config), *args, **kwargs)
        if config._attn_implementation != "consa_inspect":
            attached(self, allocation_for(config, sparsity)).__enter__()

    model_class.__init__ = construct


def run(tests: Path, family: str, mode: str, sparsity: float, select: str, out: Path) -> None:
    """Run one family's tests in this process and write {test: [outcome, text]} to `out`."""
    os.chdir(tests.parent)
    plugin = Plugin(mode, sparsity)
    words = ["ModelTest", *([f"({select})"] if select else []), *(f"not {word}" for word in LEFT_OUT.split())]
    file = f"tests/models/{family}/test_modeling_{family}.py"
    options = [
        "-q",
        "-p",
        "no:cacheprovider",
        "-c",
        os.devnull,
        "--rootdir",
        ".",
        "--timeout",
        "300",
        "-k",
        " and ".join(words),
    ]
    pytest.main([file, *options], plugins=[plugin])
    out.write_text(json.dumps(plugin.outcomes))


def compare(tests: Path, families: list[str], select: str) -> int:
    """Run everything, print what differs from the dense model, and return the number of faults."""
    faults = 0
    for family in families:
        dense = _run_apart(tests, family, "dense", 0.0, select)
        counts = Counter(kind for kind, _ in dense.values())
        print(f"{family} dense: {counts['passed']} passed, {counts['failed']} failed and left out below", flush=True)
        for mode in MODES:
            for sparsity in SPARSITIES:
                outcomes = _run_apart(tests, family, mode, sparsity, select)
                passed = [name for name, (kind, _) in outcomes.items() if kind == "passed"]
                refusals: dict[str, list[str]] = defaultdict(list)
                failures: list[str] = []
                for name, (kind, text) in outcomes.items():
                    if dense.get(name, ["failed"])[0] != "passed" or kind not in ("refused", "failed"):
                        continue
                    reason = next((why for part, why in REASONS.items() if part in f"{name}: {text}"), None)
                    if kind == "refused" or reason:
                        refusals[reason or text].append(name)
                    else:
                        failures.append(f"{name}: {text}")
                refused = sum(map(len, refusals.values()))
                print(f"{family} {mode} {sparsity}: {len(passed)} passed, {refused} refused, {len(failures)} faults")
                for text, names in refusals.items():
                    print(f"    {text}\n        {' '.join(sorted(names))}")
                for failure in failures:
                    print(f"    FAULT {failure}", flush=True)
                faults += len(failures)
    return faults


def _run_apart(tests: Path, *arguments: Any) -> dict[str, list[str]]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "outcomes.json"
        command = [sys.executable, "-m", "tests.campaigns.suites", str(tests), "--one", *map(str, arguments), str(out)]
        root = Path(__file__).parents[2]
        # Both trees have a package `tests`; this file's is left before pytest imports the other.
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}  # the models are tiny
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, env=environment)
        if not out.exists() or out.read_text() == "{}":
            log = done.stdout + done.stderr
            causes = [line for line in log.splitlines() if line.startswith(("E  ", "ERROR"))] or [log[-3000:]]
            raise SystemExit("\n".join([f"{' '.join(command)} ran no tests:", *causes]))
        return json.loads(out.read_text())


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tests", type=Path)
    parser.add_argument("--family", nargs="*", default=FAMILIES)
    parser.add_argument("--select", default="", help="pytest's -k")
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    tests = arguments.tests.resolve()
    if arguments.one:
        family, mode, sparsity, select, out = arguments.one
        for name in [name for name in sys.modules if name == "tests" or name.startswith("tests.")]:
            del sys.modules[name]
        sys.path[:] = [str(tests.parent), *(p for p in sys.path if Path(p or ".").resolve() != Path.cwd())]
        sys.path.append(str(Path(__file__).parents[2]))  # for consa, after the other package `tests`
        run(tests, family, mode, float(sparsity), select, Path(out))
    else:
        sys.exit(compare(tests, arguments.family, arguments.select) > 0)


if __name__ == "__main__":
    main()
