from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from consa import Allocation, ConsaError, rules
from consa.behaviour.record import MEASURES, OPTIONAL, Behaviour
from consa.behaviour.relate import relate
from consa.cli import commands as cli
from consa.report import charts, page
from consa.report.folder import Run
from consa.report.sections import Sections, _distinct, verdict
from tests.report.report_case import HOSTILE, PIECES, cells, make_behaviour, make_line, make_page, make_run

pytest.importorskip("vl_convert", reason="needs consa[report]")

RECOVERED = "Recovered is the share of the gap from all-SWA to dense that is closed."


def test_a_page_shows_every_piece(tmp_path: Path):
    _, seen = make_page([make_run(tmp_path / "run")], tmp_path / "report.html")
    for heading in ("run", "Which units keep", "What the heads do", "Loss on held-out text", "Evaluation"):
        assert heading in seen.text
    for heading in ("Memory and speed", "Learning", "Where it comes from", "consa learn model"):
        assert heading in seen.text
    record = json.loads(seen.scripts[0])
    plots = [int(str(attributes["data-chart"])) for _, attributes in seen.tags if "data-chart" in attributes]
    assert sorted(plots) == list(range(len(record["charts"]))) and len(plots) == 15
    assert {chart["rows"] for chart in record["charts"]} == record["data"].keys()
    assert all(chart["spec"]["description"] for chart in record["charts"])
    assert "run" not in [attributes.get("id") for _, attributes in seen.tags]
    assert all(attributes["data-rows"] in record["data"] for _, attributes in seen.tags if "data-rows" in attributes)
    first = seen.text.index("Loss on held-out text")
    for part in ("Beats the best other allocation (model) by 0.300", "Loss against KV cache", "answers found: single"):
        assert 0 < seen.text.index(part) < first
    units = record["data"]["units 0"]
    assert len(units["unit"]) == 12 and {"score", *MEASURES} <= units.keys()
    assert units["decision"].count("FA") == 6


def test_intervals_are_promised_only_where_there_are_some(tmp_path: Path):
    folder = make_run(tmp_path / "run")
    _, seen = make_page([folder], tmp_path / "report.html")
    assert "(95 % intervals)" in seen.text and "from 2 documents. Intervals are" in seen.text
    for name in ("summary.json", "eval.json"):
        text = (folder / name).read_text()
        (folder / name).write_text(re.sub(r'"(low|high)": [-\d.e]+', r'"\1": null', text))
    summary = json.loads((folder / "summary.json").read_text()) | {"heldout_documents": 1}
    (folder / "summary.json").write_text(json.dumps(summary))
    _, seen = make_page([folder], tmp_path / "report.html")
    assert "(95 % intervals)" not in seen.text and "Intervals are" not in seen.text
    assert "from 1 document." in seen.text
    drawn = [chart["spec"] for chart in json.loads(seen.scripts[0])["charts"]]
    assert not any(
        layer["encoding"].get("y2") == {"field": "high"}
        for spec in drawn
        for layer in spec.get("layer", [])
        if "y2" in layer.get("encoding", {})
    )


def test_texts_of_a_run_are_shown_and_never_executed(tmp_path: Path):
    hostile = HOSTILE.replace("/", "")
    folders = [make_run(tmp_path / hostile, name=HOSTILE), make_run(tmp_path / "run", name=HOSTILE, sparsity=0.75)]
    html, seen = make_page(folders, tmp_path / "report.html")
    assert [tag for tag, _ in seen.tags].count("script") == 3  # data, library, page
    assert not {"img", "iframe", "link", "object"} & {tag for tag, _ in seen.tags}
    assert not [name for _, attributes in seen.tags for name in attributes if name.startswith("on")]
    assert hostile in seen.text and f"consa learn {HOSTILE}" in seen.text
    assert HOSTILE in json.loads(seen.scripts[0])["data"]["positions 0"]["allocation"]
    assert "<script>alert" not in html


def test_nothing_is_fetched_and_only_our_scripts_run(tmp_path: Path):
    _, seen = make_page([make_run(tmp_path / "run")], tmp_path / "report.html")
    assert not [attributes for _, attributes in seen.tags if {"src", "href"} & attributes.keys()]
    policy = next(str(a["content"]) for _, a in seen.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'") and "script-src 'unsafe-eval' 'sha256-" in policy
    digests = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in seen.scripts[1:]]
    assert re.findall(r"'sha256-([^']+)'", policy) == digests


