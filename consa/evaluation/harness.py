"""Tasks of EleutherAI's lm-evaluation-harness, run on a hybrid through the harness's Python interface."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from importlib.metadata import version
from typing import Any

from consa.allocation import Allocation
from consa.config import EvalConfig
from consa.data.prompts import for_prompts
from consa.errors import ConsaError, first_line, missing_extra
from consa.evaluation.cells import Advance, Measure
from consa.model.attach import attached
from consa.model.generate import own_settings
from consa.model.load import LoadedModel
from consa.progress import note

SEEDS = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")  # of `simple_evaluate`


def find(config: EvalConfig, loaded: LoadedModel) -> Any:
    """lm-eval's task manager if any of its tasks is asked for, else None; raises as `find_tasks`."""
    if not config.harness_tasks:
        return None
    note("Looking up lm-eval's tasks")
    made = {"tokenizer": loaded.tokenizer.name_or_path, "max_seq_lengths": list(config.retrieval_lengths)}
    return find_tasks(config.harness_tasks, metadata=made)


def measures(loaded: LoadedModel, config: EvalConfig, manager: Any) -> Iterator[Measure]:
    """Yield a measure for each of lm-eval's tasks; `manager` is what `find` returned."""
    settings = {"limit": config.limit, "seed": config.seed, "lengths": config.retrieval_lengths}

    def compute(task: str, allocation: Allocation | None, advance: Advance) -> dict[str, float]:
        limits = {"limit": config.limit, "seed": config.seed, "batch_size": config.batch_size}
        metrics = run_task(loaded, allocation, task, manager=manager, **limits)
        advance(1)
        return metrics

    for task in config.harness_tasks:
        own = settings | {"lm-eval": version("lm-eval")}
        yield Measure(name=measure_name(task), settings=own, size=1, compute=partial(compute, task))


def measure_name(task: str) -> str:
    """Name of the measure of one of lm-eval's tasks."""
    return f"lm-eval {task}"


def find_tasks(names: Sequence[str], **options: Any) -> Any:
    """Return the harness's task manager after checking that it knows all of `names`; takes up to a minute.

    Args:
        names: of tasks or groups of tasks.
        options: for `lm_eval.tasks.TaskManager`, for example `include_path`, a folder with more tasks, and `metadata`,
            where RULER's tasks look for "tokenizer" (a name or folder) and "max_seq_lengths" (in tokens).

    Raises:
        ConsaError: lm-eval is not installed, or there is no such task.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise missing_extra("measuring tasks", "lm-eval", error) from error
    manager = TaskManager(**options)
    for name in names:
        if name not in manager.all_tasks:
            close = difflib.get_close_matches(name, manager.all_tasks, n=8) or manager.all_tasks[:8]
            raise ConsaError(
                f"lm-eval has no task {name!r} among its {len(manager.all_tasks)}; similar names are"
                f" {', '.join(close)} (run lm-eval ls tasks for all of them)"
            )
    return manager


def run_task(
    loaded: LoadedModel,
    allocation: Allocation | None,
    task: str,
    *,
    manager: Any,
    limit: int | None = None,
    batch_size: int = 1,
    seed: int = 0,
) -> dict[str, float]:
    """Run one task or group of tasks.

    Args:
        loaded: model and tokenizer.
        allocation: attached while the task runs; None leaves the model as it is.
        task: its name.
        manager: what `find_tasks` returned.
        limit: documents of each task; None takes all.
        batch_size: texts computed at once.
        seed: of the harness's random choices, for example of few-shot examples.

    Returns:
        Metric -> value; the key is "task metric", or "task metric,filter" for a filter other than "none". Keys of
        standard errors end in "_stderr".

    Raises:
        ConsaError: the task cannot be run, for example because its data is missing.
    """
    lm_eval, huggingface = import_module("lm_eval"), import_module("lm_eval.models.huggingface")
    tokenizer = for_prompts(loaded.tokenizer)
    with _as_converted(loaded, allocation), own_settings(loaded.model, eos_token_id=tokenizer.eos_token_id):
        model = huggingface.HFLM(pretrained=loaded.model, tokenizer=tokenizer, batch_size=batch_size)
        try:
            results = lm_eval.simple_evaluate(
                model=model,
                tasks=[task],
                task_manager=manager,
                limit=limit,
                **dict.fromkeys(SEEDS, seed),
                bootstrap_iters=0,  # standard errors by formula where there is one
                log_samples=False,
            )
        # No network, no data set, or a package that only this task needs.
        except (OSError, ImportError) as error:
            raise ConsaError(f"lm-eval task {task!r} cannot be run: {first_line(error)}") from error
    return {
        f"{name} {metric.removesuffix(',none')}": value
        for name, metrics in results["results"].items()
        for metric, value in metrics.items()
        if "," in metric and isinstance(value, (int, float)) and not _is_unused_length(metric, value)
    }


def _is_unused_length(metric: str, value: float) -> bool:
    """RULER's tasks have a metric for each length; it is -1 for lengths that were not asked for."""
    return metric.partition(",")[0].isdigit() and value < 0


@contextmanager
def _as_converted(loaded: LoadedModel, allocation: Allocation | None) -> Iterator[None]:
    """Make the model as `consa.load` returns it: `generate`, which the harness calls, makes the hybrid cache."""
    if allocation is None:
        yield
        return
    config: Any = loaded.model.config
    with attached(loaded.model, allocation):
        config.consa = json.loads(allocation.to_json())
        try:
            yield
        finally:
            del config.consa
