"""The command `doctor`, and the processes of its checks: none hangs, crashes the others, or outlives the command."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.__main__ import main
from launch.commands import doctor
from launch.doctor import checks
from launch.doctor.outcome import Check, Outcome, ProgressCallback, Subject
from launch.doctor.process import run_check
from pipeline.recipe.file import dump_recipe
from tests.support.commands import ROOT, processes_with, wait_until
from tests.support.small_recipe import small_recipe

SUBJECT = Subject(on_slurm=True)


def wait_for_ever(subject: Subject, progress: ProgressCallback) -> Outcome:
    subprocess.Popen(["sleep", "1000"])  # which ends with it
    time.sleep(1000)
    raise AssertionError


def crash(subject: Subject, progress: ProgressCallback) -> Outcome:
    print("it was the decoder", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)
    raise AssertionError


def exit_at_once(subject: Subject, progress: ProgressCallback) -> Outcome:
    os._exit(3)


def refuse(subject: Subject, progress: ProgressCallback) -> Outcome:
    raise ValueError("data.train_file is missing; write it")


def stumble(subject: Subject, progress: ProgressCallback) -> Outcome:
    raise RuntimeError("of\na package")


def advance(subject: Subject, progress: ProgressCallback) -> Outcome:
    """Takes longer than its deadline of 3 s, and reports progress meanwhile."""
    for step in range(8):
        progress(step, 8)
        time.sleep(0.5)
    print("noise on standard output")
    return Outcome("pass", f"on SLURM: {subject.on_slurm}")


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes import this module from the working folder."""
    monkeypatch.chdir(ROOT)


def line_of(function: str, deadline_s: float = 100.0) -> str:
    shares: list[tuple[int, int]] = []
    check = Check("it", f"{__name__}:{function}", deadline_s)
    return run_check(check, SUBJECT, lambda *share: shares.append(share)).line("it")


@pytest.mark.parametrize(
    ("function", "line"),
    [
        ("crash", "fail  it: its process was ended by SIGSEGV: it was the decoder"),
        ("exit_at_once", "fail  it: its process ended with 3"),
        ("refuse", "fail  it: data.train_file is missing; write it"),
        ("stumble", "fail  it: RuntimeError: of a package"),
    ],
)
def test_what_goes_wrong_is_one_line(function: str, line: str) -> None:
    assert line_of(function) == line


def test_a_check_that_hangs_ends_at_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_TEST_HANGS", "yes")
    line = line_of("wait_for_ever", 0.5)
    assert line == "fail  it: no answer in 0.5 s; fix: is the machine overloaded, or a file system stuck?"
    wait_until(lambda: not processes_with({"HYDRA_TEST_HANGS": "yes"}), 30, "the end of the check's processes")


@pytest.mark.slow
def test_progress_moves_the_deadline() -> None:
    assert line_of("advance", 20.0) == "pass  it: on SLURM: True"


@pytest.mark.slow
def test_a_check_ends_with_the_command_that_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_TEST_KILLED", "yes")
    code = f"from {__name__} import line_of; line_of('wait_for_ever')"
    command = subprocess.Popen([sys.executable, "-c", code])
    hanging = {"HYDRA_TEST_KILLED": "yes"}
    wait_until(lambda: any("sleep" in one.name() for one in processes_with(hanging)), 100, "the check")
    command.kill()
    command.wait()
    wait_until(lambda: not processes_with(hanging), 30, "the end of the check's processes")


def test_lines_and_exit_code(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(dump_recipe(small_recipe(tmp_path)))
    outcomes = {"GPUs": Outcome("warn", "none", "a driver")}
    subjects: list[Subject] = []

    def answer(check: Check, subject: Subject, progress: ProgressCallback) -> Outcome:
        subjects.append(subject)
        return outcomes.get(check.name, Outcome("pass", "good"))

    monkeypatch.setattr(doctor, "run_check", answer)
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out == [
        "warn  GPUs: none; fix: a driver" if check.name == "GPUs" else f"pass  {check.name}: good"
        for check in (*checks.MACHINE, checks.SLURM)
    ]
    outcomes["data"] = Outcome("fail", "gone", "write it\x1b[2J")
    assert main(["doctor", "recipe.yaml", "seed=5"]) == 1
    assert "fail  data: gone; fix: write it\\x1b[2J\n" in capsys.readouterr().out
    recipe = subjects[-1].recipe
    assert recipe is not None
    assert (recipe.seed, Path(recipe.data.train_file).is_absolute()) == (5, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "nothing: no such run"),
        (["nothing.yaml"], "nothing.yaml: cannot be read"),
        (["--cluster", "c.yaml"], "--cluster c.yaml is for --on slurm"),
        (["--on", "slurm"], "needs a recipe or a run"),
        (["nothing", "seed=1"], "seed=1: a run is checked with its own recipe"),
        (["recipe.yaml", "--on", "slurm"], "--on slurm needs a slurm: section"),
    ],
)
def test_misuse(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(dump_recipe(small_recipe(tmp_path)))
    assert main(["doctor", *arguments]) == 2
    assert message in capsys.readouterr().err