@pytest.mark.parametrize("missing", [*PIECES, "all but allocation", "all but bench", "all but eval"])
def test_missing_pieces_are_left_out(tmp_path: Path, missing: str):
    folder = make_run(tmp_path / "run")
    for piece in PIECES:
        if piece == missing or (missing.startswith("all but") and missing.split()[-1] not in piece):
            (folder / piece).unlink()
    if not (folder / "allocation.json").exists():
        (folder / "behaviour.safetensors").unlink(missing_ok=True)
    _, seen = make_page([folder], tmp_path / "report.html")
    headings = {
        "summary.json": "Loss on held-out text",
        "metrics.jsonl": "Learning",
        "eval.json": "Evaluation",
        "bench.json": "Memory and speed",
        "behaviour.safetensors": "What the heads do",
    }
    for piece, heading in headings.items():
        assert (heading in seen.text) == (folder / piece).exists()


def test_several_runs_are_sorted_by_sparsity_and_compared(tmp_path: Path):
    folders = [make_run(tmp_path / f"run{n}", sparsity=share) for n, share in enumerate((0.75, 0.25, 0.5))]
    html, seen = make_page(folders, tmp_path / "report.html")
    slider = next(attributes for _, attributes in seen.tags if attributes.get("id") == "run")
    assert slider["type"] == "range" and slider["max"] == "2"
    assert [attributes["label"] for tag, attributes in seen.tags if tag == "option"] == [
        "run1 (sparsity 0.25)",
        "run2 (sparsity 0.5)",
        "run0 (sparsity 0.75)",
    ]
    assert "Side by side" in seen.text and "Across models" not in seen.text
    assert cells(html, "rank correlation of the scores.") == [
        *("allocation", "1", "2", "3"),
        *("1. run1", "", "0.67", "0.33"),  # 9, 6 and 3 heads, nested
        *("2. run2", "1.00", "", "0.50"),
        *("3. run0", "1.00", "1.00", ""),
    ]
    shares = json.loads(seen.scripts[0])["data"]["layers 0"]
    assert len(shares["share"]) == 18 and shares["share"][6:12] == [0, 0.5, 1, 1, 0.5, 0]
    losses = json.loads(seen.scripts[0])["data"]["frontiers 0"]
    assert losses["allocation"] == ["best rule", "dense", "learned"] and losses["rise"] == [0.5, 0, 0.2]


def test_runs_that_are_no_series_are_picked_by_model(tmp_path: Path):
    folders = [make_run(tmp_path / name, name=model) for name, model in (("a", "one"), ("b", "two"), ("c", "one"))]
    html, seen = make_page(folders, tmp_path / "report.html")
    assert [tag for tag, attributes in seen.tags if attributes.get("id") == "run"] == ["select"]
    assert re.findall(r"<optgroup label=\"(\w+)\">|<option value=\"(\d)\" label=\"(\w)", html) == [
        *(("one", "", ""), ("", "0", "a"), ("", "1", "c")),
        *(("two", "", ""), ("", "2", "b")),
    ]


def test_a_row_has_one_colour_on_the_whole_page(tmp_path: Path):
    html, seen = make_page([make_run(tmp_path / "run")], tmp_path / "report.html")
    data = json.loads(seen.scripts[0])["data"]
    named = [
        pair
        for columns in data.values()
        if "allocation" in columns
        for pair in zip(columns["allocation"], columns["colour"], strict=True)
    ]
    named += re.findall(r'<th scope=row style="--row: (#\w+)">([^<]+)<', html) and [
        pair[::-1] for pair in re.findall(r'<th scope=row style="--row: (#\w+)">([^<]+)<', html)
    ]
    found = dict(named)
    assert set(named) == set(found.items()), "a row with two colours"
    assert (found["dense"], found["model"], found["all_swa"]) == (charts.DENSE, charts.BEST_RULE, charts.PALE)
    assert found["learned"] == found["model/allocation.json"] == charts.MADE[0]
    assert not {charts.FA, charts.SWA} & set(found.values())


