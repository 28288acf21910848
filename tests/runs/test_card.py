"""Model cards of converted folders, and uploading them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml

from consa import rules
from consa.model import convert, interface, load
from consa.runs import card
from tests.cli.test_cli import SMALL, consa_cli, refused


@pytest.fixture(scope="module")
def base(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a card of its own."""
    folder = tmp_path_factory.mktemp("base") / "model"
    shutil.copytree(tiny_model_folder, folder)
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: my-licence\ntags: [x]\n---\n# Base\n")
    return folder


@pytest.fixture(scope="module")
def made(base: Path, text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run, with the converted model in its folder `hybrid`."""
    folder = tmp_path_factory.mktemp("made") / "run"
    assert consa_cli("learn", base, *SMALL, "--data", text_folder, "--out", folder).exit_code == 0
    result = consa_cli("convert", base, "--allocation", folder, "--out", folder / "hybrid")
    assert result.exit_code == 0, result.output
    assert f"To try it: consa generate {folder / 'hybrid'} --prompt 'Once upon a time'" in result.stdout.splitlines()
    assert result.stdout.splitlines()[-1] == f"To share it: hf upload OWNER/NAME {folder / 'hybrid'}"
    return folder


def parts(folder: Path) -> tuple[dict[str, Any], str]:
    text = (folder / card.CARD).read_text()
    _, header, body = text.split("---\n", 2)
    return yaml.safe_load(header), body


def test_the_header_names_licence_and_tags_and_no_path_of_this_machine(made: Path, base: Path):
    header, body = parts(made / "hybrid")
    assert header["license"] == "other" and header["license_name"] == "my-licence"
    assert "consa" in header["tags"] and header["library_name"] == "transformers"
    assert "base_model" not in header  # it is on no hub
    assert "# model with full and" in body and str(base.parent) not in body.partition("## Numbers")[0]
    assert "licence is that of" not in body


def test_a_model_of_the_hub_is_the_base_model(made: Path, base: Path, tmp_path: Path):
    model = load.load_model(str(base), device="cpu").model
    convert.convert(model, rules.top(4, 3, sparsity=0.5, window=8), tmp_path / "out")
    card.write(tmp_path / "out", "owner/some-model")
    header, body = parts(tmp_path / "out")
    assert header["base_model"] == ["owner/some-model"] and "license" not in header
    assert "The licence is that of the base model" in body and "None come with this folder" in body


def test_the_numbers_are_those_of_the_run(made: Path):
    _, body = parts(made / "hybrid")
    summary = json.loads((made / "summary.json").read_text())
    rows = dict(re.findall(r"^\| (\w+) \|.*\| (\d\.\d{4}) \|", body, re.MULTILINE))
    assert rows == {row["name"]: f"{row['loss']:.4f}" for row in summary["rows"]}
    assert summary["command"] in body
    assert "KV head 2 " in body and "75.0% of the KV heads" in body


def test_the_way_to_load_works(made: Path, monkeypatch: pytest.MonkeyPatch):
    asked = []

    def download(repo: str) -> str:
        asked.append(repo)
        return str(made / "hybrid")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    (code,) = re.findall(r"```python\n(.*?)```", parts(made / "hybrid")[1], re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    assert asked == ["OWNER/NAME"]
    assert interface.allocation_of(names["model"].config) is not None


def test_a_plain_folder_says_so(base: Path, tmp_path: Path):
    options = [
        "--granularity",
        "layer",
        "--window",
        8,
        "--num-sink-tokens",
        0,
        "--kind",
        "plain",
        "--out",
        tmp_path / "plain",
    ]
    assert consa_cli("convert", base, "--allocation", "top", *options).exit_code == 0
    _, body = parts(tmp_path / "plain")
    assert "import consa" not in body and "AutoModelForCausalLM" in body
    assert "without consa" in body and "- transformers 5.19" in body and "- vLLM 0.32" in body


def test_a_card_may_be_edited(made: Path):
    before = (made / "hybrid" / card.CARD).read_text()
    (made / "hybrid" / card.CARD).write_text(before + "\nMine.\n")
    assert convert.verify(made / "hybrid")[0] == "hybrid"


class Hub:
    """Stands in for the hub's client."""

    calls: list[tuple[Any, ...]]
    error: Exception | None = None

    def create_repo(self, repo: str, *, exist_ok: bool) -> None:
        if Hub.error:
            raise Hub.error
        Hub.calls.append(("create", repo, exist_ok))

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
        Hub.calls.append(("upload", repo_id, sorted(path.name for path in folder_path.iterdir())))


def test_a_folder_goes_to_the_hub(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    Hub.calls = []
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "token")
    given = ["convert", base, "--allocation", "top", "--window", 8]
    result = consa_cli(*given, "--out", tmp_path / "out", "--push-to-hub", "me/hybrid")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == "https://huggingface.co/me/hybrid"
    assert Hub.calls[0] == ("create", "me/hybrid", True)
    assert Hub.calls[1][1] == "me/hybrid" and {"README.md", "consa.json"} <= set(Hub.calls[1][2])
    assert 'snapshot_download("me/hybrid")' in (tmp_path / "out" / card.CARD).read_text()
    monkeypatch.setattr(Hub, "error", OSError("no route to host"))
    result = consa_cli(*given, "--out", tmp_path / "again", "--push-to-hub", "me/hybrid")
    assert result.exit_code == 2 and (tmp_path / "again" / "consa.json").exists()
    assert f"hf upload me/hybrid {tmp_path / 'again'}" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("repo", "token", "named"),
    [("hybrid", "t", "owner/model"), ("a/b/c", "t", "'a/b/c'"), ("me/hybrid", None, "hf auth login")],
)
def test_what_cannot_be_uploaded_is_refused_before_any_work(
    repo: str, token: str | None, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: token)
    line = refused("convert", "m", "--allocation", "top", "--out", tmp_path / "out", "--push-to-hub", repo)
    assert named in line and not (tmp_path / "out").exists()
