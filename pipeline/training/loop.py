"""The training loop, for every phase and objective.

Phases are data (`phases.Stage`), objectives are functions that are handed the attack. A step is: for each of this
worker's micro-batches attack and accumulate gradients; fold BatchNorm's statistics in and agree that the loss is
finite, in one collective; move the parameters; rank the scores anew. All randomness is keyed, so that the loop can
begin at any step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

from pipeline.data.loading.loader import Batch
from pipeline.distributed import Group
from pipeline.models import Network
from pipeline.models.ema import update_average
from pipeline.models.pruning.mask_drift import Drift
from pipeline.models.pruning.scores import named_state, refresh_masks
from pipeline.recipe.schedules import image_size_at, lr_at
from pipeline.recipe.schema import Recipe
from pipeline.recipe.stages import Stage
from pipeline.robustness.attacks import device_keys
from pipeline.robustness.objectives import COUNTS, Given, Objective, attack_strength
from pipeline.robustness.overfitting import CatastrophicOverfitting, overfits
from pipeline.run.checkpoint import Snapshot
from pipeline.run.progress import Progress, Window
from pipeline.training.batchnorm import BatchStatistics
from pipeline.training.engine import Engine
from pipeline.training.hardware import NodeUsage
from pipeline.training.replays import carried_noise
from pipeline.training.stopwatch import Stopwatch

STOP = 4
"""Which of a step's sums counts the workers that were asked to stop."""

Observer = Callable[[str, dict[str, Any]], None]
"""Tests watch a run through it: called with an event name and its facts on every rank."""


def unobserved(event: str, facts: dict[str, Any]) -> None:
    """Nobody watches."""


class NonFinite(RuntimeError):
    """A loss, gradient, weight, score or momentum is NaN or infinite; raised on all ranks, and never checkpointed."""


class Rows(Protocol):
    """Where metric rows go."""

    def log(self, row: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Training:
    """What one stage's loop is made of."""

    stage: Stage
    recipe: Recipe
    group: Group
    network: Network
    """In training mode, but for BatchNorm where it is frozen."""
    engine: Engine
    objective: Objective
    micro_batches: Iterator[Batch]
    """This worker's micro-batches from the first step that is left."""
    rows: Rows | None
    """Metric rows; on rank 0 only."""
    validate: Callable[[float], dict[str, Any]]
    """Accuracies on the held-out images: a metrics row without its position. Takes the share of its eps that the
    attack has. Collective."""
    save: Callable[[Snapshot], None]
    """Called on every rank; rank 0 writes."""
    observe: Observer
    average: dict[str, torch.Tensor]
    """The moving average of what trains, for phases that have one; empty otherwise."""
    noise: torch.Tensor | None
    """The perturbation of this worker's micro-batches [local, micro_batch, ...], for objectives that carry one."""
    drift: Drift | None
    """How far the masks have moved; on rank 0 of phases that train scores."""
    stop_requested: Callable[[], bool]
    """Asked at every step; what any worker answers, all do."""


def snapshot(training: Training, progress: Progress) -> Snapshot:
    """Owned CPU copies of everything a checkpoint holds. Collective. Errors: NonFinite, so that none enters one."""
    model = {
        name: tensor.detach().to("cpu", copy=True).contiguous()
        for name, tensor in named_state(training.network).items()
    }
    optimizer = training.engine.optimizer_state()
    average = training.average.items()  # in the network's own memory layout, which safetensors does not write
    carried = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in average}
    if training.noise is not None:
        carried |= carried_noise(training.noise, training.group)
    if training.drift is not None:
        carried |= training.drift.carried()
    for name, tensor in {**model, **optimizer, **carried}.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise NonFinite(f"{training.stage.name}: {name} is not finite at step {progress.step}")
    return Snapshot(model, optimizer, progress, carried)