def test_the_page_shows_the_allocation_without_scripts(tmp_path: Path):
    html, _ = make_page([make_run(tmp_path / "run")], tmp_path / "report.html")
    (picture,) = re.findall("<noscript>(.*?)</noscript>", html, re.DOTALL)
    squares = dict(re.findall('<path fill="(.*?)" d="(.*?)"/>', picture))
    allocation = Allocation.load(tmp_path / "run" / "allocation.json")
    for colour, chosen in ((charts.FA, allocation.full_attention), (charts.SWA, ~allocation.full_attention)):
        assert re.findall(r"M(\d+) (\d+)", squares[colour]) == [(str(i), str(j)) for i, j in np.argwhere(chosen)]


@pytest.mark.parametrize(
    ("rise", "words"),
    [
        (0.2, "Beats the best rule (middle) by 0.300 nats per token."),
        (0.7, "Does not beat the best rule (middle), whose loss is 0.200 nats per token lower."),
        (0.49, "Beats the best rule (middle) by 0.010 nats per token; the 95 % intervals of both overlap."),
    ],
)
def test_the_verdict_is_about_the_best_rule(rise: float, words: str):
    lines = [make_line("top", "other", 0.9), make_line("middle", "other", 0.5), make_line("all_swa", "all-SWA", 0.1)]
    best = charts.best_rule(lines)
    assert best == "middle" and charts.best_rule(lines[2:]) is None
    assert verdict(make_line("learned", "learned", rise), lines[1]) == words


def test_a_learning_run_shows_the_verdict_that_it_ended_with(tmp_path: Path):
    """Its interval is paired, which those of the table are not."""
    folder = make_run(tmp_path / "run")
    summary = json.loads((folder / "summary.json").read_text())
    summary["best_rule"] = {"rule": "middle", "gain": {"mean": 0.3, "low": 0.25, "high": 0.35}}
    (folder / "summary.json").write_text(json.dumps(summary))
    _, seen = make_page([folder], tmp_path / "report.html")
    assert "Beats the best rule (middle) by 0.300 [0.250, 0.350] nats" in seen.text


def test_no_sentence_says_nothing(tmp_path: Path):
    rules.top(6, 2, sparsity=0.5, granularity="kv_head").save(tmp_path / "top.json")
    rules.bottom(6, 2, sparsity=0.5, granularity="kv_head").save(tmp_path / "bottom.json")
    top, _ = make_page([tmp_path / "top.json"], tmp_path / "top.html")
    bottom, _ = make_page([tmp_path / "bottom.json"], tmp_path / "bottom.html")
    assert "The lowest 3 layers have no FA" in top and "The lowest" not in bottom
    for html in (top, bottom):  # p-values are in details
        assert "(p = " not in re.sub("<details>.*?</details>", "", html, flags=re.DOTALL)


def test_models_of_other_shapes_are_compared_by_depth(tmp_path: Path):
    folders = [make_run(tmp_path / "a"), make_run(tmp_path / "b", layers=4)]
    html, seen = make_page(folders, tmp_path / "report.html")
    assert "Side by side" not in seen.text
    found = cells(html, "to its top.")
    assert found == ["allocation", "1", "2", "1. a", "", "1.00", "2. b", "", ""]  # both have FA in the middle


def test_a_file_of_an_allocation_is_a_run(tmp_path: Path):
    rules.top(6, 2, sparsity=0.5, granularity="kv_head").save(tmp_path / "top.json")
    _, seen = make_page([make_run(tmp_path / "run"), tmp_path / "top.json"], tmp_path / "report.html")
    assert "2. top" in seen.text and seen.text.count("Memory and speed") == 1


