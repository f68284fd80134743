"""After any fault of a cluster, a run recovers by itself and ends bitwise equal to an undisturbed one."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.slurm.submit import active_jobs, read_jobs
from pipeline.recipe.schema import Recipe
from tests.fault.final_state import unlike
from tests.slurm.faults import KINDS, as_row
from tests.slurm.soak import drawn
from tests.slurm.struck import cancel, job_of, strike_in_turn, two_node_recipe
from tests.slurm.throttle import FOLDER
from tests.support.commands import launch, wait_until
from tests.support.slurm_cluster import SlurmCluster
from tests.support.undisturbed_run import new_run

SEED = 20261122
WORKERS_AND_STEPS = ("unwarned_preemption", "kill_worker", "stop_worker", "kill_step", "kill_driver")
NODES_AND_JOBS = ("warning", "preemption", "time_limit", "node_down", "kill_raylet", "kill_head")
"""Kinds of faults, in two halves that take the same time: a run each."""
pytestmark = pytest.mark.timeout(1800)


def test_all_kinds_of_faults_strike() -> None:
    assert {*WORKERS_AND_STEPS, *NODES_AND_JOBS, "requeue"} == set(KINDS)  # that test_races has


@pytest.mark.parametrize("count", [0, 1, 8, 12, 13, 50])
def test_the_soak_draws_any_number_of_faults(count: int) -> None:
    kinds = drawn(count, seed=1)
    assert len(kinds) == count
    assert all(kinds.count(kind) - count // len(KINDS) in (0, 1) for kind in KINDS)


@pytest.mark.parametrize(
    ("kinds", "keep_fractions"),
    [(WORKERS_AND_STEPS, (0.1,)), (NODES_AND_JOBS, (0.5, 0.1))],
    ids=["workers and steps", "nodes and jobs"],
)
def test_faults_are_survived(
    slurm_cluster: SlurmCluster,
    fashion_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: Callable[[Recipe], Path],
    kinds: tuple[str, ...],
    keep_fractions: tuple[float, ...],
) -> None:
    """Two runs are struck by every kind of fault at random steps; then the sparsities, two at a time, and a report."""
    monkeypatch.setenv(FOLDER, str(tmp_path))
    chance = random.Random(SEED)
    order = chance.sample(kinds, len(kinds))
    recipe = two_node_recipe(fashion_data, len(kinds), keep_fractions)
    folder = new_run(tmp_path / "runs" / "struck", recipe)
    for outcome in strike_in_turn(slurm_cluster, folder, order, chance):
        print(json.dumps(as_row(outcome)))
    (tmp_path / "full-speed").touch()
    wait_until(lambda: not active_jobs(read_jobs(folder)), 600, "the end of all jobs")
    assert slurm_cluster.job_state(job_of(folder, "report")) == "COMPLETED"
    assert (folder / "report" / "robust_accuracy.png").exists()
    assert len((folder / "report" / "robust_accuracy.csv").read_text().splitlines()) == 2 + len(keep_fractions)
    status = launch(tmp_path, "status", str(folder)).out
    stages = 1 + 2 * len(keep_fractions)
    assert f"finished, {stages} of {stages} stages finished" in status, status
    assert unlike(recipe, undisturbed(recipe), folder) == []
    wait_until(lambda: not _left(slurm_cluster), 30, "the end of all that the jobs started")


def _left(cluster: SlurmCluster) -> list[str]:
    return [
        p.name()
        for p in cluster.processes()
        if "ray" in p.name() or "launch.slurm.driver_main" in " ".join(p.cmdline())
    ]


def test_the_command_line_submits_a_run_once(slurm: SlurmCluster, fashion_data: Path, tmp_path: Path) -> None:
    """After another job pretrain, once that is done an array of three sparsities, two at a time, and a report."""
    folder = new_run(tmp_path / "runs" / "fan", two_node_recipe(fashion_data, 1))
    refused = launch(tmp_path, "resume", "fan", "--on", "local", "--after", "1")
    assert (refused.code, "add --on slurm" in refused.err) == (2, True)
    before = slurm.submit("--hold", "--output=/dev/null", "--wrap=true")
    done = launch(tmp_path, "resume", "fan", "--on", "slurm", "--after", before)
    assert done.code == 0, done.err
    jobs = read_jobs(folder)
    assert launch(tmp_path, "resume", "fan").code == 0
    assert read_jobs(folder) == jobs, "what is queued already was submitted again"
    assert [job.job_name for job in jobs] == ["pretrain", "keep-0.5", "keep-0.1", "keep-0.05", "report"]
    array = jobs[1].id.partition("_")[0]
    assert [job.id for job in jobs[1:4]] == [f"{array}_{task}" for task in range(3)]
    queued = slurm.client("squeue", "-h", "-o", "%i|%E").splitlines()
    assert f"{jobs[0].id}|afterany:{before}(unfulfilled)" in queued, queued
    assert f"{array}_[0-2%2]|afterok:{jobs[0].id}(unfulfilled)" in queued, queued
    cancel(folder)
