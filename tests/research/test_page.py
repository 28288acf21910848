"""No number of the pages is typed by hand, and each table says what its records say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks.common import as_lines
from research import analysis, figures, page
from research.records import measured_before, read

NUMBER = re.compile(r"(?<![\w.])-?\d+\.\d+(?![\w.])|(?<![\w.])\d+%")
RECORDS = sorted(page.ROOT.glob("*/results/*.json"))
# Numbers in the prose that are settings or versions, not results.
SETTINGS = {"0.5", "0.733", "0.75", "0.9"}


def claims(text: str) -> set[str]:
    """The numbers outside tables and sources."""
    return set(NUMBER.findall(page.MARKED.sub("", text))) - SETTINGS


@pytest.mark.parametrize("path", page.PAGES, ids=lambda path: path.name)
def test_the_pages_say_what_the_records_say(path: Path):
    """Tables are what the command writes; a number in a section's prose stands in one of the section's tables."""
    text = path.read_text(encoding="utf-8")
    assert page.updated(text) == text, "run `python -m research.page`"
    everywhere = "".join(shown.read_text(encoding="utf-8") for shown in page.PAGES)
    for section in text.split("\n## "):
        if path.name in ("README.md", "SERVING.md") and not page.MARKED.search(section):
            continue  # about more than results
        shown = everywhere if path.name == "README.md" else section
        tables = " ".join(match[0] for match in page.MARKED.finditer(shown))
        known = {number.removeprefix("-") for number in NUMBER.findall(tables.replace("+", ""))}
        assert claims(section) <= known, section.splitlines()[0]


def test_every_table_is_shown():
    shown = [match[2] for path in page.PAGES for match in page.MARKED.finditer(path.read_text(encoding="utf-8"))]
    assert set(shown) == set(page.TABLES)


def test_a_changed_number_is_noticed():
    text = page.PAGES[0].read_text(encoding="utf-8")
    for good, bad in (("| 0.934 |", "| 0.935 |"), ("0.233 [0.186,", "0.234 [0.186,")):
        assert good in text and page.updated(text.replace(good, bad)) == text
    assert claims("It recovers 0.8061 and 49% at 0.733.") == {"0.8061", "49%"}


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_records_have_a_row_a_line(path: Path):
    text = path.read_text(encoding="utf-8")
    record = json.loads(text)
    assert text == as_lines(record)
    assert {"command", "hardware", "date", "versions"} <= record.keys()
    rows = record.get("rows", [])
    assert text.count("\n") > len(rows) + len(record)


def test_lines_hold_rows():
    record = {"a": [1, 2], "rows": [[1, [2]], {}], "named": {"x": {"y": [1]}}, "empty": [], "text": "ö\n"}
    text = as_lines(record)
    assert json.loads(text) == record
    assert text.splitlines()[2:6] == [' "rows": [', "  [1, [2]],", "  {}", " ],"]
    assert '  "x": {"y": [1]}' in text and ' "a": [1, 2],' in text


def test_commands_name_scripts_and_files_that_exist():
    """Also where the recorded ones stood elsewhere."""
    for name in {file for table in page.TABLES.values() for file in table.files}:
        shown = page.source(name).split("`")[1]
        module = re.search(r"-m ([\w.]+)", shown)
        script = module[1].replace(".", "/") + ".py" if module else shown.split()[1]
        assert (page.ROOT / script).is_file(), shown
        out = re.search(r"--out (\S+\.json)", shown)
        assert out and (page.ROOT / out[1]).is_file(), shown


def test_gains_are_paired():
    rows = {"dense": 1.0, "all_swa/128/4": 2.0, "methods/interleaved-kv_head-0.5-seed0": 1.6}
    rows |= {f"methods/consa-kv_head-0.5-seed{seed}": 1.2 + 0.1 * seed for seed in range(2)}
    rows |= {"methods/top-kv_head-0.5-seed0": 1.9, "methods/consa-layer-0.5-seed0": 1.45}
    rows["whole/120 evaluations/0.5"] = 1.15
    document = np.array([0.0, 0.3, 0.9])  # harder or easier for all alike
    record = {"rows": {name: {"losses": (document + loss).tolist()} for name, loss in rows.items()}}
    assert str(analysis.gains(record, "kv_head", None)["0.5"]) == "0.350 [0.350, 0.350]"
    assert str(analysis.gains(record, "kv_head", ("layer", "consa"))["0.5"]) == "0.200 [0.200, 0.200]"
    assert str(analysis.whole_runs(record)["120 evaluations"]["0.5"]) == "0.100 [0.100, 0.100]"
    assert analysis.gains(record, "layer", None) == {}


def test_differences_need_no_losses_of_sequences():
    """The records of models from scratch have the two ends without settings, and may lack each sequence's loss."""
    losses = {"dense": 1.0, "all_swa": 2.0, "top-kv_head-0.5-seed0": 1.5, "bosch-kv_head-0.5-seed0": 1.3}
    losses["consa-kv_head-0.5-seed0"] = 1.2
    record = {"rows": {name: {"loss": loss} for name, loss in losses.items()}}
    assert str(analysis.gains(record, "kv_head", None)["0.5"]) == "0.300"
    each = {name: {"loss": loss, "losses": [loss - 0.1, loss, loss + 0.1]} for name, loss in losses.items()}
    each["bosch-kv_head-0.5-seed0"]["losses"] = [1.2, 1.4, 1.3]
    gain = analysis.gains({"rows": each}, "kv_head", ("kv_head", "bosch"))["0.5"]
    assert str(gain).startswith("0.100 [0.0")


