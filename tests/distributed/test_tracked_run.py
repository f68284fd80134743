"""Two stages as they are really trained, stopped twice on the way: mask drift repeats, and wandb has each row once."""

from __future__ import annotations

import socket
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from pipeline.distributed import Group
from pipeline.models.pruning.topk import kept_count, topk_mask
from pipeline.recipe.file import dump_recipe
from pipeline.recipe.schema import Recipe
from pipeline.recipe.stages import stages_of
from pipeline.run import checkpoint
from pipeline.run.files import atomic_write_text, read_rows
from pipeline.run.layout import is_done
from pipeline.run.lease import Leases
from pipeline.run.stop import StopRequested
from pipeline.run.tracking.metrics import PARTS
from pipeline.training.context import RunContext
from pipeline.training.stage import run_stages
from tests.support.processes import run_group
from tests.support.small_recipe import small_recipe
from tests.support.wandb_files import recorded

STEPS = 12
PRUNE = "keep-0.1/prune"
STOPS = {PRUNE: [5, 10]}
"""Steps before whose end the run gets a stop request; rows are written every 3 and at the end of an epoch, 6."""


def _run(group: Group, recipe: Recipe, folder: Path, token: str, stops: dict[str, list[int]]) -> None:
    at: dict[str, Any] = {"stage": None, "step": 0}
    left = {stage: list(steps) for stage, steps in stops.items()}

    def observe(event: str, facts: dict[str, Any]) -> None:
        if event == "step":
            at.update(facts)

    def stop_requested() -> bool:
        steps = left.get(at["stage"], [])
        if steps and at["step"] >= steps[0] - 1:
            steps.pop(0)
            return True
        return False

    stages = stages_of(recipe)[:2]
    while not all(is_done(folder, stage) and (folder / stage.name / "result.json").exists() for stage in stages):
        try:
            run_stages(RunContext(recipe, folder, token, group, observe, stop_requested), stages)
        except StopRequested:
            at.update(stage=None, step=0)


def _all(group: Group, recipe: Recipe, jobs: list[tuple[Path, str, dict[str, list[int]]]]) -> None:
    for folder, token, stops in jobs:
        _run(group, recipe, folder, token, stops)


