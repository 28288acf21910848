"""Imports point down the list of packages, and importing consa is instant; see docs/DESIGN.md."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import subprocess
import sys
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

# Every package and module, from the bottom to the top: each imports only what stands before it.
ORDER = [
    "errors", "files", "published", "picture", "allocation", "rules", "constraints", "provenance", "progress", "data",
    "settings", "config", "attention", "cache", "model", "training", "methods", "evaluation", "behaviour", "serving",
    "bench", "runs", "report", "api", "cli", "register", "__main__",
]  # fmt: skip
MAX_ARROWS = 150  # pairs of (package, package that it imports)
NUMPY_ONLY = ["errors", "files", "published", "picture", "allocation", "rules", "constraints", "settings", "config"]
TORCH_ONLY = ["attention.masks", "training.gates", "training.lagrangian"]


@cache
def tree_of(name: str) -> ast.Module:
    return ast.parse(MODULES[name].read_text(encoding="utf-8"))


@cache
def imports_of(name: str, *, lazy: bool = True, typing: bool = False) -> frozenset[str]:
    """Modules that a module imports; `lazy` counts those inside functions, `typing` those for type checkers."""
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    found: set[str] = set()
    waiting: list[ast.AST] = [tree_of(name)]
    while waiting:
        node = waiting.pop()
        if not typing and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
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
            targets = {f"{source}.{alias.name}" for alias in node.names}
            found |= targets & MODULES.keys()
            found |= set() if targets <= MODULES.keys() else {source}
        waiting += ast.iter_child_nodes(node)
    return frozenset(found)


def reached_from(name: str) -> set[str]:
    """Modules that importing a module loads: its packages, its imports, and theirs."""
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
    """The other tests would pass on an empty set; this one fails."""
    assert {"consa", "consa.__main__", "consa.allocation", "consa.attention"} <= MODULES.keys()
    assert {"numpy", "consa.errors", "consa.files"} <= imports_of("consa.allocation")
    assert "consa.cli" in imports_of("consa.__main__")
    assert "consa.training.learning" not in imports_of("consa")  # for type checkers only
    assert {"numpy", "json", "consa"} <= reached_from("consa.rules")


@pytest.mark.parametrize("name", [*NUMPY_ONLY, *TORCH_ONLY])
def test_leaves_know_nothing_of_transformers(name: str):
    name = f"consa.{name}"
    assert not top_levels(imports_of(name) | reached_from(name)) & {"transformers", "huggingface_hub"}


@pytest.mark.parametrize("name", NUMPY_ONLY)
def test_the_noun_and_what_is_below_know_nothing_of_torch(name: str):
    name = f"consa.{name}"
    allowed = {"numpy", "consa", "__future__", *sys.stdlib_module_names}
    assert top_levels(imports_of(name) | reached_from(name)) <= allowed


def home(name: str) -> str:
    """The package or top-level module that a module of consa belongs to."""
    return name.split(".")[1]


def arrows() -> dict[tuple[str, str], set[str]]:
    """(importing, imported) packages -> the modules that import; without the root, which holds only the version."""
    pairs: dict[tuple[str, str], set[str]] = {}
    for name in MODULES.keys() - {"consa"}:
        for imported in (imports_of(name) & MODULES.keys()) - {"consa"}:
            if home(name) != home(imported):
                pairs.setdefault((home(name), home(imported)), set()).add(name)
    return pairs


def test_the_order_names_every_package():
    assert sorted(ORDER) == sorted({home(name) for name in MODULES.keys() - {"consa"}})


def test_packages_import_only_what_stands_before_them():
    against = {
        f"{', '.join(sorted(modules))} imports {lower}"
        for (upper, lower), modules in arrows().items()
        if ORDER.index(lower) > ORDER.index(upper)
    }
    assert not against


def test_arrows_between_packages_are_few():
    assert len(arrows()) <= MAX_ARROWS


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Some circle of a graph, or []: remove the nodes that point at nothing until only circles are left."""
    graph = {node: targets - {node} for node, targets in graph.items()}
    while leaves := {node for node, targets in graph.items() if not targets & graph.keys()}:
        graph = {node: targets for node, targets in graph.items() if node not in leaves}
    path = sorted(graph)[:1]
    while path and path.count(path[-1]) < 2:
        path.append(min(graph[path[-1]] & graph.keys()))
    return path[path.index(path[-1]) :] if path else []


def test_the_search_for_circles_sees_them():
    assert circle({"a": {"b"}, "b": {"c", "e"}, "c": {"b"}, "e": set()}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


@pytest.mark.parametrize("package", ORDER)
def test_no_package_has_a_circle(package: str):
    """Imports inside functions and those for type checkers count too: two files in a circle cannot be read alone."""
    names = {name for name in MODULES.keys() - {"consa"} if home(name) == package}
    assert circle({name: imports_of(name, typing=True) & names for name in names}) == []


def test_the_design_lists_every_package():
    text = (ROOT / "docs" / "DESIGN.md").read_text(encoding="utf-8")
    modules = {name for name in ORDER if f"consa.{name}" in MODULES and name != "__main__"}
    missing = [name for name in modules if not re.search(rf"^ *{name}(/|\.py)\s", text, re.MULTILINE)]
    assert not missing


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


def test_dir_shows_the_public_names_only():
    importlib.import_module("consa.allocation")  # an attribute of the package from now on
    public = {name for name in dir(consa) if not name.startswith("__")}
    assert public == set(consa._HOMES)
    assert "__version__" in dir(consa)


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
