"""Arrows between modules point down, and importing consa is instant. The rules are in docs/DESIGN.md."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import consa

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "consa"


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}

LEAVES = [
    "allocation",
    "config",
    "constraints",
    "errors",
    "files",
    "gates",
    "lagrangian",
    "rules",
    "attention.masks",
]
NUMPY_ONLY = ["allocation", "config", "constraints", "errors", "files", "rules"]
MOST_LINES = 500
MOST_LINES_OF_A_BODY = 60
VERBS = ["adaptation", "behaviour", "evaluation", "learning", "report", "serving"]


def existing(names: list[str]) -> list[str]:
    return [f"consa.{name}" for name in names if f"consa.{name}" in MODULES]


@cache
def tree_of(name: str) -> ast.Module:
    return ast.parse(MODULES[name].read_text(encoding="utf-8"))


@cache
def imports_of(name: str, *, lazy: bool = True) -> frozenset[str]:
    """Modules that a module imports; `lazy` counts those inside functions too. Not those for type checkers."""
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    found: set[str] = set()
    waiting: list[ast.AST] = [tree_of(name)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
            continue
        if not lazy and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            above = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            source = ".".join(filter(None, [above, node.module]))
            submodules = {f"{source}.{alias.name}" for alias in node.names} & MODULES.keys()
            found |= submodules | {source}
        waiting += ast.iter_child_nodes(node)
    return frozenset(found)


def reached_from(name: str) -> set[str]:
    """All that importing a module brings in by itself: its packages and what it imports, and so on."""
    reached: set[str] = set()
    waiting = [name]
    while waiting:
        module = waiting.pop()
        if module in reached:
            continue
        reached.add(module)
        if module in MODULES:
            waiting += imports_of(module, lazy=False)
            waiting += [module.rpartition(".")[0]] if "." in module else []
    return reached


def top_levels(modules: set[str] | frozenset[str]) -> set[str]:
    return {module.partition(".")[0] for module in modules}


def test_the_walk_sees_what_there_is_to_see():
    """The other tests pass on an empty set; this one does not."""
    assert {"consa", "consa.__main__", "consa.allocation", "consa.attention"} <= MODULES.keys()
    assert {"numpy", "consa.errors", "consa.files"} <= imports_of("consa.allocation")
    assert "consa.cli" in imports_of("consa.__main__")
    assert "consa.training.learning" not in imports_of("consa")  # for type checkers only
    assert {"numpy", "json", "consa"} <= reached_from("consa.rules")


@pytest.mark.parametrize("name", existing(LEAVES))
def test_leaves_know_nothing_of_transformers(name: str):
    assert not top_levels(imports_of(name) | reached_from(name)) & {"transformers", "huggingface_hub"}


@pytest.mark.parametrize("name", existing(NUMPY_ONLY))
def test_the_noun_and_what_is_below_know_nothing_of_torch(name: str):
    allowed = {"numpy", "consa", "__future__", *sys.stdlib_module_names}
    assert top_levels(imports_of(name) | reached_from(name)) <= allowed


@pytest.mark.parametrize("name", MODULES)
def test_nothing_imports_the_command_line(name: str):
    if name != "consa.__main__":
        assert "consa.cli" not in imports_of(name)


@pytest.mark.parametrize("name", MODULES)
def test_verbs_do_not_import_each_other(name: str):
    parts = [*name.split("."), ""]
    if parts[1] in VERBS:
        others = {f"consa.{verb}" for verb in VERBS if verb != parts[1]}
        imported = {".".join(module.split(".")[:2]) for module in imports_of(name)}
        assert not imported & others


def rooms() -> list[str]:
    """The names in the list of docs/DESIGN.md, in its order."""
    text = (ROOT / "docs" / "DESIGN.md").read_text(encoding="utf-8")
    return [line.split()[0] for line in text.splitlines() if re.match(r"      \w", line)]


def test_the_design_lists_every_room():
    modules = {path.name for path in PACKAGE.glob("*.py") if not path.name.startswith("_")}
    packages = {f"{path.parent.name}/" for path in PACKAGE.glob("*/__init__.py")}
    assert sorted(rooms()) == sorted(modules | packages)


def bodies(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Name and lines of every function's body, without its docstring."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[min(ast.get_docstring(node) is not None, len(node.body) - 1)]
            yield node.name, (node.end_lineno or 0) - first.lineno + 1


@pytest.mark.parametrize("folder", ["consa", "benchmarks", "recipes"])
def test_modules_and_functions_are_short_enough_to_read(folder: str):
    paths = sorted((ROOT / folder).rglob("*.py"))
    assert paths
    for path in paths:
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= MOST_LINES, path
        long = {name: lines for name, lines in bodies(ast.parse(text)) if lines > MOST_LINES_OF_A_BODY}
        assert not long, f"{path}: {long}"


def test_nothing_is_imported_in_a_circle():
    for name in MODULES:
        for imported in (imports_of(name, lazy=False) & MODULES.keys()) - {"consa"}:
            package = imported == name.rpartition(".")[0]
            assert package or name not in reached_from(imported), f"{name} and {imported} import each other"


def run_python(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_importing_consa_imports_nothing_heavy():
    run_python(
        "import sys, consa\n"
        "heavy = {'torch', 'transformers', 'numpy', 'typer', 'rich', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "consa.__version__, dir(consa)\n"
        "assert 'numpy' not in sys.modules\n"
    )


def test_the_noun_and_the_rules_need_no_torch():
    run_python(
        "import sys\n"
        "from consa import Allocation, ConsaError, rules\n"
        "assert isinstance(rules.top(4, 2, sparsity=0.5), Allocation)\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )


def test_public_names_come_when_asked_for():
    for name, home in consa._HOMES.items():
        assert name in dir(consa)
        if importlib.util.find_spec(home):
            value = getattr(consa, name)
            module = importlib.import_module(home)
            assert value is (module if home == f"consa.{name}" else getattr(module, name))
            assert name in vars(consa)  # the second time, Python finds it by itself
    with pytest.raises(AttributeError, match="'consa' has no attribute 'Alocation'"):
        consa.Alocation  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ImportError, match="Alocation"):
        from consa import Alocation  # noqa: F401  # pyright: ignore[reportAttributeAccessIssue]


def test_type_checkers_see_the_same_public_names():
    for_type_checkers = {
        alias.asname: (node.module if node.module != "consa" else f"consa.{alias.name}")
        for block in ast.walk(tree_of("consa"))
        if isinstance(block, ast.If)
        for node in ast.walk(block)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert for_type_checkers == consa._HOMES
