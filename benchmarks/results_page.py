"""Write docs/RESULTS.md and README.md's table from benchmarks/results; no number there is typed by hand.

python benchmarks/results_page.py
"""

from __future__ import annotations

import json
from pathlib import Path

from common import parser_of
from sections.adaptation import adaptation, distributed, from_scratch
from sections.allocations import allocations, constraints, control, demo, recovered
from sections.answers import answers
from sections.behaviour import behaviour, behaviour_cost
from sections.cost import cost
from sections.methods import frontier, headline, methods, needles, rerun
from sections.speed import attention, decode, inference, learning, serving
from sections.study import places_figure, study
from sections.text import source

from consa.files import write_atomically

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "RESULTS.md"
README = HERE.parent / "README.md"
BEGIN, END = "<!-- results: written by benchmarks/results_page.py -->\n", "<!-- end of results -->\n"


def main() -> None:
    parser_of(__doc__).parse_args()
    sections = [
        "# Results",
        "",
        "Written by `python benchmarks/results_page.py` from `benchmarks/results/`.",
        "",
        "`train.npy` and `heldout.npy` in the commands are what benchmarks/tokens.py makes of long documents: code,"
        " documentation, prose and works of reference with free licences, one sequence of each. `prepared/` is what"
        " recipes/from_scratch.py makes of the same text. The text is not distributed; bring your own.",
        "",
    ]
    paths = {name: HERE / "results" / f"{name}.json" for name in SECTIONS}
    records = {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}
    sections += answers(records)
    for name, record in records.items():
        sections += SECTIONS[name](record)
        if name in FIGURES:
            write_atomically(PAGE.parent / f"{name}.png", FIGURES[name](record))
    sections += cost({name: records[name] for name in CHOSEN_OR_TRAINED if name in records})
    write_atomically(PAGE, ("\n".join(sections).rstrip() + "\n").encode())
    before, rest = README.read_text().split(BEGIN)
    after = rest.split(END)[1]
    table = headline(records["methods"], records["adaptation-sparsity"])
    table += [
        "And what `make demo` ends with:",
        "",
        *recovered(records["demo"]),
        "",
        *source(records["demo"]),
    ]
    write_atomically(README, (before + BEGIN + "\n".join(table) + END + after).encode())


SECTIONS = {
    "demo": demo,
    "allocations-kv_head": allocations,
    "allocations-layer": allocations,
    "adaptation": adaptation,
    "adaptation-long": adaptation,
    "adaptation-sparsity": adaptation,
    "distributed": distributed,
    "constraints": constraints,
    "constraints-long": constraints,
    "control": control,
    "methods": methods,
    "rerun": rerun,
    "needles": needles,
    "training-30m": from_scratch,
    "training-60m": from_scratch,
    "methods-30m": methods,
    "methods-60m": methods,
    "constraints-30m": constraints,
    "constraints-60m": constraints,
    "study": study,
    "behaviour": behaviour,
    "behaviour_cost": behaviour_cost,
    "inference": inference,
    "serving": serving,
    "attention": attention,
    "learning": learning,
    "decode": decode,
    "decode-short": decode,
}

CHOSEN_OR_TRAINED = [
    *("allocations-kv_head", "allocations-layer", "methods", "methods-30m", "methods-60m", "study"),
    *("training-30m", "training-60m", "adaptation", "adaptation-long", "adaptation-sparsity"),
    *("constraints-long", "constraints-30m", "constraints-60m", "rerun"),
]
FIGURES = {"methods": frontier, "study": places_figure}


if __name__ == "__main__":
    main()
