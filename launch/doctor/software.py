"""Installed packages: what the code needs, and what it was tested with."""

from __future__ import annotations

import platform
import re
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from launch.doctor.outcome import Outcome, ProgressCallback, Subject
from pipeline.run.provenance import SOURCE

PROJECT = "hydra-pipeline"
PINS = SOURCE.parent / "requirements.txt"
"""In a checkout; an installed wheel has none."""
INSTALL = "make setup (or: pip install -r requirements.txt -c constraints.txt, then pip install --no-deps -e .)"


def check_versions(subject: Subject, progress: ProgressCallback) -> Outcome:
    """Python and packages against pyproject.toml, which fails, and against the pins, which warns."""
    try:
        about = metadata.metadata(PROJECT)
        requirements = [Requirement(text) for text in metadata.requires(PROJECT) or []]
    except metadata.PackageNotFoundError:
        return Outcome("fail", f"{PROJECT} is not installed for {platform.python_version()}", INSTALL)
    wrong, other, pins = [], [], read_pins(PINS)
    python = platform.python_version()
    if not SpecifierSet(about["Requires-Python"] or "").contains(python, prereleases=True):
        wrong.append(f"Python {python}, needed {about['Requires-Python']}")
    needed = [one for one in requirements if one.marker is None or one.marker.evaluate({"extra": ""})]
    for requirement in needed:
        try:
            installed = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        pin = pins.get(canonicalize_name(requirement.name))
        if not requirement.specifier.contains(installed, prereleases=True):
            wrong.append(f"{requirement.name} {installed}, needed {requirement.specifier}")
        elif pin is not None and not SpecifierSet(f"=={pin}").contains(installed, prereleases=True):
            other.append(f"{requirement.name} {installed}, pinned {pin}")
    if wrong:
        return Outcome("fail", ", ".join(wrong), INSTALL)
    if other:
        return Outcome("warn", f"{', '.join(other)}: not what the tests ran with", INSTALL)
    pinned = "are those pinned" if pins else "fit (there are no pins here: not a checkout)"
    return Outcome("pass", f"Python {python}; {len(needed)} packages {pinned}")


def read_pins(path: Path) -> dict[str, str]:
    """Versions in a requirements file, by canonical name; empty if there is no such file."""
    if not path.is_file():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines()
    pins = (re.match(r"([\w.-]+)(?:\[\w+\])?==([\w.+]+)", line) for line in lines)
    return {canonicalize_name(pin[1]): pin[2] for pin in pins if pin is not None}
