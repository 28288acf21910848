"""Tasks of EleutherAI's lm-evaluation-harness, run on a hybrid through the harness's own API."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from consa.allocation import Allocation
from consa.errors import ConsaError, first_line, missing_extra
from consa.model.attach import attached
from consa.model.load import LoadedModel


def find_tasks(names: Sequence[str], **options: Any) -> Any:
    """The harness's task manager, once it is sure that it knows all of `names`. Takes up to a minute.

    Args:
        names: of tasks or groups of them.
        options: for `lm_eval.tasks.TaskManager`, such as `include_path`, a folder with more tasks, and `metadata`,
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
                f"lm-eval has no task {name!r} among its {len(manager.all_tasks)}; take one such as"
                f" {', '.join(close)} (all of them: lm-eval ls tasks)"
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
        allocation: attached for the purpose; None leaves the model as it is.
        task: its name.
        manager: what `find_tasks` returned.
        limit: documents of each task; all unless given.
        batch_size: texts computed at once.
        seed: of the harness's own choices, such as few-shot examples.

    Returns:
        Metric -> value, as "task metric" or, where a filter other than "none" comes before, "task metric,filter".
        Standard errors end in "_stderr".

    Raises:
        ConsaError: the task cannot be run, for instance without its data.
    """
    lm_eval, huggingface = import_module("lm_eval"), import_module("lm_eval.models.huggingface")
    with _as_converted(loaded, allocation):
        model = huggingface.HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=batch_size)
        try:
            results = lm_eval.simple_evaluate(
                model=model,
                tasks=[task],
                task_manager=manager,
                limit=limit,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
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
    """RULER's tasks have a metric per length, and -1 at those that were not asked for."""
    return metric.partition(",")[0].isdigit() and value < 0


@contextmanager
def _as_converted(loaded: LoadedModel, allocation: Allocation | None) -> Iterator[None]:
    """Within the block the model is as `consa.load` gives it: `generate`, which the harness calls, makes its cache."""
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
