"""Catastrophic overfitting: back to the last good epoch's end, on with a stronger attack, and exactly so after a crash.

The verdict is set, so that it falls in the same epochs on every machine: one-step training overfits in its third epoch
and PGD of two steps in the fourth. All else is real.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from pipeline.distributed import Group
from pipeline.recipe.file import dump_recipe
from pipeline.recipe.schema import Recipe
from pipeline.recipe.stages import stages_of
from pipeline.robustness.objectives import Objective, build_objective
from pipeline.robustness.overfitting import STRONGEST, StillOverfitting
from pipeline.run import checkpoint
from pipeline.run.files import atomic_write_text, read_rows
from pipeline.run.lease import Leases
from pipeline.run.stop import StopRequested
from pipeline.training.context import RunContext
from pipeline.training.stage import run_stages
from tests.fault.final_state import differences
from tests.support.processes import run_group
from tests.support.small_recipe import small_recipe

EPOCHS, PER_EPOCH, HELD_OUT = 5, 10, 100
OVERFITTED = {(0, 3), (1, 4)}
"""(level, epoch) at whose end training is taken for overfitted."""
BACK = [("rolled_back", 3 * PER_EPOCH, 1), ("rolled_back", 4 * PER_EPOCH, 2)]
Events = list[tuple[str, int, int]]


class Crash(RuntimeError):
    """A worker ends at once."""


class Watch:
    """One run: its events, its disturbances, and the counts on its held-out images."""

    def __init__(self, overfitted: Callable[[int, int], bool], plans: list[str]) -> None:
        self.events: Events = []
        self._overfitted, self._plans = overfitted, plans
        self._step = self._level = 0
        self._since: int | None = None  # steps since it went back

    def observe(self, event: str, facts: dict[str, Any]) -> None:
        if event == "rolled_back":
            self.events.append((event, facts["step"], facts["level"]))
            self._since = 0
        elif event == "step":
            self._step = facts["step"]
            self._since = None if self._since is None else self._since + 1
            if self._plans[:1] == ["crash"] and self._since == 1:
                self._plans.pop(0)
                self.events.append(("crash", self._step, self._level))
                self._since = None
                raise Crash

    def stop_requested(self) -> bool:
        return self._plans[:1] == ["stop"] and self._since is not None and self._since >= 5

    def stopped(self) -> None:
        self._plans.pop(0)
        self.events.append(("stop", self._step, self._level))

    def build(self, *arguments: Any) -> Objective:
        self._level = arguments[3]
        return build_objective(*arguments)

    def overfits(self, pgd: int, one_step: int, smallest: float) -> bool:
        assert 0 <= pgd <= HELD_OUT
        assert 0 < one_step <= HELD_OUT
        return self._overfitted(self._level, self._step // PER_EPOCH)


def _run(group: Group, recipe: Recipe, folder: Path, token: str, watch: Watch) -> Events:
    """Pretrain, restarting after each interruption."""
    with (
        mock.patch("pipeline.training.stage.build_objective", watch.build),
        mock.patch("pipeline.training.loop.overfits", watch.overfits),
    ):
        while True:
            context = RunContext(recipe, folder, token, group, watch.observe, watch.stop_requested)
            try:
                run_stages(context, stages_of(recipe)[:1])
                return watch.events
            except Crash:
                pass
            except StopRequested:
                watch.stopped()


def _all(group: Group, jobs: list[tuple[Recipe, Path, str]]) -> tuple[Events, Events, Events, str]:
    def overfitted(level: int, epoch: int) -> bool:
        return (level, epoch) in OVERFITTED

    straight = _run(group, *jobs[0], Watch(overfitted, []))
    disturbed = _run(group, *jobs[1], Watch(overfitted, ["crash", "stop"]))
    hopeless = Watch(lambda level, epoch: epoch == 1, [])
    with pytest.raises(StillOverfitting) as refused:
        _run(group, *jobs[2], hopeless)
    return straight, disturbed, hopeless.events, str(refused.value)


Runs = tuple[Path, tuple[Events, Events, Events, str]]


@pytest.fixture(scope="module")
def runs(fashion_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """The folder with straight/, disturbed/ and hopeless/, and what happened in them, on two workers."""
    root = tmp_path_factory.mktemp("overfitting")
    recipe = small_recipe(
        fashion_data,
        objective={"name": "fgsm", "step_size": "1/8"},
        phases={"pretrain": {"epochs": EPOCHS, "lr": 0.1, "ema_decay": 0.5}},
        batch={"batch_per_step": 16, "micro_batch": 8},
        data={"train_images": 16 * PER_EPOCH, "validation_images": HELD_OUT},
        evaluation={"images": 20, "chunk": 100, "validation_steps": 2},
        checkpoint={"every_steps": 4, "keep": 1},
        tracking={"log_every_steps": 3},
    )
    jobs, leases = [], []
    for name in ("straight", "disturbed", "hopeless"):
        (root / name).mkdir()
        atomic_write_text(root / name / "recipe.yaml", dump_recipe(recipe))
        leases.append(Leases([root / name / "pretrain"]))
        jobs.append((recipe, root / name, leases[-1].token))
    try:
        first, second = run_group(2, _all, jobs)
    finally:
        for lease in leases:
            lease.release()
    assert first == second, "both workers go back together"
    return root, first


def _left(folder: Path) -> dict[str, Any]:
    snapshot = checkpoint.read_newest_checkpoint(folder)
    assert snapshot is not None
    rows = [{k: v for k, v in row.items() if k != "timing"} for row in read_rows(folder / "metrics.jsonl")]
    texts = {name: (folder / name).read_text() for name in ("result.json", "evaluate/pgd.json")}
    state = {**snapshot.model, **snapshot.train_state}
    return state | texts | {"progress": snapshot.progress, "rows": rows}


def test_it_goes_back_to_the_last_good_epoch_and_on_with_a_stronger_attack(runs: Runs) -> None:
    root, (events, *_) = runs
    assert events == BACK
    left = _left(root / "straight" / "pretrain")
    progress, rows = left["progress"], left["rows"]
    assert (progress.step, progress.level, progress.good_step) == (EPOCHS * PER_EPOCH, 2, EPOCHS * PER_EPOCH)
    assert [row["step"] for row in rows if row["kind"] == "validation"] == [10, 20, 30, 40, 50]
    steps = [row["step"] for row in rows if row["kind"] == "train"]
    assert steps == [3, 6, 9, 10, 12, 15, 18, 20, 21, 24, 27, 30, 33, 36, 39, 40, 42, 45, 48, 50]
    assert [row["attack_level"] for row in rows] == [(row["step"] > 20) + (row["step"] > 30) for row in rows]
    for row in rows:
        if row["kind"] == "validation":  # the attack has its whole eps
            assert row["probe"]["pgd_correct"] == round(HELD_OUT * row["robust_accuracy"])


def test_crashed_after_going_back_and_stopped_after_that_it_ends_bit_for_bit_the_same(runs: Runs) -> None:
    """The crash leaves no trace of the first time it went back, so it overfits and goes back once more."""
    root, (_, events, *_) = runs
    assert events == [BACK[0], ("crash", 21, 1), BACK[0], ("stop", 26, 1), BACK[1]]
    assert differences(_left(root / "straight" / "pretrain"), _left(root / "disturbed" / "pretrain")) == []


def test_what_overfits_at_every_level_is_refused(runs: Runs) -> None:
    """Each time it went back to its beginning, as no epoch was good."""
    root, (*_, events, message) = runs
    assert events == [("rolled_back", PER_EPOCH, level) for level in range(1, STRONGEST + 1)]
    assert "pretrain: catastrophic overfitting at step 10: of the held-out images" in message
    assert "although training was with PGD of 16 steps; lower objective.overfitting_guard 0.5" in message
    assert checkpoint.steps_on_disk(root / "hopeless" / "pretrain") == [8]
