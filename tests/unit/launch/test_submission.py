"""Jobs as they are submitted and queued again, with programs in the place of SLURM's: deadlines, signals, bounds."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from launch import run_folder
from launch.__main__ import main
from launch.slurm import report_job, sbatch, submit
from launch.slurm.control_files import ControlFiles, JobFailed
from launch.slurm.report_job import REPORT, Report
from pipeline.run.locks import exclusive
from tests.support.commands import ROOT, require_installed
from tests.support.small_recipe import small_recipe

TUNE = {"finetune_lr": [0.01, 0.03]}
SECTION = {"cpus_per_task": 1, "time": 30, "signal_s": 30}
LOAD = """
import pickle, sys
for path in sys.argv[1:]:
    with open(path, "rb") as stream:
        print(type(pickle.load(stream).function).__name__)
print([name for name in ("torch", "ray", "deepspeed") if name in sys.modules])
"""


class Programs:
    """Programs on PATH with a set behaviour."""

    def __init__(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.place = place / "bin"
        self.place.mkdir()
        monkeypatch.setenv("PATH", f"{self.place}:{os.environ['PATH']}")
        for name in ("srun", "squeue", "scontrol"):
            self.put(name, "true")
        self.put("sbatch", f"echo x >> {self.place}/count; echo Submitted batch job $(wc -l < {self.place}/count)")

    def put(self, name: str, command: str) -> None:
        program = self.place / name
        program.write_text(f"#!/bin/sh\n{command}\n")
        program.chmod(0o755)


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    return Programs(tmp_path, monkeypatch)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "mine"
    run_folder.write_run_folder(folder, small_recipe(tmp_path, slurm=SECTION), {})
    return folder


def test_what_is_submitted_is_tiny_and_needs_no_torch(programs: Programs, run: Path) -> None:
    jobs = submit.submit_run(run)
    pickles = [run / "jobs" / f"{job.id}_submitted.pkl" for job in jobs]
    assert max(path.stat().st_size for path in pickles) < 1000
    require_installed()
    place = programs.place  # a job begins where it was submitted, which is not the project's folder
    done = subprocess.run([sys.executable, "-c", LOAD, *pickles], cwd=place, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:-1] == [*["JobPayload"] * (len(jobs) - 1), "Report", "[]"]


def test_what_an_allocation_says_of_itself_does_not_reach_the_job(
    programs: Programs, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """srun refuses SLURM_MEM_PER_CPU beside --mem, for one; what sites and users tell SLURM's commands stays."""
    place = programs.place
    programs.put("sbatch", f"env > {place}/environment; echo x >> {place}/count; echo Submitted batch job 1")
    allocation = {"SLURM_JOB_ID": "7", "SLURM_MEM_PER_CPU": "100", "SLURM_GPUS_PER_NODE": "8"}
    allocation |= {"SLURM_EXPORT_ENV": "NONE"}
    settings = {"SLURM_CONF": "/etc/slurm.conf", "SBATCH_ACCOUNT": "us", "SBATCH_EXPORT": "NONE", "MINE": "1"}
    for name, value in (allocation | settings).items():
        monkeypatch.setenv(name, value)
    submit.submit_run(run)
    there = dict(line.split("=", 1) for line in (place / "environment").read_text().splitlines() if "=" in line)
    assert there.keys() & allocation.keys() == set()
    assert settings.items() <= there.items()
    assert [os.environ[name] for name in allocation] == [*allocation.values()]
    arguments = sbatch.sbatch_parameters(small_recipe(run, slurm=SECTION), run, "x", None)["srun_args"]
    assert "--export=ALL" in arguments


def test_other_users_cannot_read_what_is_submitted(programs: Programs, run: Path) -> None:
    jobs = run / "jobs"
    jobs.mkdir(mode=0o755)
    submit.submit_run(run)
    assert stat.S_IMODE(jobs.stat().st_mode) == 0o700
    assert any("slurm" in file.read_text() for file in jobs.glob("*.sh"))


