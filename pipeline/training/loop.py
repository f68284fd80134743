"""The training loop, for every phase and objective.

One step: for each of this worker's micro-batches, attack and accumulate gradients; in one collective, fold in the
BatchNorm statistics and check on all ranks that the loss is finite; update the parameters; re-rank the scores. All
randomness is keyed by step and sample, so the loop can start at any step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from pipeline.data.loading.loader import Batch
from pipeline.recipe.schedules import image_size_at, lr_at
from pipeline.recipe.stages import Stage
from pipeline.robustness.noise import device_keys
from pipeline.robustness.objectives import Objective, ObjectiveInput, ObjectiveOutput, attack_strength
from pipeline.robustness.overfitting import CatastrophicOverfitting, overfits
from pipeline.run.checkpoint import Snapshot
from pipeline.run.progress import Progress, Window
from pipeline.training.batchnorm import BatchStatistics
from pipeline.training.context import RunContext
from pipeline.training.hardware import NodeUsage
from pipeline.training.non_finite import NonFinite, advice, non_finite_loss
from pipeline.training.stage_state import StageState
from pipeline.training.stopwatch import Stopwatch


class Rows(Protocol):
    """Where metric rows go."""

    def log(self, row: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Training:
    """The inputs of one stage's loop."""

    stage: Stage
    context: RunContext
    state: StageState
    """With the network in training mode, except for frozen BatchNorm."""
    objective: Objective
    micro_batches: Iterator[Batch]
    """This worker's micro-batches, from the first remaining step."""
    rows: Rows | None
    """Metric rows; on rank 0 only."""
    validate: Callable[[float], dict[str, Any]]
    """Maps the current share of eps, in [0, 1], to accuracies on the held-out images: a metrics row without its
    position. Collective."""
    save: Callable[[Snapshot], None]
    """Called on every rank; rank 0 writes."""


@dataclass(frozen=True)
class StepSums:
    """Sums of one step, float64 scalars: over this worker's micro-batches, after the collective over all."""

    values: Tensor
    """[5]: the fields below, in one tensor for the collective; they are views of it."""
    loss: Tensor
    """Sum of the micro-batches' mean losses."""
    clean_correct: Tensor
    robust_correct: Tensor
    images: Tensor
    stops: Tensor
    """Number of workers that received a stop request."""

    @staticmethod
    def of(values: Tensor) -> StepSums:
        return StepSums(values, *values.unbind())

    def add(self, output: ObjectiveOutput, images: int) -> None:
        """Add a micro-batch; accuracies that its objective does not count stay zero."""
        self.loss.add_(output.loss.detach())
        self.images.add_(images)
        if output.clean_correct is not None:
            self.clean_correct.add_(output.clean_correct)
        if output.robust_correct is not None:
            self.robust_correct.add_(output.robust_correct)


def snapshot(training: Training, progress: Progress) -> Snapshot:
    """CPU copies of everything in a checkpoint. Collective. Errors: NonFinite, so no checkpoint has such values."""
    result = training.state.snapshot(progress)
    for name, tensor in {**result.model, **result.train_state}.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise NonFinite(f"{training.stage.name}: {name} is not finite at step {progress.step}")
    return result


def train(training: Training, progress: Progress) -> Progress:
    """Run the remaining steps; returns the final position: the end, or where the run was stopped. Collective.

    Errors: NonFinite; CatastrophicOverfitting if the objective is guarded.
    """
    stage, context = training.stage, training.context
    recipe, group = context.recipe, context.group
    statistics = BatchStatistics(training.state.engine.network, group)
    clock, nodes = Stopwatch(group.device), NodeUsage(group)
    try:
        while not progress.finished:
            sums = _step(training, statistics, progress, clock)
            progress = progress.after_step(_add_sums(progress.window, sums))
            context.observe("step", {"stage": stage.name, "step": progress.step})
            ends_epoch = progress.at_epoch_end
            if progress.step % recipe.tracking.log_every_steps == 0 or ends_epoch:
                _log_window(training, progress, clock.read(), nodes.sample())
                progress = progress.after_window()
            if ends_epoch and recipe.evaluation.validation_steps > 0:
                progress = _validate(training, progress)
                clock.restart()
            stopping = bool(sums.stops > 0)
            if stopping or _is_checkpoint_step(training, progress):
                with clock.during("checkpoint"):
                    training.save(snapshot(training, progress))
            if stopping:
                break
    finally:
        statistics.close()
    return progress