def train(training: Training, progress: Progress) -> Progress:
    """Run the steps that are left and return the last position: the end, or where the run was stopped. Collective.

    Errors: NonFinite; CatastrophicOverfitting where the objective is guarded.
    """
    recipe, stage, group = training.recipe, training.stage, training.group
    statistics = BatchStatistics(training.engine.network, group)
    clock, nodes = Stopwatch(group.device), NodeUsage(group)
    try:
        while not progress.finished:
            sums = _step(training, statistics, progress, clock)
            progress = progress.after_step(_added(progress.window, sums))
            training.observe("step", {"stage": stage.name, "step": progress.step})
            ends_epoch = progress.at_epoch_end
            if progress.step % recipe.tracking.log_every_steps == 0 or ends_epoch:
                _log_window(training, progress, clock.read(), nodes.sample())
                progress = progress.after_window()
            if ends_epoch and recipe.evaluation.validation_steps > 0:
                progress = _validated(training, progress)
                clock.restart()
            stopping = bool(sums[STOP] > 0)
            if stopping or _is_checkpoint_step(training, progress):
                with clock.during("checkpoint"):
                    training.save(snapshot(training, progress))
            if stopping:
                break
    finally:
        statistics.close()
    return progress


def _step(training: Training, statistics: BatchStatistics, progress: Progress, clock: Stopwatch) -> torch.Tensor:
    """One optimizer step. Returns sums over all ranks: loss over micro-batches, clean and robust correct, images, and
    how many ranks were asked to stop. They travel in one collective, with BatchNorm's statistics."""
    recipe, stage, group, engine = training.recipe, training.stage, training.group, training.engine
    step = progress.step
    engine.set_lr(lr_at(stage.optimisation, step, progress.steps_per_epoch))
    local = recipe.batch.micro_batches_per_step // group.world
    sums = torch.zeros(5, dtype=torch.float64, device=group.device)
    losses: list[tuple[torch.Tensor, torch.Tensor]] = []
    for index in range(local):
        with clock.during("data"):
            batch = next(training.micro_batches)
            images, labels = batch.to(group.device)
        keys = device_keys(batch.ids.numpy(), group.device, recipe.seed, "attack", stage.name, step)

        def forward(fed: torch.Tensor, index: int = index, ids: torch.Tensor = batch.ids) -> torch.Tensor:
            training.observe(
                "forward", {"stage": stage.name, "step": step, "micro_batch": index, "ids": ids, "fed": fed}
            )
            return engine.forward(fed)

        elapsed = step / progress.total_steps
        carried = None if training.noise is None else training.noise[index]
        attacking = partial(clock.during, "attack")
        given = Given(engine.network, forward, images, labels, keys, engine.autocast, elapsed, attacking, carried)
        outcome = training.objective(given)
        engine.backward(outcome.loss)
        outcome.after_backward()
        sums[0] += outcome.loss.detach()
        for place, count in ((1, outcome.clean_correct), (2, outcome.robust_correct), (3, len(labels))):
            if count is not None:
                sums[place] += count
        losses.append((batch.ids, outcome.loss.detach()))
        if index == local - 1:
            sums[STOP] = float(training.stop_requested())
            sums = statistics.fold_in(sums)
            if not math.isfinite(float(sums[0])):
                raise NonFinite(_what_is_not_finite(training, step, losses))
        if not engine.advance():
            ids = [i for ids, _ in losses for i in ids.tolist()]
            what = f"a gradient of step {step} is not finite, although every loss is: samples {ids} and other workers'"
            raise NonFinite(f"{stage.name}: {what}; {_advice(training)}")
    if stage.trains == "scores":
        try:
            refresh_masks(training.network)
        except ValueError as error:
            raise NonFinite(f"{stage.name}: after step {step}: {error}; {_advice(training)}") from None
    if stage.optimisation.ema_decay is not None:
        update_average(training.average, training.network, stage.optimisation.ema_decay, step + 1)
    return sums


def _what_is_not_finite(training: Training, step: int, losses: list[tuple[torch.Tensor, torch.Tensor]]) -> str:
    """Names the samples of all micro-batches whose loss is not finite. Collective: whoever is heard says the same."""
    odd = [f"{float(loss)} for samples {ids.tolist()}" for ids, loss in losses if not math.isfinite(float(loss))]
    where = "; ".join(part for parts in training.group.gather(odd) for part in parts)
    return f"{training.stage.name}: the loss of step {step} is not finite: {where}; {_advice(training)}"


