"""Messages about the nodes of a job: those that do not start, by name, and unused workers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from launch import run_folder
from launch.ray_cluster import connect as connect_module
from launch.slurm import driver_main, joined_cluster, node_task
from launch.slurm.control_files import ControlFiles, JobFailed
from launch.slurm.node_task import JobPayload
from launch.slurm.nodes import node_advice, unused_workers
from pipeline.recipe.schema import Recipe
from pipeline.recipe.slurm import Slurm
from pipeline.training.driver import Connect, RunRequest
from tests.support.small_recipe import small_recipe

SLURM = {"nodes": 3, "cpus_per_task": 1, "time": 30, "signal_s": 30, "node_start_s": 10, "exclude": "n9"}
EXCLUDE_N2 = "check n2, or repeat the `run` command with slurm.exclude=n9,n2"


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """Four micro-batches a step, three nodes of one worker each."""
    return small_recipe(tmp_path, slurm=SLURM)


@pytest.fixture
def start(tmp_path: Path) -> ControlFiles:
    control = ControlFiles.of(tmp_path, "12", "0")
    control.create()
    return control


def test_unused_workers_are_reported(recipe: Recipe) -> None:
    note = unused_workers(recipe, 3)
    assert note == "3 nodes: using 2 of 3 workers; legal: 1, 2, 4 (they share the 4 micro-batches of a step)"
    assert [nodes for nodes in range(1, 6) if unused_workers(recipe, nodes) is None] == [1, 2, 4]


def test_nodes_named_in_the_advice_join_those_already_excluded() -> None:
    assert node_advice(["n1", "n2"], Slurm()).endswith("slurm.exclude=n1,n2")
    assert node_advice(["n2"], Slurm(exclude="n9")) == EXCLUDE_N2


def test_nodes_that_do_not_join_ray_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connect_module.ray, "cluster_resources", lambda: {"node_0": 1.0, "node_2": 1.0})
    slurm = Slurm(**SLURM).model_copy(update={"node_start_s": 0})
    with pytest.raises(
        joined_cluster.NodesMissing, match=re.escape("of 3 nodes, n2 did not join Ray in 0 s; " + EXCLUDE_N2)
    ):
        joined_cluster._wait_for_nodes(["n1", "n2", "n3"], slurm)


def test_the_driver_says_why_it_ended_and_which_workers_are_left_out(
    recipe: Recipe, start: ControlFiles, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def joined(
        recipe: Recipe, control: ControlFiles, generation: int, hosts: Sequence[str]
    ) -> AbstractContextManager[None]:
        raise joined_cluster.NodesMissing(f"{hosts[1]} is missing in {generation}")

    def run(order: RunRequest, connect: Connect) -> None:
        connect(recipe)

    monkeypatch.setattr(driver_main, "joined_cluster", joined)
    monkeypatch.setattr(driver_main, "run_and_show", run)
    options = ["--stages", "pretrain", "--control", str(start.folder), "--generation", "1", "--hosts", "n1,n2,n3"]
    assert driver_main.main([str(start.folder.parent), *options]) == 1
    assert (start.failure(0), start.failure(1)) == (None, "n2 is missing in 1")
    assert "using 2 of 3 workers" in capsys.readouterr().err
    assert start.ended() is None, "another attempt may find the node"


class Follower:
    """The task of n2 in a job on n1, n2 and n3."""

    def __init__(self, folder: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
        run_folder.write_run_folder(folder, recipe, {})
        for name, value in {
            "SUBMITIT_EXECUTOR": "slurm",
            "SLURM_JOB_ID": "12",
            "SLURM_JOB_NODELIST": "n[1-3]",
            "SLURM_PROCID": "1",
        }.items():
            monkeypatch.setenv(name, value)
        self.task = node_task._Task(JobPayload(str(folder), "pretrain", ["pretrain"]))
        monkeypatch.setattr(self.task, "_wait", lambda condition, deadline_s: False)


@pytest.mark.parametrize("counted", [False, True])
def test_a_first_node_that_does_not_come_is_named_by_the_others(
    recipe: Recipe, start: ControlFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: bool
) -> None:
    """If it never started, the job is not requeued, and `status` must show why."""
    follower = Follower(tmp_path, recipe, monkeypatch)
    if counted:
        start.mark_counted()
    with pytest.raises(JobFailed, match="n1, the first node, did not start Ray in 10 s; check n1, or repeat") as caught:
        follower.task._follow()
    assert start.ended() == (None if counted else {"code": 1, "message": str(caught.value)})


def test_a_silent_node_is_named(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    follower = Follower(tmp_path, recipe, monkeypatch)
    assert follower.task._silence_message([1]) == f"no heartbeat from n2 for 600 s; {EXCLUDE_N2}"