def test_an_adaptation_shows_what_it_gained_and_its_own_curves(tmp_path: Path):
    folder = make_run(tmp_path / "run")
    (folder / "config.json").write_text('{"adapt": {}}')
    summary = json.loads((folder / "summary.json").read_text()) | {"allocation": {"full_attention": ["01"]}}
    del summary["losses"], summary["fractional"]
    _, _, other, made = summary["table"]["lines"]
    summary["table"]["lines"][2:] = [other | {"name": "hybrid"}, made | {"name": "adapted", "kind": "adapted"}]
    (folder / "summary.json").write_text(json.dumps(summary))
    steps = [{"step": n, "loss": 3 - n, "learning_rate": 1e-5 / n} for n in (1, 2, 3)]
    steps[1]["heldout_loss"] = 2.25
    (folder / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    html, seen = make_page([folder], tmp_path / "report.html")
    assert "80.0%" in seen.text and "0.200" in seen.text  # recovered, and lost to dense
    assert ">adapted</th>" in html and "full_attention" not in html
    record = json.loads(seen.scripts[0])
    assert record["data"]["history 0"] == {
        "step": [1, 2, 3],
        "loss": [2, 1, 0],
        "heldout_loss": [None, 2.25, None],
        "learning_rate": [1e-5, 5e-6, 3.333e-6],
    }
    assert "Training" in seen.text and "Learning rate" in seen.text and "Lagrange" not in seen.text
    assert record["data"]["positions 0"]["allocation"][::2] == ["all_swa", "dense", "hybrid", "adapted"]


def test_a_published_allocation_is_a_run(tmp_path: Path):
    _, seen = make_page([Path("smollm2-135m/kv_head-0.733")], tmp_path / "report.html")
    assert "kv_head-0.733" in seen.text and "73.3%" in seen.text


def test_a_given_behaviour_serves_the_runs_it_fits(tmp_path: Path):
    folders = [make_run(tmp_path / "a"), make_run(tmp_path / "b", layers=4)]
    for folder in folders:
        (folder / "behaviour.safetensors").unlink()
    _, seen = make_page(folders, tmp_path / "report.html", behaviour=make_behaviour(6, 2))
    assert seen.text.count("What the heads do") == 1
    with pytest.raises(ConsaError, match="the behaviour is of 5 x 2 KV heads, which no run has"):
        page.write(folders, tmp_path / "r.html", command="", behaviour=make_behaviour(5, 2))


def test_large_runs_stay_small(tmp_path: Path):
    first = make_run(tmp_path / "0", layers=126, heads=8, steps=100_000)
    rng = np.random.default_rng(0)
    folders = [first]
    for number in range(1, 8):
        folders.append(tmp_path / str(number))
        shutil.copytree(first, folders[-1])
        scores = rng.normal(size=(126, 8))
        chosen = Allocation(full_attention=scores > 0, window=8, scores=scores)
        chosen.save(folders[-1] / "allocation.json")
    make_page(folders, tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size < 5e6


def test_granularity_and_native_windows(tmp_path: Path):
    full = np.array([[True, True], [False, False], [False, False]])
    folder = tmp_path / "run"
    folder.mkdir()
    Allocation(full_attention=full, granularity="layer", window=8, native_windows={1: 4}).save(
        folder / "allocation.json"
    )
    _, seen = make_page([folder], tmp_path / "report.html")
    units = json.loads(seen.scripts[0])["data"]["units 0"]
    assert units["decision"] == ["FA", "native window", "SWA"] and units["head"] == ["all"] * 3


def test_the_same_runs_give_the_same_page(tmp_path: Path):
    folder = make_run(tmp_path / "run")
    assert make_page([folder], tmp_path / "a.html")[0] == make_page([folder], tmp_path / "b.html")[0]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("summary.json", "{", r"summary\.json is damaged: not JSON"),
        ("eval.json", "[]", r"eval\.json is damaged: it should hold an object, not list"),
        ("bench.json", "{}", r"run 'run' are not as consa writes them \(KeyError: 'measurements'\)"),
        ("summary.json", '{"table": 3}', "run 'run' are not as consa writes them"),
        ("summary.json", '{"rows": []}', r"summary\.json was written by an older version of consa; make the run again"),
        ("eval.json", '{"lines": [], "start": 1, "cache_tokens": 1}', "run 'run' are not as consa writes them"),
        ("metrics.jsonl", "{}\n", "run 'run' are not as consa writes them"),
        ("allocation.json", "{}", r"allocation\.json: schema"),
    ],
)
def test_damaged_files_are_refused_by_name(tmp_path: Path, file: str, content: str, message: str):
    folder = make_run(tmp_path / "run")
    (folder / file).write_text(content)
    with pytest.raises(ConsaError, match=message):
        page.write([folder], tmp_path / "report.html", command="")
    assert not (tmp_path / "report.html").exists()


