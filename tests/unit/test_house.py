"""Rules that the import contracts of pyproject.toml cannot check: sizes, docstrings, lazy imports in a process."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib

from tests.support.commands import ROOT

MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in ("pipeline", "launch")
    for path in (ROOT / folder).rglob("*.py")
}
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
LIGHT = {"ruamel", "tabulate"}
"""Third-party packages that a login node may load."""
VENDORS = sorted({name for contract in CONTRACTS for name in contract.get("forbidden_modules", [])} - LIGHT)
WITHOUT_TORCH = next(contract for contract in CONTRACTS if "without torch" in contract["name"])["source_modules"]


def test_modules_are_small() -> None:
    lengths = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in MODULES.items()}
    assert {name: lines for name, lines in lengths.items() if lines > 300} == {}


def test_modules_begin_with_a_docstring() -> None:
    trees = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}
    assert [name for name, tree in trees.items() if not ast.get_docstring(tree)] == []


def test_imports_are_absolute() -> None:
    trees = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}
    relative = [n for n, tree in trees.items() for node in ast.walk(tree) if getattr(node, "level", 0)]
    assert relative == []


def test_a_login_node_reads_recipes_and_runs_without_torch_and_ray() -> None:
    modules = [m for m in MODULES if any(m == name or m.startswith(f"{name}.") for name in WITHOUT_TORCH)]
    assert _imported(VENDORS, ["pipeline", "launch.__main__", *modules]) == []


def test_evaluating_a_finished_network_needs_neither_ray_nor_deepspeed() -> None:
    assert _imported(["ray", "deepspeed"], ["launch.commands.evaluate", "pipeline.evaluation.runner"]) == []


def test_a_report_of_a_network_of_our_own_does_not_wait_for_torchvision() -> None:
    assert _imported(["torchvision"], ["pipeline.report.build", "pipeline.models.export"]) == []


def _imported(heavy: list[str], modules: list[str]) -> list[str]:
    """Those of the heavy packages that are loaded in a new process after it imports the modules."""
    code = f"import sys, {', '.join(modules)}; print(*(name for name in {heavy} if name in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout.split()
