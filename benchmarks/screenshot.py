"""A report of the recorded allocations and behaviour, and a picture of its top; needs consa[browser] and a Chromium.

    python benchmarks/screenshot.py --folder runs/recorded --out docs/report.png

`--folder` receives the allocations as files and report.html, the page that `consa report` makes of them.
"""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from pathlib import Path

from common import learned_allocations, parser_of
from playwright.sync_api import sync_playwright  # pyright: ignore[reportMissingImports]

from consa.behaviour.relate import Behaviour
from consa.report import page

RESULTS = Path(__file__).parent / "results"
DRAWN = (
    "[...document.querySelectorAll('.plot')].every(plot => !plot.offsetParent || plot.querySelector('svg'))"
)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--width", type=int, default=1100)
    parser.add_argument("--height", type=int, default=1610)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()

    files = []
    for granularity in ("kv_head", "layer"):
        record = json.loads((RESULTS / f"allocations-{granularity}.json").read_text())
        for allocation in learned_allocations(record):
            name = allocation.provenance["name"].replace("/", "-")
            files.append(options.folder / f"{name}.json")
            allocation.save(files[-1])
    report = options.folder / "report.html"
    page.write(
        files,
        report,
        command=shlex.join(["python", *sys.argv]),
        behaviour=Behaviour.load(RESULTS / "behaviour.safetensors"),
    )
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium") or shutil.which("google-chrome"), args=["--no-sandbox"]
        )
        opened = browser.new_page(viewport={"width": options.width, "height": options.height})
        opened.goto(report.resolve().as_uri())
        opened.wait_for_function(DRAWN)
        opened.screenshot(path=options.out)
        browser.close()


if __name__ == "__main__":
    main()
