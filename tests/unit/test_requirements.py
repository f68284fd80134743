"""What pyproject.toml asks for and what requirements.txt pins agree."""

from __future__ import annotations

import re
import tomllib

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.commands import ROOT

INSTALLERS = {"pip", "hatchling"}
"""Needed to install the project, not by it. (FFCV needs setuptools at run time as well.)"""
DEVELOPMENT = ("Tests", "Lint")
"""Headings of requirements.txt that hold the extra `dev`."""


def project() -> dict[str, list[Requirement]]:
    """Requirements in pyproject.toml: of users, and of developers."""
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = {"users": table["dependencies"], "developers": table["optional-dependencies"]["dev"]}
    return {name: [Requirement(text) for text in texts] for name, texts in lists.items()}


def pinned() -> dict[str, dict[str, str]]:
    """The versions in requirements.txt, by package: of users, and of developers."""
    pins: dict[str, dict[str, str]] = {"users": {}, "developers": {}}
    audience = "users"
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if line.startswith("#"):
            audience = "developers" if line.removeprefix("# ").startswith(DEVELOPMENT) else "users"
        elif pin := re.match(r"([\w.-]+)(?:\[\w+\])?==([\w.]+)", line):
            pins[audience][canonicalize_name(pin[1])] = pin[2]
    return pins


def test_both_name_the_same_packages() -> None:
    asked = {audience: {canonicalize_name(one.name) for one in wanted} for audience, wanted in project().items()}
    assert asked == {audience: set(pins) - INSTALLERS for audience, pins in pinned().items()}


def test_every_pin_is_a_version_that_the_project_asks_for() -> None:
    pins = pinned()
    wrong = [
        f"{one}, but {pins[audience][canonicalize_name(one.name)]} is pinned"
        for audience, wanted in project().items()
        for one in wanted
        if not one.specifier.contains(pins[audience][canonicalize_name(one.name)])
    ]
    assert wrong == []


def test_the_installed_commands_version_is_the_cited_one() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
