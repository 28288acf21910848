"""Project metadata is consistent."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import consa

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REQUIREMENTS = [
    Requirement(line)
    for lines in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    for line in lines
]


def pins(file: str = "constraints.txt") -> dict[str, str]:
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    found = [line.partition("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, _, version in found}


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=str)
def test_every_direct_dependency_is_pinned_within_its_range(requirement: Requirement):
    assert requirement.specifier.contains(pins()[canonicalize_name(requirement.name)])


def test_the_oldest_versions_are_the_floors():
    """Except for tools and for extras with their own environment."""
    oldest, others = pins("constraints-oldest.txt"), {"browser", "dev", "vllm"}
    extras = PROJECT["optional-dependencies"]
    lines = [*PROJECT["dependencies"], *(line for name in extras.keys() - others for line in extras[name])]
    floors = {}
    for requirement in map(Requirement, lines):
        floor = next(part.version for part in requirement.specifier if part.operator == ">=")
        floors[canonicalize_name(requirement.name)] = Version(floor)
    assert {name: Version(version) for name, version in oldest.items()} == floors


def test_the_version_is_the_same_everywhere():
    cited = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    assert cited and cited[1] == consa.__version__


@pytest.mark.parametrize(("path", "most"), [("README.md", 150), ("docs/RESULTS.md", 250)])
def test_pages_stay_short_enough_to_read(path: str, most: int):
    assert len((ROOT / path).read_text(encoding="utf-8").splitlines()) <= most


def test_experiments_replace_objects_and_patch_nothing():
    paths = [path for folder in ("benchmarks", "research") for path in (ROOT / folder).rglob("*.py")]
    assert paths and not [path for path in paths if "mock" in path.read_text(encoding="utf-8")]
