"""A run resumes on another number of nodes, with the same images and noise; and it has one writer."""

from __future__ import annotations

import json
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from launch import run_folder
from launch.slurm.control_files import StartLog
from launch.slurm.submit import submit_run
from pipeline.recipe.schema import Recipe
from pipeline.run.files import read_json
from tests.slurm.faults import Victim
from tests.slurm.struck import cancel, job_of
from tests.slurm.throttle import FOLDER, SLOWLY
from tests.support.commands import Command, launch, wait_until
from tests.support.slurm_cluster import SlurmCluster
from tests.support.small_recipe import small_recipe, small_values
from tests.support.undisturbed_run import calm_run, finish

pytestmark = pytest.mark.timeout(900)
FED = "tests.slurm.record:fed"
EPOCHS, STEPS_PER_EPOCH, BATCH = 5, 20, 64
NODES = {"1-2": 2, "1-3": 1, "1-4": 4}
"""What is asked for, and what there is."""


def recipe_on(data: Path, place: Path, nodes: str) -> Recipe:
    """Trains on noisy images: what the network is fed does not depend on its weights, so that it can be compared."""
    phase = {"epochs": 1, "lr": 0.05}
    return small_recipe(
        data,
        threat_model={"norm": "l2", "eps": 0.25},
        objective={"name": "noise", "sigma": 0.25},
        evaluation={"steps": 1, "step_size": None, "images": 200, "n0": 10, "n": 100},
        phases={"pretrain": {"epochs": EPOCHS, "lr": 0.05}, "prune": phase, "finetune": phase},
        data={**small_values(data)["data"], "stage_to": str(place / "local")},
        sparsity={"baselines": []},
        checkpoint={"every_steps": 5, "keep": 2},
        tracking={"log_every_steps": 1},
        slurm={
            **{"nodes": nodes, "cpus_per_task": 1, "time": 30, "signal_s": 30, "account": "tests", "qos": "normal"},
            "setup": [f"echo $SLURM_JOB_ID $SLURM_JOB_NUM_NODES >> {place}/set-up"],
        },
    )


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """Of pretrain. A line that a killed worker did not finish is left out."""
    lines = [line for path in folder.glob("fed-*.jsonl") for line in path.read_text().splitlines(keepends=True)]
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return [row for row in rows if row["stage"] == "pretrain"]


def test_two_then_one_then_four_nodes_and_back(
    slurm: SlurmCluster, fashion_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many of a range as are idle, then back to one worker without SLURM and Ray, which finishes the run. Data is
    copied to the nodes; the run is watched meanwhile."""
    monkeypatch.setenv(FOLDER, str(tmp_path))
    folder = tmp_path / "runs" / "elastic"
    jobs: list[str] = []
    for nodes, count in NODES.items():
        recipe = recipe_on(fashion_data, tmp_path, nodes)
        run_folder.write_run_folder(folder, recipe, run_folder.check_data(recipe))
        with _others_on(slurm, 3 if count == 1 else 0):
            submit_run(folder, observer=FED)
            jobs.append(job_of(folder, "pretrain"))
            victim = Victim(slurm, folder, jobs[-1], "pretrain")
            victim.wait_for_step(victim.step() + 8)
            (tmp_path / SLOWLY).touch()  # the stage must not be finished before it is cancelled
            if len(jobs) == 1:
                _refuses_others(folder)
                _can_be_watched(folder, jobs[0])
            cancel(folder)
            (tmp_path / SLOWLY).unlink()
    assert (tmp_path / "set-up").read_text().splitlines() == [
        f"{job} {count}" for job, count in zip(jobs, NODES.values(), strict=True)
    ]
    assert [path.name[:6] for path in (tmp_path / "local").glob("hydra-*/*.beton")] == ["train-"]
    (tmp_path / "full-speed").touch()
    recipe = recipe_on(fashion_data, tmp_path, "1")
    run_folder.write_run_folder(folder, recipe, run_folder.check_data(recipe))
    finish(folder, recipe, FED)

    starts = [start["nodes"] for start in StartLog.of(folder).read() if start["group"] == "pretrain"]
    assert starts == list(NODES.values())
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


@contextmanager
def _others_on(slurm: SlurmCluster, nodes: int) -> Iterator[None]:
    """This many nodes are taken by another job."""
    wish = ("--partition=high", f"--nodes={nodes}", "--exclusive", "--output=/dev/null", "--wrap=sleep 600")
    others = [slurm.submit(*wish)] if nodes else []
    for other in others:
        slurm.wait_for_state(other, "RUNNING")
    yield
    for other in others:
        slurm.client("scancel", other)
        slurm.wait_for_state(other, "CANCELLED")


def _can_be_watched(folder: Path, job: str) -> None:
    """By `status` and `logs -f`, while the job trains."""
    place = folder.parent.parent
    status = launch(place, "status", "elastic").out
    row = next(line for line in status.splitlines() if line.startswith("pretrain ")).split()
    assert "elastic: running, 0 of 3 stages finished" in status
    assert (row[1], row[-3:]) == ("training", [job, "RUNNING", "0"])
    logs = Command(place, "logs", "elastic", "-f", "-n", "1")
    wait_until(lambda: "/logs/worker-1.log <==" in logs.output(), 60, "the logs of both workers")
    output = logs.output()
    wait_until(lambda: len(logs.output()) > len(output), 60, "what is logged meanwhile")
    logs.signal(signal.SIGINT)
    assert logs.finish(60).code == 0
    assert f"/jobs/{job}_0_log.err <==" in logs.output()


def _refuses_others(folder: Path) -> None:
    """While the job trains, a second writer is refused by name."""
    done = launch(folder.parent.parent, "resume", str(folder), "--on", "local")
    assert done.code == 2
    assert "pretrain is being written by pid" in done.err