def test_recovered_is_relative_to_a_cells_own_window_and_sinks():
    cell = {"losses": [1.5, 1.5], "allocation": {"window": 8, "num_sink_tokens": 1}}
    record = {
        "rows": {"dense": {"losses": [1, 1]}, "all_swa/8/1": {"losses": [3, 3]}, "all_swa/8/4": {"losses": [9, 9]}}
    }
    assert analysis.recovered(record, cell) == 0.75


def test_figures_are_drawn():
    records = {title: analysis.joined(*map(read, files)) for title, files in figures.MODELS.items()}
    assert {row["method"] for row in records[figures.HEADLINE]["rows"].values() if not row["retrieval"]}, "some unasked"
    assert figures.frontier(records).startswith(b"\x89PNG")
    assert figures.methods(read("methods")).startswith(b"\x89PNG")
    assert figures.places(read("study")).startswith(b"\x89PNG")


def test_records_are_joined_without_rows_that_learned_for_answers():
    first = {"settings": 1, "rows": {"dense": {"loss": 1}, "top": {"loss": 2}}}
    last = {"settings": 2, "rows": {"dense": {"loss": 3}, "consa": {"loss": 4, "retrieval_share": 0.25}}}
    assert analysis.joined(first, last) == {"settings": 2, "rows": {"dense": {"loss": 3}, "top": {"loss": 2}}}


def test_rows_keep_where_and_when_they_were_measured(tmp_path: Path):
    """Number of rows, hardware and day of each run, however often a file is continued."""
    from benchmarks.common import environment, write_json

    path, settings = tmp_path / "out.json", {"start": 1}
    assert measured_before(path, settings) == {"rows": {}}
    record = environment() | {"settings": settings, "rows": {"a": 1, "b": 2}}
    write_json(path, record)
    assert measured_before(path, settings) == {"rows": record["rows"]}, "the same day and machine"
    write_json(path, record | {"hardware": "an abacus", "date": "1999-12-31", "remark": "Slow."})
    before = measured_before(path, settings)
    assert before["rows"] == record["rows"] and before["remark"] == "Slow."
    assert before["earlier"] == [{"rows": 2, "hardware": "an abacus", "date": "1999-12-31"}]
    write_json(path, record | before | {"rows": {"a": 1, "b": 2, "c": 3}, "date": "2000-01-01"})
    earlier = measured_before(path, settings)["earlier"]
    assert [(entry["rows"], entry["date"]) for entry in earlier] == [(2, "1999-12-31"), (1, "2000-01-01")]
    with pytest.raises(SystemExit, match="was measured with"):
        measured_before(path, {"start": 2})