def test_what_the_page_shows_and_a_record_lacks_is_named(tmp_path: Path):
    folder = make_run(tmp_path / "run")
    record = json.loads((folder / "bench.json").read_text())
    del record["where"]["hardware"]
    (folder / "bench.json").write_text(json.dumps(record))
    with pytest.raises(ConsaError, match=r"run 'run' are not as consa writes them .*hardware"):
        page.write([folder], tmp_path / "report.html", command="")


def test_a_folder_without_results_is_refused(tmp_path: Path):
    with pytest.raises(ConsaError, match=r"holds none of allocation\.json, .*; name a folder of consa learn"):
        page.write([tmp_path], tmp_path / "report.html", command="")


def test_figures_are_written_as_svg_and_png(tmp_path: Path):
    folder = make_run(tmp_path / "a run: é")
    written = page.write([folder], tmp_path / "r.html", command="", figures=tmp_path / "figures")[1:]
    assert {path.suffix for path in written} == {".svg", ".png"} and len(written) == 30
    assert len({path.name for path in written}) == 30 and all(path.parent.name == "figures" for path in written)
    heatmap = (tmp_path / "figures" / "a-run--é-allocation.svg").read_text(encoding="utf-8")
    assert heatmap.count(f'fill="{charts.FA}"') >= 6 and "Which units keep full attention" in heatmap
    assert (tmp_path / "figures" / "a-run--é-spectrum.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_says_what_it_wrote(tmp_path: Path):
    folder = make_run(tmp_path / "a run")
    command = ["report", folder, "--out", tmp_path / "r.html", "--behaviour", folder / "behaviour.safetensors"]
    done = CliRunner().invoke(cli.app, [str(word) for word in command])
    assert done.exit_code == 0, done.output
    assert done.stdout.split("\n")[0] == str(tmp_path / "r.html")
    assert f"consa report &#39;{folder}&#39; --out" in (tmp_path / "r.html").read_text(encoding="utf-8")


# In a browser.


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs consa[browser]")
    pytest.importorskip("axe_playwright_python", reason="needs consa[browser]")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on this machine")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


CONTRASTS = """() => {  // of text in charts, which axe leaves out
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const luminance = (rgb) => rgb.slice(0, 3).map((c) => c / 255)
    .map((c) => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const seen = [...document.querySelectorAll("svg text")].filter((e) => e.textContent && e.getClientRects().length);
  return seen.map((e) => {
    const ground = getComputedStyle(e.closest("section")).backgroundColor;
    const [a, b] = [luminance(parse(getComputedStyle(e).fill)), luminance(parse(ground))];
    return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), e.textContent];
  });
}"""


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [380, 1200])
def test_in_a_browser(browser: Any, tmp_path: Path, scheme: str, width: int):
    from axe_playwright_python.sync_playwright import Axe

    hostile = HOSTILE.replace("/", "")
    folders = [make_run(tmp_path / hostile, name=HOSTILE), make_run(tmp_path / "run", layers=30, sparsity=0.75)]
    html = tmp_path / "report.html"
    make_page(folders, html)
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    opened = context.new_page()
    said: list[str] = []
    for event in ("console", "pageerror", "dialog"):
        opened.on(event, lambda message: said.append(str(message)))
    opened.on("request", lambda request: said.append(request.url) if request.url != html.as_uri() else None)
    opened.goto(html.as_uri())

    def all_drawn() -> None:
        opened.wait_for_function(
            "() => [...document.querySelectorAll('.plot')].every(p => !p.offsetParent || p.querySelector('svg'))"
        )
        assert opened.evaluate("document.documentElement.scrollWidth") <= width
        contrasts = opened.evaluate(CONTRASTS)
        assert len(contrasts) > 100 and not [found for found in contrasts if found[0] < 4.5]
        found = Axe().run(opened)
        assert not found.violations_count, found.generate_report()
        plots = opened.locator(".plot:visible svg").count()
        assert plots == opened.locator(".plot[role='graphics-document'][aria-label]:visible").count() > 10

    all_drawn()
    assert opened.locator("#run option:checked").inner_text().startswith(hostile)
    cues = opened.locator(".scroll:visible").evaluate_all(
        "all => all.filter((e) => e.scrollWidth > e.clientWidth).map((e) => getComputedStyle(e).backgroundAttachment)"
    )
    assert set(cues) == {"local, local, scroll, scroll"}  # the shadows stay, what covers them at an end goes with it
    names = opened.locator("section[data-run='0'] svg .mark-text.role-mark text").all_text_contents()
    assert {"dense", "all_swa", "learned", "hybrid", "FA", "SWA"} <= set(names)
    opened.locator("section[data-run='0'] svg .mark-rect path").nth(1).hover()
    tooltip = opened.locator("#vg-tooltip-element.visible")
    tooltip.wait_for()
    for text in ("layer 0, KV head 1", "log_alpha", "needle"):
        assert text in tooltip.inner_text()
    points = opened.locator(
        "section[data-run='0']:has-text('held-out sequences of 128 tokens') .mark-symbol.role-mark path"
    )
    told = []
    for point in points.all():  # some lie below others
        point.hover(force=True)
        told.append(opened.locator("#vg-tooltip-element").inner_text())
    assert any(HOSTILE in text for text in told)  # as text: nothing of it is an element of the page
    assert not opened.locator("#vg-tooltip-element :is(script, img)").count()
    opened.mouse.move(0, 0)
    opened.locator("section[data-run='0'] .vega-bindings select").select_option("copy")
    strip = opened.locator(".plot:has(select):visible")
    assert strip.locator("select").bounding_box()["y"] < strip.locator("svg").bounding_box()["y"]
    places = strip.locator("svg .mark-rect.role-mark path").evaluate_all(
        "ticks => ticks.map((tick) => tick.getBoundingClientRect()).map((box) => box.x).sort((a, b) => a - b)"
    )
    measured = np.log(np.sort(make_behaviour(6, 2).measures["copy"].ravel()))
    assert np.interp(measured, measured[[0, -1]], np.array(places)[[0, -1]]) == pytest.approx(places, abs=1)
    opened.get_by_text("Numbers of all units").locator("visible=true").press("Enter")
    numbers = opened.locator("details[data-rows='units 0'] tr")
    numbers.nth(12).wait_for()
    assert numbers.count() == 13 and numbers.nth(2).inner_text().startswith("layer 0, KV head 1")
    opened.locator("#run").press("ArrowDown")
    assert opened.locator("#run option:checked").inner_text() == "run (sparsity 0.75)"
    assert opened.locator("section[data-run='0']:visible").count() == 0
    all_drawn()
    assert (
        opened.locator("section[data-run='1'] svg .mark-rect path").count()
        == 2 * 60 + len(MEASURES)  # heatmap and spectrum, what tells FA from SWA
    )
    assert not said
    context.close()