def _step(training: Training, statistics: BatchStatistics, progress: Progress, clock: Stopwatch) -> StepSums:
    """One optimizer step. Returns the sums over all ranks, on the CPU; one collective for them and BatchNorm."""
    stage, context, state = training.stage, training.context, training.state
    engine, device, step = state.engine, context.group.device, progress.step
    engine.set_lr(lr_at(stage.optimisation, step, progress.steps_per_epoch))
    sums = StepSums.of(torch.zeros(5, dtype=torch.float64, device=device))
    losses: list[tuple[Tensor, Tensor]] = []
    for index in range(context.local_micro_batches):
        with clock.during("data"):
            batch = next(training.micro_batches)
            images, labels = batch.to(device)

        def forward(inputs: Tensor, index: int = index, ids: Tensor = batch.ids) -> Tensor:
            context.observe(
                "forward", {"stage": stage.name, "step": step, "micro_batch": index, "ids": ids, "fed": inputs}
            )
            return engine.forward(inputs)

        keys = device_keys(batch.ids.numpy(), device, context.recipe.seed, "attack", stage.random_key, step)
        output = training.objective(
            ObjectiveInput(
                network=engine.network,
                forward=forward,
                x=images,
                y=labels,
                keys=keys,
                autocast=engine.autocast,
                elapsed=step / progress.total_steps,
                attacking=partial(clock.during, "attack"),
                noise=None if state.noise is None else state.noise.of(index, batch.ids, keys, step),
                unrecorded=statistics.paused,
            )
        )
        loss = output.loss
        if state.penalty is not None:
            loss = loss + state.penalty.at(step, progress.steps_per_epoch)
        engine.backward(loss)
        output.after_backward()
        sums.add(output, len(labels))
        losses.append((batch.ids, output.loss.detach()))
        if index == context.local_micro_batches - 1:
            sums.stops.fill_(float(context.stop_requested()))
            sums = StepSums.of(statistics.fold_in(sums.values).cpu())
            if not math.isfinite(float(sums.loss)):
                raise non_finite_loss(stage, context.group, step, losses)
        if not engine.advance():
            ids = [i for ids, _ in losses for i in ids.tolist()]
            reason = (
                f"a gradient of step {step} is not finite, although every loss is: samples {ids} and other workers'"
            )
            raise NonFinite(f"{stage.name}: {reason}; {advice(stage)}")
    if stage.trains == "scores":
        scores = state.network.scores
        assert scores is not None
        try:
            scores.refresh()
        except ValueError as error:
            raise NonFinite(f"{stage.name}: after step {step}: {error}; {advice(stage)}") from None
    if state.dynamic_masks is not None:
        state.dynamic_masks.count(int(sums.robust_correct), int(sums.images))
        state.dynamic_masks.update(step + 1)
    if state.ema is not None:
        state.ema.update(step + 1)
    return sums


def _add_sums(window: Window, sums: StepSums) -> Window:
    return Window(
        window.loss_sum + float(sums.loss),
        window.clean_correct + int(sums.clean_correct),
        window.robust_correct + int(sums.robust_correct),
        window.images + int(sums.images),
        window.steps + 1,
    )


def _log_window(
    training: Training, progress: Progress, seconds_in: dict[str, float], system: dict[str, dict[str, float]]
) -> None:
    """Log one metrics row for the steps since the last one. `timing` is separate: everything else is deterministic."""
    if training.rows is None:
        return
    seconds = sum(seconds_in.values())
    window, recipe, objective = progress.window, training.context.recipe, training.stage.objective
    drift, penalty = training.state.drift, training.state.penalty
    training.rows.log(
        {
            "kind": "train",
            "step": progress.step,
            "epoch": progress.step / progress.steps_per_epoch,
            "lr": lr_at(training.stage.optimisation, progress.step - 1, progress.steps_per_epoch),
            "loss": window.loss_sum / (window.steps * recipe.batch.micro_batches_per_step),
            "clean_accuracy": window.clean_correct / window.images if objective.counts_clean else None,
            "robust_accuracy": window.robust_correct / window.images if objective.counts_robust else None,
            "images": window.images,
            "timing": {
                "images_per_s": window.images / max(seconds, 1e-9),
                "seconds": seconds,
                "seconds_in": seconds_in,
                "system": system,
            },
            **_level(training, progress),
            **_image_size(training, progress),
            **({"mask_drift": drift.measured()} if drift is not None else {}),
            **({"over_budget": float(penalty.excess().detach())} if penalty is not None else {}),
        }
    )


def _level(training: Training, progress: Progress) -> dict[str, int]:
    """The attack level, in the rows of stages with an overfitting guard."""
    return {"attack_level": progress.level} if training.stage.objective.guarded else {}


def _image_size(training: Training, progress: Progress) -> dict[str, int]:
    """The image size of a row's steps, for stages where images grow; no row spans two epochs."""
    optimisation = training.stage.optimisation
    if optimisation.resolution is None:
        return {}
    epoch = (progress.step - 1) // progress.steps_per_epoch
    return {"image_size": image_size_at(optimisation, training.context.recipe.data.image_size, epoch)}


def _validate(training: Training, progress: Progress) -> Progress:
    """Log accuracies on the held-out images; with `select: best_validation_robust`, track the best step.

    Errors: CatastrophicOverfitting.
    """
    stage, started, scores = training.stage, time.monotonic(), training.state.network.scores
    with nullcontext() if scores is None else scores.within_budget():
        strength = attack_strength(stage.objective, stage.section, progress.step / progress.total_steps)
        accuracies = training.validate(strength)
    position = {"step": progress.step, "epoch": progress.step / progress.steps_per_epoch}
    if training.rows is not None:
        timing = {"seconds": time.monotonic() - started}
        level = _level(training, progress)
        training.rows.log({"kind": "validation", **position, **accuracies, "timing": timing, **level})
    smallest = stage.objective.smallest_ratio
    if smallest is not None:
        counts = accuracies["probe"]["pgd_correct"], accuracies["probe"]["one_step_correct"]
        if overfits(*counts, smallest):
            raise CatastrophicOverfitting(stage.name, progress.step, progress.level, progress.good_step, counts)
        progress = progress.with_good_step()
    masks = training.state.dynamic_masks
    if masks is not None:
        masks.validated(accuracies["robust_accuracy"])
    has_budget = masks is None or progress.step >= masks.settled_step
    if training.context.recipe.select == "best_validation_robust" and has_budget:
        return progress.with_best(accuracies["robust_accuracy"])
    return progress


def _is_checkpoint_step(training: Training, progress: Progress) -> bool:
    every, selects = training.context.recipe.checkpoint.every_steps, training.context.recipe.select
    at_epochs = every is None or selects == "best_validation_robust" or training.stage.objective.guarded
    if progress.finished or (progress.at_epoch_end and at_epochs):
        return True
    return every is not None and progress.step % every == 0
