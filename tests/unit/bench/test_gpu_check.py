"""The check-up of a GPU, as far as a CPU goes: its lines, exit codes and file, its imports, and its quick checks."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.bench.gpu_check import Report, run_check, write_report
from tests.bench.gpu_checks import CHECKS, assert_repeats
from tests.support.commands import ROOT

CPU = torch.device("cpu")
QUICK = ("keyed noise", "masks", "gradients of masked weights", "bounds and certificates", "PGD and noise")
HEAVY = ("ray", "ffcv", "wandb", "numba")


def _wrong(_: torch.device) -> str:
    raise AssertionError("one thing\nand a trace")


@pytest.mark.parametrize(
    ("checks", "code"),
    [
        ([((), lambda _: "fine")], 0),
        ([((), lambda _: "fine"), (("no_such_package",), lambda _: "fine")], 3),
        ([(("no_such_package",), lambda _: "fine"), ((), _wrong)], 1),
    ],
)
def test_lines_and_exit_code(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    checks: list[tuple[tuple[str, ...], Callable[[torch.device], str]]],
    code: int,
) -> None:
    report = Report()
    for number, (needs, check) in enumerate(checks):
        run_check(report, f"check {number}", needs, check)
    assert report.exit_code == code
    out = capsys.readouterr().out
    assert ("FAIL  check 1: AssertionError: one thing\n" in out) == (code == 1)
    assert ("skip  check 1: needs no_such_package" in out) == (code == 3)
    table = write_report(report, tmp_path, CPU).read_text()
    assert all(f"| {name} | {status} | {detail} |" in table for status, name, detail in report.lines)


def test_a_gpu_machine_needs_neither_ray_nor_ffcv_nor_wandb() -> None:
    code = (
        f"import sys, tests.bench.gpu_check, pipeline.training.engine; print([n for n in {HEAVY} if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", QUICK)
def test_the_quick_checks_pass_on_a_cpu(name: str) -> None:
    (check,) = [check for other, _, check in CHECKS if other == name]
    assert check(CPU)


def test_a_result_that_does_not_repeat_is_noticed() -> None:
    numbers = iter(range(9))
    with pytest.raises(AssertionError, match="result 0 of call 2 differs"):
        assert_repeats("what", lambda: [torch.tensor(next(numbers))])
