"""Python as simple as the command: `consa.learn("Qwen/Qwen3-0.6B", data="books/*.txt", sparsity=0.75)`.

A function named like a command takes that command's options as keywords, with lists where the command takes words
separated by commas, and returns what the command shows. With a loaded model and token sequences in place of names,
`learn` and `adapt` are those of `consa.training`.
"""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Collection, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, overload

import numpy as np
from transformers import PreTrainedModel

from consa.allocation import Allocation
from consa.config import AdaptConfig, EvalConfig, LearnConfig, RunConfig, SweepConfig, folder_of
from consa.errors import ConsaError
from consa.evaluation.table import Table
from consa.report.folder import Run
from consa.runs import sweep as sweeps
from consa.runs.adaptation import run_adaptation
from consa.runs.evaluation import run_evaluation
from consa.runs.learning import run_learning
from consa.settings import command_line
from consa.training import adaptation, learning, loop

NOT_SWEPT = ("sparsity", "granularity")  # of `EvalConfig`: a sweep has its own


@overload
def learn(
    model: str | Path, /, *, out: str | Path | None = None, boards: Collection[str] = (), **settings: Any
) -> Run: ...
@overload
def learn(
    model: PreTrainedModel, sequences: np.ndarray, config: LearnConfig, /, **details: Any
) -> learning.LearnResult: ...
def learn(model: Any, /, *given: Any, **settings: Any) -> Any:
    """Learn an allocation of a model by name, like `consa learn`, or of a loaded model, like `training.learning.learn`.

    Args:
        model: a folder, a .gguf file or a Hugging Face name; or a loaded model.
        given: of a loaded model, the sequences and a `LearnConfig`.
        settings: by name, the options of `consa learn`, which are the fields of `RunConfig` and `LearnConfig`, besides
            `out`, the folder for the results, and `boards`, some of "tensorboard" and "wandb". A run that was
            interrupted resumes when it is called again with the same arguments.

    Returns:
        By name, what the folder holds: `.allocation`, `.measured` (the table), `.history`, `.summary`, `.verdict`.

    Raises:
        ConsaError: an error that the caller can fix; it is found before long work where that is possible.
    """
    if not isinstance(model, (str, Path)):
        return learning.learn(model, *given, **settings)
    own = _take(settings, "out", "boards")
    where, config = _configs(model, settings, LearnConfig)
    folder = Path(own.pop("out", None) or folder_of(where, config))
    done = run_learning(where, config, folder, command=command_line("learn", where, config), **own)
    return _read(folder, done)


@overload
def adapt(
    model: str | Path,
    /,
    *,
    allocation: str | Path | Allocation,
    out: str | Path | None = None,
    boards: Collection[str] = (),
    **settings: Any,
) -> Run: ...
@overload
def adapt(
    model: PreTrainedModel, sequences: np.ndarray, allocation: Allocation, config: AdaptConfig, /, **details: Any
) -> list[loop.Record]: ...
def adapt(model: Any, /, *given: Any, **settings: Any) -> Any:
    """Train a hybrid of a model by name, like `consa adapt`, or of a loaded one, like `training.adaptation.adapt`.

    Args:
        model: as for `learn`.
        given: of a loaded model, the sequences, the allocation and an `AdaptConfig`.
        settings: by name, the options of `consa adapt`; `allocation` may be an `Allocation` too.

    Returns:
        By name, what the folder holds, as for `learn`; its folder `model` holds the trained hybrid.

    Raises:
        ConsaError: an error that the caller can fix; it is found before long work where that is possible.
    """
    if not isinstance(model, (str, Path)):
        return adaptation.adapt(model, *given, **settings)
    own = _take(settings, "out", "boards", "allocation")
    if "allocation" not in own:
        raise ConsaError("adapt needs allocation: a run's folder, a file, a published name, or an Allocation")
    chosen = own.pop("allocation")
    where, config = _configs(model, settings, AdaptConfig)
    folder = Path(own.pop("out", None) or folder_of(where, config))
    kept = chosen if isinstance(chosen, Allocation) else Allocation.load(chosen)
    origin = folder / "allocation.json" if isinstance(chosen, Allocation) else chosen
    command = f"{command_line('adapt', where, config)} --allocation {shlex.quote(str(origin))}"
    return _read(folder, run_adaptation(where, kept, config, folder, command=command, **own))


def evaluate(
    model: str | Path, allocations: Sequence[str | Path], *, out: str | Path | None = None, **settings: Any
) -> Table:
    """Measure allocations of a model beside dense and all-SWA, like `consa eval`.

    Args:
        model: as for `learn`.
        allocations: run folders, files, and names of rules or of published allocations.
        out: folder for the results.
        settings: the options of `consa eval`, which are the fields of `RunConfig` and `EvalConfig`.

    Returns:
        The table, with a typed line for each allocation, dense first.

    Raises:
        ConsaError: an error that the caller can fix; it is found before long work where that is possible.
    """
    where, config = _configs(model, settings, EvalConfig)
    names = [str(name) for name in ([allocations] if isinstance(allocations, (str, Path)) else allocations)]
    command = " ".join([command_line("eval", where, config), *(f"--allocation {shlex.quote(name)}" for name in names)])
    folder = Path(out or folder_of(where, config))
    follow = not settings.keys() & {"window", "num_sink_tokens"}
    return run_evaluation(where, config, names, folder, command=command, follow_files=follow)[0]


def sweep(model: str | Path, *, out: str | Path | None = None, **settings: Any) -> sweeps.Frontier:
    """Choose allocations by several methods at several sparsities and measure them, like `consa sweep`.

    Args:
        model: as for `learn`.
        out: folder for the results.
        settings: the options of `consa sweep`: the fields of `RunConfig`, `SweepConfig` and `EvalConfig`.

    Returns:
        The frontier: a typed point for each method and sparsity, and the table of all measurements.

    Raises:
        ConsaError: an error that the caller can fix; it is found before long work where that is possible.
    """
    measuring = _take(settings, *(item.name for item in fields(EvalConfig) if item.name not in NOT_SWEPT))
    where, config = _configs(model, settings, SweepConfig)
    measured = EvalConfig(**{name: _joined(value) for name, value in measuring.items()})
    folder = Path(out or folder_of(where, config))
    return sweeps.sweep(where, config, measured, folder, command=command_line("sweep", where, config, measured))[0]


def _take(settings: dict[str, Any], *names: str) -> dict[str, Any]:
    """Remove some settings, and return them."""
    return {name: settings.pop(name) for name in names if name in settings}


def _configs(model: str | Path, settings: dict[str, Any], config: type) -> tuple[RunConfig, Any]:
    """Sort settings into those of the run and those of `config`; ConsaError for a name that neither has."""
    known = {item.name: kind for kind in (RunConfig, config) for item in fields(kind)}
    for name in settings:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise ConsaError(f"{name} is no setting" + (f"; did you mean {near[0]}?" if near else ""))
    given = {name: _joined(value) for name, value in settings.items()}
    of = {kind: {name: value for name, value in given.items() if known[name] is kind} for kind in (RunConfig, config)}
    return RunConfig(model=str(model), **of[RunConfig]), config(**of[config])


def _joined(value: Any) -> Any:
    """A list as the command line takes it; paths as text."""
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value))
    return str(value) if isinstance(value, Path) else value


def _read(folder: Path, summary: Any) -> Run:
    """The run in `folder`; an empty one in the processes of a distributed run that write nothing."""
    return Run.read(folder) if summary else Run(name=folder.name, folder=folder)
