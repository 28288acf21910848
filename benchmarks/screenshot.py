"""A picture of the top of a report, as a Chromium shows it; needs consa[browser].

python benchmarks/screenshot.py report.html --out docs/report.png
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright  # pyright: ignore[reportMissingImports]

DRAWN = (
    "[...document.querySelectorAll('.plot')].every(plot => !plot.offsetParent || plot.querySelector('svg'))"
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("report", type=Path)
    parser.add_argument("--run", type=int, default=0, help="steps of the slider to take first")
    parser.add_argument("--width", type=int, default=1100)
    parser.add_argument("--height", type=int, default=1400)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium") or shutil.which("google-chrome"), args=["--no-sandbox"]
        )
        page = browser.new_page(viewport={"width": options.width, "height": options.height})
        page.goto(options.report.resolve().as_uri())
        for _ in range(options.run):
            page.locator("#slider").press("ArrowRight")
        page.wait_for_function(DRAWN)
        page.screenshot(path=options.out)
        browser.close()


if __name__ == "__main__":
    main()