def test_a_folder_with_a_line_break_cannot_be_submitted(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\\nb' has a line break"):
        sbatch.sbatch_text(small_recipe(tmp_path, slurm=SECTION), tmp_path / "a\nb", "pretrain")


@pytest.mark.parametrize("command", [["run", "recipes/fashion_mnist.yaml"], ["resume", "mine"]])
@pytest.mark.parametrize("after", ["1\n2", "1\n", "", "x", "1 --wrap=id", "1:2"])
def test_what_is_no_job_is_refused(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: list[str], after: str
) -> None:
    monkeypatch.chdir(run.parents[1] if command[0] == "resume" else ROOT)
    assert main([*command, "--on", "slurm", "--after", after]) == 2
    assert f"--after {after!r}: expected the id of a SLURM job" in capsys.readouterr().err


@pytest.mark.parametrize("silent", ["pretrain", submit.FAN])
def test_an_sbatch_that_does_not_answer_has_a_deadline(
    programs: Programs, run: Path, monkeypatch: pytest.MonkeyPatch, silent: str
) -> None:
    """An array is submitted in another way than a single job."""
    monkeypatch.setattr(submit, "CLIENT_S", 1)
    count = programs.place / "count"
    programs.put(
        "sbatch",
        f'grep -q "job-name=mine-{silent}" "$1" && exec sleep 60; '
        f"echo x >> {count}; echo Submitted batch job $(wc -l < {count})",
    )
    with pytest.raises(ValueError, match=rf"sbatch did not answer in 1 s; if squeue shows a job mine-{silent}"):
        submit.submit_run(run)
    assert [job.job_name for job in submit.read_jobs(run)] == ["pretrain"] * (silent != "pretrain")


def test_a_submission_that_never_ends_does_not_hold_the_next(
    programs: Programs, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submit, "SUBMIT_S", 0.2)
    with (
        exclusive(run / ".jobs.lock"),
        pytest.raises(ValueError, match=r"has been submitted by another process for 0\.2 s"),
    ):
        submit.submit_run(run)
    groups = [job.job_name for job in submit.submit_run(run)]
    assert (groups[0], groups[-1]) == ("pretrain", REPORT)


@pytest.mark.parametrize(
    ("program", "does", "requeued", "advised"),
    [
        ("squeue", "echo RUNNING", True, False),
        ("squeue", "echo COMPLETING", False, False),
        ("squeue", "exec sleep 60", False, True),
        ("scontrol", "exec sleep 60", False, True),
        ("scontrol", "exit 1", False, True),
    ],
)
def test_a_job_that_cannot_be_requeued_says_so(
    programs: Programs,
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    program: str,
    does: str,
    requeued: bool,
    advised: bool,
) -> None:
    monkeypatch.setattr(sbatch, "CLIENT_S", 1)
    programs.put("squeue", "echo RUNNING")
    programs.put("scontrol", f'echo "$@" > {programs.place}/arguments')
    programs.put(program, does)
    control = ControlFiles.of(run, "12", "0")
    control.create()
    control.mark_counted()
    teardown = sbatch.sbatch_parameters(small_recipe(run, slurm=SECTION), run, "x", None)["teardown"]
    script = "\n".join(["(exit 3)", *teardown])
    environment = {**os.environ, "SLURM_JOB_ID": "12"}
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 3
    assert (programs.place / "arguments").exists() == requeued
    assert (f"python -m launch resume {run}" in done.stderr) == advised


def test_a_warning_before_submitit_is_ready_does_not_end_the_task(run: Path) -> None:
    code = (
        "import os, signal; os.kill(os.getpid(), signal.SIGUSR2); print('lives')\n"
        "signal.signal(signal.SIGUSR2, lambda *_: print('warned')); os.kill(os.getpid(), signal.SIGUSR2)"
    )
    command = f'exec {sbatch.python_of(small_recipe(run, slurm=SECTION))} -c "$1"'
    done = subprocess.run(["bash", "-c", command, "bash", code], capture_output=True, text=True, timeout=60)
    assert done.returncode != -signal.SIGUSR2
    assert done.stdout.split() == ["lives", "warned"]


def test_python3_of_our_own_image_has_the_project(tmp_path: Path) -> None:
    """The image's PATH, with this checkout in the place of its folder; a container's task starts `python3`."""
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    (place,) = [line.removeprefix("WORKDIR ") for line in lines if line.startswith("WORKDIR ")]
    (path,) = [line.removeprefix("ENV PATH=") for line in lines if line.startswith("ENV PATH=")]
    assert lines.index(f"ENV PATH={path}") > lines.index("FROM debian:bookworm-slim")
    assert path.split(":")[-1] == "$PATH", "Debian's own programs are found after it"
    path = path.replace(f"{place}/", f"{ROOT}/").replace("$PATH", os.defpath)
    command = sbatch.python_of(small_recipe(tmp_path, slurm={**SECTION, "container_image": "hydra.sqsh"}))
    assert command.endswith(" python3")
    code = "import sys, launch, submitit; print(sys.prefix); print(launch.__file__)"
    environment = {"PATH": path, "HOME": str(tmp_path)}
    done = subprocess.run(
        ["sh", "-c", f'{command} -c "$1"', "sh", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(ROOT / ".venv"), str(ROOT / "launch" / "__init__.py")]


class Killed(BaseException):
    """Simulates the kill of a task."""


def test_a_report_that_is_always_killed_is_not_requeued_forever(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*arguments: object) -> None:
        raise Killed

    monkeypatch.setattr(report_job.subprocess, "run", killed)
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    allowed = 2 * small_recipe(run).workers.restarts_without_progress + 2

    def start(restart: int) -> ControlFiles:
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        return ControlFiles.of(run, "12", str(restart))

    for restart in range(allowed):
        control = start(restart)
        with pytest.raises(Killed):
            Report(str(run), [])()
        assert (control.was_counted(), control.ended()) == (True, None), "it may be queued again"
    ControlFiles.of(run, "12", str(allowed - 1)).record_failure(0, "an old reason")
    ControlFiles.of(run, "12", str(allowed - 1)).record_failure(10, "no heartbeat from n2")
    last = start(allowed)
    message = rf"report was started {allowed} times without anything new committed \(last: no heartbeat from n2\); fix"
    with pytest.raises(JobFailed, match=message) as caught:
        Report(str(run), [])()
    assert last.ended() == {"code": 1, "message": str(caught.value)}


def test_trials_are_trained_and_chosen_in_the_job_of_their_method(tmp_path: Path) -> None:
    jobs = submit.stages_by_job(small_recipe(tmp_path, sparsity={"keep_fractions": ["0.1", "0.01"], "tune": TUNE}))
    names = {job: [stage.name.removeprefix("keep-0.01/") for stage in stages] for job, stages in jobs.items()}
    assert list(names) == ["pretrain", "keep-0.1", "keep-0.1-magnitude", "keep-0.01", "keep-0.01-magnitude"]
    assert names["keep-0.01"] == ["prune", "trial-1/finetune", "trial-2/finetune", "finetune"]
    assert names["keep-0.01-magnitude"] == ["trial-1/magnitude", "trial-2/magnitude", "magnitude"]