@pytest.mark.slow
def test_a_series_is_picked_with_a_slider_and_shown_without_scripts(browser: Any, tmp_path: Path):
    html = tmp_path / "report.html"
    make_page([make_run(tmp_path / f"run{n}", sparsity=n / 4) for n in (1, 2, 3)], html)
    opened = browser.new_page()
    opened.goto(html.as_uri())
    opened.locator("#run").press("ArrowRight")
    assert (
        opened.locator("#chosen").inner_text()
        == "run2 (sparsity 0.5)"
        == opened.locator("#run").get_attribute("aria-valuetext")
    )
    assert opened.locator("section[data-run]:visible").first.get_attribute("data-run") == "1"
    plain = browser.new_page(java_script_enabled=False)
    plain.goto(html.as_uri())
    assert (
        plain.locator("noscript svg:visible").count() == 3
        and not plain.locator(".picker:visible, .plot:visible").count()
    )


def test_the_headline_says_the_runs_own_numbers(tmp_path: Path):
    html, _ = make_page([make_run(tmp_path / "run", sparsity=0.75)], tmp_path / "report.html")
    found = re.findall(r"<dd>([^<]*)</dd>", html)
    assert found == ["75.0%", "25.0%", "80.0%", "0.200", "1.50\N{MULTIPLICATION SIGN}"]


