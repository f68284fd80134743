"""The requirements of pyproject.toml and the pins of requirements.txt agree."""

from __future__ import annotations

import re
import tomllib

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.commands import ROOT

INSTALLERS = {"pip", "hatchling"}
"""Needed to install the project, not by it. (FFCV needs setuptools at run time as well.)"""
DEVELOPMENT = ("Tests", "Lint")
"""Headings in requirements.txt of the packages of the extra `dev`."""


def project() -> dict[str, list[Requirement]]:
    """Requirements in pyproject.toml, by audience."""
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = {"users": table["dependencies"], "developers": table["optional-dependencies"]["dev"]}
    return {name: [Requirement(text) for text in texts] for name, texts in lists.items()}


def pins_by_audience() -> dict[str, dict[str, str]]:
    """Versions in requirements.txt, by audience and package."""
    pins: dict[str, dict[str, str]] = {"users": {}, "developers": {}}
    audience = "users"
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if line.startswith("#"):
            audience = "developers" if line.removeprefix("# ").startswith(DEVELOPMENT) else "users"
        elif pin := re.match(r"([\w.-]+)(?:\[\w+\])?==([\w.]+)", line):
            pins[audience][canonicalize_name(pin[1])] = pin[2]
    return pins


def test_both_name_the_same_packages() -> None:
    requirements = {audience: {canonicalize_name(one.name) for one in items} for audience, items in project().items()}
    assert requirements == {audience: set(pins) - INSTALLERS for audience, pins in pins_by_audience().items()}


def test_every_pin_satisfies_its_requirement() -> None:
    pins = pins_by_audience()
    mismatches = [
        f"{one}, but {pins[audience][canonicalize_name(one.name)]} is pinned"
        for audience, items in project().items()
        for one in items
        if not one.specifier.contains(pins[audience][canonicalize_name(one.name)])
    ]
    assert mismatches == []


def test_the_installed_commands_version_is_the_cited_one() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
