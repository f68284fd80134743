"""Whatever a cluster does to a run, it comes back by itself and ends as an undisturbed one, bit for bit."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from launch.slurm import living, read_jobs, submit
from pipeline.recipe import Recipe
from tests.calm import calm_run, new_run
from tests.commands import launch, wait_until
from tests.fault.final_state import differences, final_state
from tests.launch.faults import Victim, as_row
from tests.launch.throttle import FOLDER
from tests.slurm_cluster import SlurmCluster
from tests.small_recipe import small_recipe

SHORT = ("warning", "kill_step", "kill_driver", "kill_worker")
"""One of each way back: submitit's requeue, the batch script's, a new generation, a restart in place. `make soak` does
all kinds, many times."""
STAGES = ["pretrain", "keep-0.1/prune", "keep-0.1/finetune"]
SEED = 20261122
pytestmark = pytest.mark.timeout(1800)


def two_node_recipe(data: Path, pretrain_steps: int = 160) -> Recipe:
    """A pretrain phase long enough to be struck several times; the rest is short. An epoch has 20 steps."""
    short = {"epochs": 2, "lr": 0.05, "weight_decay": 1.0e-4}
    return small_recipe(
        data,
        phases={"pretrain": {**short, "epochs": pretrain_steps // 20, "lr": 0.02}, "prune": short, "finetune": short},
        sparsity={"baselines": []},
        workers={"count": 2, "hang_timeout_s": 20},
        checkpoint={"every_steps": 9, "keep": 2},
        tracking={"log_every_steps": 1},
        slurm={"nodes": 2, "cpus_per_task": 1, "time": 60, "signal_s": 30},
    )


def job_of(folder: Path, group: str) -> str:
    return [job.id for job in read_jobs(folder) if job.group == group][-1]


@pytest.fixture(scope="module")
def undisturbed(fashion_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same recipe, left alone."""
    return final_state(calm_run(tmp_path_factory.mktemp("calm") / "run", two_node_recipe(fashion_data)), STAGES)


def test_faults_are_survived(
    slurm_cluster: SlurmCluster, fashion_data: Path, tmp_path: Path, undisturbed: dict[str, Any], monkeypatch: Any
) -> None:
    """One run: preempted without warning, cancelled, resumed, struck in turn at random steps, and left to end."""
    monkeypatch.setenv(FOLDER, str(tmp_path))
    cluster = slurm_cluster
    folder = new_run(tmp_path / "runs" / "struck", two_node_recipe(fashion_data))
    cluster.set_warning(False)
    submit(folder, observer="tests.launch.throttle:slow")
    chance = random.Random(SEED)
    outcomes = [_strike(cluster, folder, "unwarned_preemption", chance)]
    assert launch(tmp_path, "cancel", str(folder)).code == 0
    wait_until(lambda: not living(read_jobs(folder)), 60, "the end of all jobs")
    cluster.set_warning(True)
    submit(folder, observer="tests.launch.throttle:slow")
    kinds = list(SHORT)
    chance.shuffle(kinds)
    for kind in kinds:
        outcomes.append(_strike(cluster, folder, kind, chance))
    print(json.dumps([as_row(outcome) for outcome in outcomes], indent=1))
    (tmp_path / "full-speed").touch()
    wait_until(lambda: not living(read_jobs(folder)), 400, "the end of all jobs")
    assert cluster.job_state(job_of(folder, "report")) == "COMPLETED"
    assert (folder / "report" / "robust_accuracy.png").exists()
    said = launch(tmp_path, "status", str(folder)).out
    assert "finished, 3 of 3 stages finished" in said, said
    assert differences(undisturbed, final_state(folder, STAGES)) == []
    wait_until(lambda: not _left(cluster), 30, "the end of all that the jobs started")


def _strike(cluster: SlurmCluster, folder: Path, kind: str, chance: random.Random) -> Any:
    victim = Victim(cluster, folder, job_of(folder, "pretrain"), "pretrain")
    victim.wait_for_step(victim.step() + chance.randint(2, 8))
    return victim.strike(kind, chance.randrange(4))


def _left(cluster: SlurmCluster) -> list[str]:
    return [p.name() for p in cluster.processes() if "ray" in p.name() or "launch.drive" in " ".join(p.cmdline())]


def test_sparsities_run_side_by_side_and_a_report_ends_the_run(
    slurm: SlurmCluster, fashion_data: Path, tmp_path: Path
) -> None:
    """Fan-out over three sparsities, from the command line, on one node each."""
    recipe = small_recipe(
        fashion_data,
        phases={phase: {"epochs": 1, "lr": 0.05} for phase in ("pretrain", "prune", "finetune")},
        sparsity={"keep_fractions": [0.5, 0.1, 0.05], "baselines": []},
        slurm={"nodes": 1, "cpus_per_task": 1, "time": 30, "signal_s": 30, "parallel_jobs": 2},
    )
    folder = new_run(tmp_path / "runs" / "fan", recipe)
    done = launch(tmp_path, "resume", "fan", "--on", "slurm")
    assert done.code == 0, done.err
    array = [job.id for job in read_jobs(folder) if job.group.startswith("keep")]
    assert len({job.partition("_")[0] for job in array}) == 1
    assert len(array) == 3
    assert launch(tmp_path, "resume", "fan").code == 0
    assert len(read_jobs(folder)) == 5, "what is queued already was submitted again"
    wait_until(lambda: not living(read_jobs(folder)), 400, "the end of all jobs")
    assert "finished, 7 of 7 stages finished" in launch(tmp_path, "status", "fan").out
    assert len((folder / "report" / "robust_accuracy.csv").read_text().splitlines()) == 1 + 4
