"""Learn an allocation, or adapt the model to it, by a recipe.

python -m recipes.run qwen3_0_6b learn
torchrun --nproc-per-node 8 -m recipes.run qwen3_0_6b adapt
"""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path

from consa import Allocation
from consa.runs import run_adaptation, run_learning

RECIPES = sorted(path.stem for path in Path(__file__).parent.glob("qwen*.py"))


def main() -> None:
    """Run a phase of a recipe; killed and started again, it goes on where it was."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", choices=RECIPES)
    parser.add_argument("phase", choices=["learn", "adapt"])
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    options = parser.parse_args()
    recipe = import_module(f"recipes.{options.recipe}")
    command = f"python -m recipes.run {options.recipe} {options.phase}"
    learned, adapted = (options.runs / f"{options.recipe}-{phase}" for phase in ("learn", "adapt"))
    if options.phase == "learn":
        run_learning(recipe.RUN, recipe.LEARN, learned, command=command)
    else:
        allocation = Allocation.load(learned / "allocation.json")
        run_adaptation(recipe.RUN, allocation, recipe.ADAPT, adapted, command=command)


if __name__ == "__main__":
    main()
