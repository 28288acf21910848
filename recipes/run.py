"""Learn an allocation, or adapt the model to it, by a recipe.

python -m recipes.run qwen3_0_6b learn
torchrun --nproc-per-node 8 -m recipes.run qwen3_0_6b adapt
"""

from __future__ import annotations

import argparse
import shlex
from importlib import import_module
from pathlib import Path

from consa import Allocation, ConsaError
from consa.runs.adaptation import run_adaptation
from consa.runs.learning import run_learning

RECIPES = sorted(path.stem for path in Path(__file__).parent.glob("qwen*.py"))


def main() -> None:
    """Run a phase of a recipe. An interrupted run resumes from its last checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=RECIPES)
    parser.add_argument("phase", choices=["learn", "adapt"])
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    options = parser.parse_args()
    recipe = import_module(f"recipes.{options.recipe}")
    command = f"python -m recipes.run {options.recipe} {options.phase} --runs {shlex.quote(str(options.runs))}"
    learned, adapted = (options.runs / f"{options.recipe}-{phase}" for phase in ("learn", "adapt"))
    try:
        if options.phase == "learn":
            run_learning(recipe.RUN, recipe.LEARN, learned, command=command)
        elif not (learned / "allocation.json").exists():
            raise ConsaError(f"{learned} holds no allocation; run the recipe's learn phase first")
        else:
            allocation = Allocation.load(learned)
            run_adaptation(recipe.RUN, allocation, recipe.ADAPT, adapted, command=command)
    except ConsaError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