def _recipe(data: Path, wandb: str) -> Recipe:
    phase = {"epochs": 2, "lr": 0.05, "weight_decay": 1.0e-4}
    return small_recipe(
        data,
        phases={"pretrain": phase, "prune": {**phase, "lr": 0.5}, "finetune": phase},
        batch={"batch_per_step": 16, "micro_batch": 8},
        data={"train_images": 16 * STEPS // 2, "validation_images": 50},
        evaluation={"images": 20, "chunk": 50, "steps": 1, "honesty_images": 0},
        checkpoint={"every_steps": 7, "keep": 9},
        tracking={"log_every_steps": 3, "wandb": wandb},
        sparsity={"baselines": []},
    )


@pytest.fixture(scope="module")
def runs(fashion_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with straight/ and stopped/."""
    root, recipe = tmp_path_factory.mktemp("tracked"), _recipe(fashion_data, "offline")
    jobs, leases = [], []
    for name, stops in (("straight", {}), ("stopped", STOPS)):
        (root / name).mkdir()
        atomic_write_text(root / name / "recipe.yaml", dump_recipe(recipe))
        leases.append(Leases([root / name / stage.name for stage in stages_of(recipe)[:2]]))
        jobs.append((root / name, leases[-1].token, stops))
    try:
        run_group(1, _all, recipe, jobs)
    finally:
        for lease in leases:
            lease.release()
    return root


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in row.items() if key != "timing"} for row in read_rows(folder / "metrics.jsonl")
    ]


def masks_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    scores = {name: score for name, score in state.items() if name.startswith("score/")}
    return {name: topk_mask(score, kept_count(score.numel(), Decimal("0.1"))) for name, score in scores.items()}


def test_stopped_runs_have_the_rows_of_straight_ones(runs: Path) -> None:
    for stage in ("pretrain", PRUNE):
        straight, stopped = (rows_of(runs / name / stage) for name in ("straight", "stopped"))
        assert [row["step"] for row in straight if row["kind"] == "train"] == [3, 6, 9, 12]
        assert straight == stopped
    assert all("mask_drift" not in row for row in rows_of(runs / "straight" / "pretrain"))
    assert checkpoint.steps_on_disk(runs / "stopped" / PRUNE) == [5, 7, 10, 12]


def test_drift_is_that_of_the_masks(runs: Path) -> None:
    """At the last row, against the masks of the phase's initial weights."""
    drifts = [row["mask_drift"] for row in rows_of(runs / "straight" / PRUNE) if row["kind"] == "train"]
    assert drifts[0]["since_start"] == drifts[0]["since_row"] > 0
    assert all(0 <= drift["since_row"] < 1 for drift in drifts)
    first = checkpoint.read_checkpoint(checkpoint.folder_of(runs / "straight" / "pretrain", STEPS)).model
    ended = checkpoint.read_checkpoint(checkpoint.folder_of(runs / "straight" / PRUNE, STEPS)).model
    # scaled scores rank as the weights do
    weights = {_score(name): tensor for name, tensor in first.items()}
    start, end = masks_of({name: tensor for name, tensor in weights.items() if name in ended}), masks_of(ended)
    gone = sum(int((start[name] & ~end[name]).sum()) for name in end)
    assert drifts[-1]["since_start"] == pytest.approx(gone / sum(int(mask.sum()) for mask in end.values()))


def _score(name: str) -> str:
    return name.replace("weight/", "score/")


def test_rows_tell_where_their_time_went(runs: Path) -> None:
    """In parts that add up to it; the checkpoint of step 7 is in the row of step 9."""
    rows = [row for row in read_rows(runs / "straight" / "pretrain" / "metrics.jsonl") if row["kind"] == "train"]
    for row in rows:
        spent = row["timing"]["seconds_in"]
        assert set(spent) == set(PARTS)
        assert sum(spent.values()) == pytest.approx(row["timing"]["seconds"])
        assert min(spent["data"], spent["attack"], spent["update"]) > 0
    assert [row["step"] for row in rows if row["timing"]["seconds_in"]["checkpoint"] > 0] == [9]
    (start,) = recorded(runs / "straight" / "pretrain")
    for row in (row for row in start.rows if "train/loss" in row):
        assert all(f"train/timing/seconds_in/{part}" in row for part in PARTS)
        assert 0 < row["system/node-0/memory_percent"] <= 100


def test_wandb_has_each_row_once(runs: Path) -> None:
    for name in ("straight", "stopped"):
        for stage in ("pretrain", PRUNE):
            starts = recorded(runs / name / stage)
            rows = [row for start in starts for row in start.rows]
            file = rows_of(runs / name / stage)
            assert [row["_step"] for row in rows] == list(range(len(file)))
            assert [row["global_step"] for row in rows] == [row["step"] for row in file]
            assert [row["images_seen"] for row in rows] == [16 * row["step"] for row in file]
            assert len({start.run_id for start in starts}) == 1
    starts = recorded(runs / "stopped" / PRUNE)
    assert [[title for title, *_ in start.alerts] for start in starts] == [["Run stopped"], ["Run stopped"], []]
    (pretrained,) = recorded(runs / "straight" / "pretrain")
    assert {"robust_accuracy", "clean_accuracy", "sparsity", "method"} <= set(pretrained.summary)
    assert pretrained.config["stage"]["parent"] is None
    assert starts[0].config["stage"]["parent"] == "pretrain"


def test_a_run_whose_network_is_gone_ends_as_ever(
    runs: Path, fashion_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody listens at wandb's address."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{unused.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
        recipe = _recipe(fashion_data, "online")
        atomic_write_text(tmp_path / "recipe.yaml", dump_recipe(recipe))
        leases = Leases([tmp_path / stage.name for stage in stages_of(recipe)[:2]])
        try:
            run_group(1, _all, recipe, [(tmp_path, leases.token, {})])
        finally:
            leases.release()
    for stage in ("pretrain", PRUNE):
        assert rows_of(tmp_path / stage) == rows_of(runs / "straight" / stage)
