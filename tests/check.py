"""Checks to run after every change: `python -m tests.check`, which `make check` calls.

Runs lint, import contracts, types, and the quick unit tests of changed files in parallel. Changed files are those that
differ from the last commit or, if none does, those that the last commit changed. Types are checked in changed files and
in files that import them; tests run if they import a changed file, or name the folder of a changed file that is not
Python. Exit code: 0 if all checks pass, and 1 otherwise.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.support.commands import ROOT

CODE = ("pipeline", "launch", "tests")
UNIT_TESTS = Path("tests/unit")
NO_TEST_RAN = 5
"""pytest's exit code."""


def changed_files() -> set[Path]:
    """Existing files, as paths relative to the root."""
    new = _output_lines("git", "ls-files", "--others", "--exclude-standard")
    uncommitted = _output_lines("git", "diff", "--name-only", "HEAD") + new
    names = uncommitted or _output_lines("git", "diff", "--name-only", "HEAD~1")
    return {Path(name) for name in names if (ROOT / name).exists()}


def _output_lines(*command: str) -> list[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()


def python_files() -> list[Path]:
    """All Python files of the project."""
    return sorted(path.relative_to(ROOT) for folder in CODE for path in (ROOT / folder).rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path, modules: set[str]) -> set[str]:
    """Which of the modules a file imports, at module level or inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            targets = [f"{node.module}.{alias.name}" for alias in node.names]
            names |= {target if target in modules else node.module for target in targets}
    return names & modules


def importing(paths: Iterable[Path]) -> set[Path]:
    """The files themselves, and those that import one of them: directly, or through a package that re-exports it."""
    modules = {module_of(path): path for path in python_files()}
    imports = {path: imports_of(path, set(modules)) for path in modules.values()}
    concerned: set[Path] = set()
    new = set(paths) & set(imports)
    while new:
        concerned |= new
        sources = {module_of(path) for path in new if path in set(paths) or path.name == "__init__.py"}
        new = {path for path, names in imports.items() if names & sources} - concerned
    return concerned


def naming(paths: Iterable[Path]) -> set[Path]:
    """Test files that name the top folder of one of the files, as tests that read recipes or documentation do."""
    words = {f'"{path.parts[0]}"' for path in paths if path.parts[0] not in CODE}
    return {
        path for path in python_files() if _is_unit_test(path) and any(w in (ROOT / path).read_text() for w in words)
    }


def _is_unit_test(path: Path) -> bool:
    return path.is_relative_to(UNIT_TESTS) and path.name.startswith("test_")


def main() -> int:
    paths = changed_files()
    python = {path for path in paths if path.suffix == ".py"}
    concerned = importing(python)
    tests = sorted({path for path in concerned if _is_unit_test(path)} | naming(paths - python))
    checks = {"lint and import contracts": ["pre_commit", "run", "--all-files"]}
    if concerned:
        checks["types"] = ["basedpyright", *map(str, sorted(concerned))]
    if tests:
        quick = ["-m", "not slow", "-n", "logical", "--maxprocesses=8", "--dist=loadfile"]
        checks["tests"] = ["pytest", "-q", "--no-header", *quick, *map(str, tests)]
    print(f"{len(paths)} files changed: types of {len(concerned)} files, {len(tests)} files of tests", flush=True)
    with ThreadPoolExecutor(len(checks)) as pool:
        results = dict(zip(checks, pool.map(_run_module, checks.values()), strict=True))
    for name, (passed, output) in results.items():
        print(f"{name}: {'passed' if passed else 'FAILED'}" + (f"\n{output}" if not passed else ""))
    return int(not all(passed for passed, _ in results.values()))


def _run_module(command: list[str]) -> tuple[bool, str]:
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.returncode in (0, NO_TEST_RAN), done.stdout + done.stderr


if __name__ == "__main__":
    sys.exit(main())
