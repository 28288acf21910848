"""What runs on Windows and macOS too: nothing but Triton and vLLM needs Linux."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

WITHOUT_UNIX = """
import builtins, importlib, sys
from pathlib import Path

import_any = builtins.__import__

def import_portable(name, globals=None, *rest, **more):  # other libraries find their own way
    if name in ("fcntl", "resource") and (globals or {}).get("__name__", "").startswith("consa"):
        raise ImportError(f"{globals['__name__']} needs {name}")
    return import_any(name, globals, *rest, **more)

builtins.__import__ = import_portable
for path in sorted(Path("consa").rglob("*.py")):
    name = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
    if name.partition(".serving")[0] == name and ".triton" not in name and name != "consa.__main__":
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise SystemExit(f"{name}: {error}") from error

import psutil
memory = type("Memory", (), {"peak_wset": 2**30})
psutil.Process = lambda: type("Process", (), {"memory_info": lambda self: memory})()
from consa.config import LearnConfig, RunConfig
from consa.runs.learning import run_learning

model, data, out = sys.argv[1:]
config = LearnConfig(window=8, seq_len=96, num_steps=1, sequences_per_step=1, refine_evaluations=0)
where = RunConfig(model=model, data=data, num_heldout=1, device="cpu")
assert run_learning(where, config, Path(out), command="consa learn it")["rows"]
"""


def test_everything_but_serving_imports_and_learns_without_unix_modules(
    tiny_model_folder: Path, text_folder: Path, tmp_path: Path
):
    arguments = [str(path) for path in (tiny_model_folder, text_folder, tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_UNIX, *arguments],
        cwd=ROOT,
        env=os.environ | {"CONSA_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert "1.0 GiB" in done.stderr  # of memory, which another library counts there
