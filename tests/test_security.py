"""Nothing that consa reads can run code: the source keeps the promises of SECURITY.md."""

from __future__ import annotations

import ast
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from consa import ConsaError, convert
from consa.model.convert import MANIFEST, verify
from consa.model.load import load_model, read_layout
from tests.models import allocate, tiny

ROOT = Path(__file__).parent.parent
SOURCES = [path for folder in ("consa", "recipes") for path in sorted((ROOT / folder).rglob("*.py"))]

UNPICKLERS = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
FORBIDDEN = {  # calls, and what to use instead
    "eval": "ast.literal_eval or json",
    "exec": "a function",
    "compile": "a function",
    "__import__": "importlib.import_module of a fixed name",
    "os.system": "subprocess.run of a list",
    "os.popen": "subprocess.run of a list",
    "subprocess.getoutput": "subprocess.run of a list",
    "subprocess.getstatusoutput": "subprocess.run of a list",
    "yaml.load": "yaml.safe_load",
    "shutil.unpack_archive": "nothing: archives are not read",
    "tempfile.mktemp": "tempfile.mkdtemp",
}
REQUIRED = {  # calls, and the argument that they must be given
    "torch.load": ("weights_only", "True"),
    "np.load": ("allow_pickle", "False"),
    "numpy.load": ("allow_pickle", "False"),
    "np.save": ("allow_pickle", "False"),
    "numpy.save": ("allow_pickle", "False"),
}
ARCHIVES = {"zipfile", "tarfile"}


def imported(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Every import as (module, imported name), with "" for the module itself."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from ((node.module or "", alias.name) for alias in node.names)


def faults(source: str) -> list[str]:
    """Calls and imports that could run untrusted input, one line each."""
    tree, found = ast.parse(source), []
    for module, name in imported(tree):
        if module.partition(".")[0] in UNPICKLERS | ARCHIVES:
            found.append(f"imports {module}")
        if f"{module}.{name}" in FORBIDDEN.keys() | REQUIRED.keys():
            found.append(f"imports {name} from {module}, under which calls are not seen")
    for node in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name, where = ast.unparse(node.func), f"line {node.lineno}"
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if name in FORBIDDEN:
            found.append(f"{where}: {name}; use {FORBIDDEN[name]}")
        if name in REQUIRED and given.get(REQUIRED[name][0]) != REQUIRED[name][1]:
            found.append(f"{where}: {name} without {'='.join(REQUIRED[name])}")
        if name.endswith((".extract", ".extractall")):
            found.append(f"{where}: {name} of an archive")
        if given.get("shell", "False") != "False":
            found.append(f"{where}: a shell")
        if name.startswith("Auto") and name.endswith(".from_pretrained"):
            if given.get("trust_remote_code") != "False":
                found.append(f"{where}: {name} without trust_remote_code=False")
        elif given.get("trust_remote_code", "False") != "False":
            found.append(f"{where}: {name} trusts code")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_can_run_what_it_reads(path: Path):
    assert faults(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "from torch import load",
        "import zipfile",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path)",
        "np.load(path, allow_pickle=wish)",
        "eval(text)",
        "os.system(text)",
        "subprocess.run(text, shell=True)",
        "yaml.load(text)",
        "archive.extractall(folder)",
        "AutoConfig.from_pretrained(folder)",
        "AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)",
        "load_dataset(name, trust_remote_code=wish)",
    ],
)
def test_the_walk_sees_what_it_looks_for(source: str):
    assert len(faults(source)) == 1


def test_the_walk_lets_pass_what_is_safe():
    assert faults("torch.load(path, weights_only=True)\nmodel.eval()\nre.compile(text)\ntorch.compile(model)") == []
    assert len(SOURCES) > 50


@pytest.mark.parametrize("name", ["../elsewhere.json", "/etc/hostname", "a/../../elsewhere.json"])
def test_a_converted_folder_stays_within_itself(name: str, tmp_path: Path):
    (tmp_path / "elsewhere.json").write_text("{}")
    model = tiny()
    convert(model, allocate(model), tmp_path / "hybrid")
    manifest = json.loads((tmp_path / "hybrid" / MANIFEST).read_text())
    manifest["files"][name] = hashlib.sha256(b"{}").hexdigest()
    (tmp_path / "hybrid" / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ConsaError, match="outside its folder"):
        verify(tmp_path / "hybrid")


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_a_models_own_code_is_never_run(
    file: str, tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Not even if the user consents: transformers asks by default, and this test always answers yes."""
    folder, ran = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(tiny_model_folder, folder)
    code = f"import pathlib\npathlib.Path({str(ran)!r}).touch()\n"
    (folder / "theirs.py").write_text(code + "class Theirs: pass\n")
    content = json.loads((folder / file).read_text())
    classes = {"config.json": ["AutoConfig", "AutoModelForCausalLM"], "tokenizer_config.json": ["AutoTokenizer"]}
    theirs = "theirs.Theirs"
    content["auto_map"] = {name: [theirs, None] if name == "AutoTokenizer" else theirs for name in classes[file]}
    if file == "config.json":
        content["model_type"] = "theirs"
    (folder / file).write_text(json.dumps(content))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    for read in (read_layout, load_model):
        if file == "config.json":
            with pytest.raises(ConsaError, match="cannot load model"):
                read(str(folder))
        else:
            read(str(folder))
    assert not ran.exists()