def test_tables_and_charts_say_what_the_files_say(tmp_path: Path):
    folder = make_run(tmp_path / "run")
    html, seen = make_page([folder], tmp_path / "report.html")
    data = json.loads(seen.scripts[0])["data"]
    assert data["positions 0"]["rise"] == pytest.approx([0.5, 1, 0, 0, 0.25, 0.5, 0.1, 0.2])
    assert data["positions 0"]["allocation"][::2] == ["all_swa", "dense", "model", "learned"]
    evaluated = data["evaluated positions 0"]
    assert evaluated["low"] == pytest.approx([0.48, 0.98, -0.02, -0.02, 0.08, 0.18])
    assert evaluated["high"] == pytest.approx([0.52, 1.02, 0.02, 0.02, 0.12, 0.22])
    assert data["benchmark 0"]["cache_mb"] == [512, 512, 1024, 1024]
    evaluation = html.partition("<h2>Evaluation</h2>")[2]
    assert cells(evaluation, RECOVERED)[-6:] == [
        *("model/allocation.json", "0.5000", "2.2000", "+0.2000", "+0.1800 to +0.2200", "0.800")
    ]
    measured = re.findall(r"<t[hd](?: [^>]*)?>([^<]*)<", html.partition(">peak MB</th>")[2].partition("</table>")[0])
    assert measured[7:14] == ["hybrid", "512", "1", "1.000", "15.0", "512.00", "1000"]
    told = cells(html, "with the decision and with the score.")
    behaviour = Behaviour.load(folder / "behaviour.safetensors")
    for found in relate(behaviour, Allocation.load(folder / "allocation.json")):
        place = told.index(found.measure.replace("_", " "))
        numbers = (found.auc, found.with_decision, found.with_scores)
        assert told[place + 1 : place + 4] == [f"{number:.3f}" for number in numbers]


def test_a_measure_that_every_swa_unit_has_more_of_tells_the_most():
    full = np.array([[False, False], [True, True], [False, False]])
    measures = {name: np.full((3, 2), 0.5, np.float32) for name in MEASURES if name not in OPTIONAL}
    measures["sink_share"] = np.where(full, 0.1, 0.9).astype(np.float32)  # an AUC of 0
    measures["copy"] = np.array([[0.1, 0.6], [0.5, 0.6], [0.1, 0.5]], dtype=np.float32)
    by_distance = np.full((3, 2, 4), 0.25, np.float32)
    found = Behaviour(measures=measures, by_distance=by_distance, window=8, num_sink_tokens=4)
    run = Run(name="run", allocation=Allocation(full_attention=full, window=8), behaviour=found)
    sections = Sections([run], None)
    assert sections.data["relations 0"]["measure"][-1] == "sink share"
    (spectrum,) = (chart for chart in sections.charts if chart.name == "run-spectrum")
    assert spectrum.spec["params"][0]["value"] == "sink_share"


def test_of_one_document_there_is_no_interval(tmp_path: Path):
    folder = make_run(tmp_path / "run")
    record = json.loads((folder / "eval.json").read_text())
    for line in record["lines"]:
        line["difference"] |= {"low": None, "high": None}
    (folder / "eval.json").write_text(json.dumps(record))
    html, _ = make_page([folder], tmp_path / "report.html")
    evaluation = html.partition("<h2>Evaluation</h2>")[2]
    assert cells(evaluation, RECOVERED)[-2:] == ["\N{EN DASH}", "0.800"]


def test_a_thin_line_leads_from_a_point_to_its_name():
    layers = charts.loss_by_cache("a", "d", 8, intervals=False).spec["layer"]
    (leader,) = (layer for layer in layers if layer["mark"]["type"] == "rule")
    (name,) = (layer for layer in layers if layer["mark"]["type"] == "text")
    assert leader["encoding"]["y"]["field"] == "rise" and leader["encoding"]["x2"] == {"field": "cache"}
    assert leader["encoding"]["y2"]["field"] == name["encoding"]["y"]["field"] == "rise name"
    assert leader["mark"]["x2Offset"] < name["mark"]["dx"]
    assert leader["transform"] == name["transform"]


def test_names_that_come_again_are_told_apart():
    assert _distinct(["a", "a (2)", "a", "a"]) == ["a", "a (2)", "a (3)", "a (4)"]
