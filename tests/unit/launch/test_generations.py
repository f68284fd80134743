"""How often a SLURM job starts another Ray cluster, and SLURM the job, with a head and drivers that only end.

The processes, the reaper and the files are real; a head does nothing, and a driver commits or not, and exits.
"""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch.ray_cluster.reaper import Reaper
from launch.slurm import node_task
from launch.slurm.control_files import ControlFiles
from launch.slurm.node_task import STOPPED, JobFailed, JobPayload
from pipeline.recipe.file import dump_recipe
from tests.support.small_recipe import small_recipe

JOB = "12"
DEADLINE_S = 30
HEAD = """
import sys, threading
from pathlib import Path
address = Path(sys.argv[1], "ray_current_cluster")
address.parent.mkdir(exist_ok=True)
address.with_suffix(".new").write_text("127.0.0.1:1")
address.with_suffix(".new").rename(address)
threading.Event().wait()
"""
Driver = tuple[int, int | None]
"""(exit code, step of the checkpoint that it commits before)"""


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A node of its own; the leader's handler of SIGTERM is taken back."""
    for name, value in {"SLURM_JOB_ID": JOB, "SLURM_PROCID": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("submitit.JobEnvironment", lambda: SimpleNamespace(hostnames=["n1"]))
    monkeypatch.setattr(node_task, "POLL_S", 0.05)
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def start_job(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *drivers: Driver, limit: int = 1, restart: int = 0
) -> ControlFiles:
    """One start of the job, whose generations have these drivers. Errors: as `JobPayload`; AssertionError for fewer
    generations."""
    slurm = {"nodes": 1, "cpus_per_task": 1, "time": 30, "signal_s": 30}
    recipe = small_recipe(folder, workers={"restarts_without_progress": limit}, slurm=slurm)
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    left, start = list(drivers), node_task._Task._start_child
    started: list[subprocess.Popen[bytes]] = []

    def pretend(task: node_task._Task, reaper: Reaper, *command: str) -> subprocess.Popen[bytes]:
        started.append(start(task, reaper, "-c", *code_of(command, reaper)))
        return started[-1]

    def code_of(command: tuple[str, ...], reaper: Reaper) -> tuple[str, ...]:
        if "launch.slurm.driver_main" not in command:
            return HEAD, str(reaper.ray_folder)
        if not left:
            pytest.fail("a generation too many")
        code, step = left.pop(0)
        if step is not None:
            manifest = folder / "pretrain" / f"step-{step:010d}" / "MANIFEST.json"
            manifest.parent.mkdir(parents=True)
            manifest.touch()
        return (f"raise SystemExit({code})",)

    monkeypatch.setattr(node_task._Task, "_start_child", pretend)
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
    try:
        JobPayload(str(folder), "pretrain", ["pretrain"])()
    finally:
        monkeypatch.setattr(node_task._Task, "_start_child", start)
        for process in started:
            process.wait(DEADLINE_S)  # heads are the reaper's to end
        assert not left, "it gave up too soon"
    return ControlFiles.of(folder, JOB, str(restart))


@pytest.mark.parametrize("limit", [0, 1])
def test_generations_without_progress_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    drivers: list[Driver] = [(1, None)] * (limit + 1)
    words = f"failed {limit + 1} times in a row without a new checkpoint; last: the driver ended with 1; see "
    with pytest.raises(JobFailed, match=words) as caught:
        start_job(tmp_path, monkeypatch, *drivers, limit=limit)
    assert ControlFiles.of(tmp_path, JOB, "0").ended() == {"code": 1, "message": str(caught.value)}


def test_a_new_checkpoint_resets_the_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    control = start_job(tmp_path, monkeypatch, (1, None), (1, 9), (1, None), (0, None))
    assert control.ended() == {"code": 0, "message": ""}
    assert control.address(3) is not None


def test_starts_of_a_job_without_progress_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With none allowed in a start, SLURM may begin the job twice from one checkpoint; a new one counts from none."""
    for restart, step in enumerate((None, 9, None, None)):
        with pytest.raises(JobFailed, match="stopped with a checkpoint before the end of the run"):
            start_job(tmp_path, monkeypatch, (STOPPED, step), limit=0, restart=restart)
        assert ControlFiles.of(tmp_path, JOB, str(restart)).ended() is None
    words = "pretrain was started 2 times without anything new committed; .* python -m launch resume"
    with pytest.raises(JobFailed, match=words) as caught:
        start_job(tmp_path, monkeypatch, limit=0, restart=4)
    assert ControlFiles.of(tmp_path, JOB, "4").ended() == {"code": 1, "message": str(caught.value)}
