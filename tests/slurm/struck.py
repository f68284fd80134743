"""A run of all stages that suffers faults in turn, each during a step or a save."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from launch.slurm.submit import active_jobs, read_jobs, submit_run
from pipeline.recipe.schema import Recipe
from tests.slurm.faults import RECOVERY_S, Outcome, Victim
from tests.support.commands import launch, wait_until
from tests.support.slurm_cluster import SlurmCluster
from tests.support.small_recipe import small_recipe

OBSERVER = "tests.slurm.throttle:slow"
UNWARNED = "unwarned_preemption"
STEPS_PER_FAULT = 20
"""Room for the steps between two faults; more than are needed are computed at full speed in the end."""
WITHOUT_PROGRESS = 2
"""Faults in a row that the run is let recover from without a checkpoint in between."""


def two_node_recipe(data: Path, faults: int, keep_fractions: Sequence[float] = (0.5, 0.1, 0.05)) -> Recipe:
    """A pretrain phase that is long enough for so many faults, and the sparsities after it. An epoch has 20 steps."""
    short = {"epochs": 1, "lr": 0.05, "weight_decay": 1.0e-4}
    epochs = -(-faults * STEPS_PER_FAULT // 20)
    return small_recipe(
        data,
        phases={"pretrain": {**short, "epochs": epochs, "lr": 0.02}, "prune": short, "finetune": short},
        sparsity={"keep_fractions": [*keep_fractions], "baselines": []},
        data={"train_images": 640, "validation_images": 100},
        batch={"batch_per_step": 32, "micro_batch": 16},
        evaluation={"images": 200, "chunk": 50},
        workers={"count": 2, "hang_timeout_s": 20},
        checkpoint={"every_steps": 9, "keep": 2},
        tracking={"log_every_steps": 1},
        slurm={"nodes": 2, "cpus_per_task": 1, "time": 60, "signal_s": 30, "parallel_jobs": 2},
    )


def job_of(folder: Path, group: str) -> str:
    return [job.id for job in read_jobs(folder) if job.job_name == group][-1]


def strike_in_turn(
    cluster: SlurmCluster, folder: Path, kinds: Sequence[str], chance: random.Random
) -> Iterator[Outcome]:
    """Submit the run, inflict each fault at a random step, and leave the run training.

    Kinds that need the cluster's warnings off come first: the cluster is set to it while no job runs.
    """
    outcomes: list[Outcome] = []
    cluster.set_warning(UNWARNED not in kinds)
    victim = _started(cluster, folder)
    for kind in sorted(kinds, key=lambda kind: kind != UNWARNED):
        if kind != UNWARNED and not cluster.warns:
            cancel(folder)
            cluster.set_warning(True)
            victim = _started(cluster, folder)
        _let_it_progress(victim, outcomes)
        victim.wait_for_step(victim.step() + chance.randint(2, 8))
        place = chance.choice(["step", "step", "save"])
        outcomes.append(victim.strike(kind, chance.randrange(4), place))
        yield outcomes[-1]


def cancel(folder: Path) -> None:
    """By the command line, and waited for."""
    done = launch(folder.parent.parent, "cancel", str(folder))
    assert done.code == 0, done.err
    wait_until(lambda: not active_jobs(read_jobs(folder)), 60, "the end of all jobs")


def _started(cluster: SlurmCluster, folder: Path) -> Victim:
    submit_run(folder, observer=OBSERVER)
    return Victim(cluster, folder, job_of(folder, "pretrain"), "pretrain")


def _let_it_progress(victim: Victim, outcomes: Sequence[Outcome]) -> None:
    """A run that never gets from one checkpoint to the next gives up, as it should; so it is not struck for ever."""
    held = [outcome.resumed_from == victim.checkpoint() for outcome in outcomes[-WITHOUT_PROGRESS:]]
    if len(held) == WITHOUT_PROGRESS and all(held):
        before = victim.checkpoint()
        wait_until(lambda: victim.checkpoint() > before, RECOVERY_S, f"a checkpoint after step {before}")