def _advice(training: Training) -> str:
    section = "finetune" if training.stage.is_baseline else training.stage.phase
    return f"lower phases.{section}.lr or lengthen its warm-up"


def _added(window: Window, sums: torch.Tensor) -> Window:
    loss, clean, robust, images, _ = sums.tolist()
    return Window(
        window.loss_sum + loss,
        window.clean_correct + int(clean),
        window.robust_correct + int(robust),
        window.images + int(images),
        window.steps + 1,
    )


def _log_window(
    training: Training, progress: Progress, seconds_in: dict[str, float], system: dict[str, dict[str, float]]
) -> None:
    """One metrics row for the steps since the last one. What is measured is kept apart: the rest is repeatable."""
    if training.rows is None:
        return
    seconds = sum(seconds_in.values())
    window, recipe = progress.window, training.recipe
    counts_clean, counts_robust = COUNTS[training.stage.objective.name]
    training.rows.log(
        {
            "kind": "train",
            "step": progress.step,
            "epoch": progress.step / progress.steps_per_epoch,
            "lr": lr_at(training.stage.optimisation, progress.step - 1, progress.steps_per_epoch),
            "loss": window.loss_sum / (window.steps * recipe.batch.micro_batches_per_step),
            "clean_accuracy": window.clean_correct / window.images if counts_clean else None,
            "robust_accuracy": window.robust_correct / window.images if counts_robust else None,
            "images": window.images,
            "timing": {
                "images_per_s": window.images / max(seconds, 1e-9),
                "seconds": seconds,
                "seconds_in": seconds_in,
                "system": system,
            },
            **_level(training, progress),
            **_image_size(training, progress),
            **({"mask_drift": training.drift.measured()} if training.drift is not None else {}),
        }
    )


def _level(training: Training, progress: Progress) -> dict[str, int]:
    """How strong the attack has been made, in the rows of stages where it may be."""
    return {"attack_level": progress.level} if training.stage.objective.guarded else {}


def _image_size(training: Training, progress: Progress) -> dict[str, int]:
    """How large the images of a row's steps were, in the rows of stages where they grow; a row ends with its epoch."""
    optimisation = training.stage.optimisation
    if optimisation.resolution is None:
        return {}
    epoch = (progress.step - 1) // progress.steps_per_epoch
    return {"image_size": image_size_at(optimisation, training.recipe.data.image_size, epoch)}


def _validated(training: Training, progress: Progress) -> Progress:
    """Accuracies on the held-out images, logged; with `select: best_validation_robust` they choose the checkpoint.

    Errors: CatastrophicOverfitting.
    """
    stage, started = training.stage, time.monotonic()
    accuracies = training.validate(attack_strength(stage.objective, stage.phase, progress.step / progress.total_steps))
    position = {"step": progress.step, "epoch": progress.step / progress.steps_per_epoch}
    if training.rows is not None:
        timing = {"seconds": time.monotonic() - started}
        level = _level(training, progress)
        training.rows.log({"kind": "validation", **position, **accuracies, "timing": timing, **level})
    smallest = stage.objective.overfitting_guard
    if stage.objective.guarded and smallest is not None:
        right = accuracies["probe"]["pgd_correct"], accuracies["probe"]["one_step_correct"]
        if overfits(*right, smallest):
            raise CatastrophicOverfitting(stage.name, progress.step, progress.level, progress.good_step, right)
        progress = progress.found_good()
    if training.recipe.select == "best_validation_robust":
        return progress.with_best(accuracies["robust_accuracy"])
    return progress


def _is_checkpoint_step(training: Training, progress: Progress) -> bool:
    every, judged = training.recipe.checkpoint.every_steps, training.recipe.select == "best_validation_robust"
    if progress.finished or (progress.at_epoch_end and (every is None or judged or training.stage.objective.guarded)):
        return True
    return every is not None and progress.step % every == 0
