"""A picture of the top of a report on the recorded allocations and behaviour.

    python -m research.screenshot --folder runs/recorded --out docs/report.png

`--folder` receives the allocations as files and report.html, the page that `consa report` makes of them. Needs
consa[browser] and Chromium.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright  # pyright: ignore[reportMissingImports]

from benchmarks.common import environment, parser_of
from consa.behaviour.relate import Behaviour
from consa.report import page
from research.records import RESULTS, learned_allocations, read

DRAWN = "[...document.querySelectorAll('.plot')].every(p => !p.offsetParent || p.querySelector('svg'))"


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    files = []
    for granularity in ("kv_head", "layer"):
        for allocation in learned_allocations(read(f"allocations-{granularity}")):
            files.append(options.folder / f"{allocation.provenance['name'].replace('/', '-')}.json")
            allocation.save(files[-1])
    report, behaviour = options.folder / "report.html", Behaviour.load(RESULTS / "behaviour.safetensors")
    page.write(files, report, command=environment()["command"], behaviour=behaviour)
    with sync_playwright() as playwright:
        chromium = shutil.which("chromium") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        opened = browser.new_page(viewport={"width": 1100, "height": 1610})
        opened.goto(report.resolve().as_uri())
        opened.wait_for_function(DRAWN)
        opened.screenshot(path=options.out)
        browser.close()


if __name__ == "__main__":
    main()
