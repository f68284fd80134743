"""A run goes on with another number of nodes, on the same images with the same noise; and it has one writer."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from launch import run_folder
from launch.control import Starts
from launch.slurm import submit
from pipeline.files import read_json
from pipeline.recipe import Recipe
from tests.calm import calm_run, finish
from tests.commands import launch
from tests.launch.faults import Victim
from tests.launch.record import fed
from tests.launch.struck import cancel, job_of
from tests.launch.throttle import FOLDER
from tests.slurm_cluster import SlurmCluster
from tests.small_recipe import small_recipe

pytestmark = pytest.mark.timeout(900)
EPOCHS, STEPS_PER_EPOCH, BATCH = 5, 20, 64
NODES = (2, 1, 4)


def recipe_on(data: Path, nodes: int) -> Recipe:
    """Trains on noisy images: what the network is fed does not depend on its weights, so that it can be compared."""
    phase = {"epochs": 1, "lr": 0.05}
    return small_recipe(
        data,
        threat_model={"norm": "l2", "eps": 0.25},
        objective={"name": "noise", "steps": 1, "step_size": None, "sigma": 0.25},
        evaluation={"steps": 1, "step_size": None, "images": 400, "n0": 10, "n": 100},
        phases={"pretrain": {"epochs": EPOCHS, "lr": 0.05}, "prune": phase, "finetune": phase},
        sparsity={"baselines": []},
        checkpoint={"every_steps": 5, "keep": 2},
        tracking={"log_every_steps": 1},
        slurm={"nodes": nodes, "cpus_per_task": 1, "time": 30, "signal_s": 30},
    )


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """Of pretrain. A line that a killed worker did not finish is left out."""
    lines = [line for path in folder.glob("fed-*.jsonl") for line in path.read_text().splitlines(keepends=True)]
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return [row for row in rows if row["stage"] == "pretrain"]


def test_two_then_one_then_four_nodes_and_back(
    slurm: SlurmCluster, fashion_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Back to one worker, without SLURM and without Ray, which finishes the run."""
    monkeypatch.setenv(FOLDER, str(tmp_path))
    folder = tmp_path / "runs" / "elastic"
    for number, nodes in enumerate(NODES):
        recipe = recipe_on(fashion_data, nodes)
        run_folder.write(folder, recipe, run_folder.check_data(recipe))
        submit(folder, observer="tests.launch.record:fed")
        victim = Victim(slurm, folder, job_of(folder, "pretrain"), "pretrain")
        victim.wait_for_step(victim.step() + 8)
        if number == 0:
            _refuses_others(folder)
        cancel(folder)
    (tmp_path / "full-speed").touch()
    recipe = recipe_on(fashion_data, 1)
    run_folder.write(folder, recipe, run_folder.check_data(recipe))
    finish(folder, recipe, fed)

    starts = [start["nodes"] for start in Starts.of(folder).read() if start["group"] == "pretrain"]
    assert tuple(starts) == NODES
    rows = rows_of(tmp_path)
    assert {row["world"] for row in rows} == {1, 2, 4}
    seen: dict[int, dict[str, str]] = {}
    times: Counter[tuple[int, str]] = Counter()
    for row in rows:  # a step that was computed twice, on two numbers of workers, must have had the same noisy images
        step = seen.setdefault(row["step"], {})
        for image, content in row["images"].items():
            assert step.setdefault(image, content) == content, f"step {row['step']}, sample {image}"
            times[row["step"], image] += 1
    assert sorted(seen) == list(range(EPOCHS * STEPS_PER_EPOCH))
    assert {len(images) for images in seen.values()} == {BATCH}
    assert max(times.values()) > 1
    for epoch in range(EPOCHS):  # and an epoch shows every image once
        steps = [set(seen[epoch * STEPS_PER_EPOCH + step]) for step in range(STEPS_PER_EPOCH)]
        assert len(set.union(*steps)) == STEPS_PER_EPOCH * BATCH
    noisy = [content for images in seen.values() for content in images.values()]
    assert len(set(noisy)) == len(noisy), "the same noise in two epochs"

    calm = calm_run(tmp_path / "runs" / "calm", recipe)
    for stage in ("pretrain", "keep-0.1/finetune"):
        ours, undisturbed = (
            read_json(run / stage / "evaluate" / "certified.json")["robust_accuracy"] for run in (folder, calm)
        )
        assert undisturbed["low"] <= ours["value"] <= undisturbed["high"]


def _refuses_others(folder: Path) -> None:
    """While the job trains, a second writer is refused by name."""
    done = launch(folder.parent.parent, "resume", str(folder), "--on", "local")
    assert done.code == 2
    assert "pretrain is being written by pid" in done.err
