"""Evaluation inside a run: on held-out images while a stage trains, on the test set once it has finished."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.loading.loader import Loader
from pipeline.evaluation.honesty.runner import honesty_spec, log_checks, run_honesty_checks, trained_network
from pipeline.evaluation.images import EvaluationImages
from pipeline.evaluation.measures.base import Measure
from pipeline.evaluation.measures.overfitting_probe import WithOverfittingProbe
from pipeline.evaluation.measures.pgd import Pgd
from pipeline.evaluation.measures.randomized_smoothing import Noisy
from pipeline.evaluation.measures.verified_bounds import Proved
from pipeline.evaluation.result import EvaluationResult, HonestyResult
from pipeline.evaluation.runner import EvaluationHooks, Evaluator
from pipeline.evaluation.spec import evaluation_spec, recipe_measure
from pipeline.models import Network
from pipeline.models.ema import Ema
from pipeline.recipe.schema import Recipe
from pipeline.recipe.stages import Stage
from pipeline.recipe.technique import Smoothing
from pipeline.recipe.threat_model import ThreatModel
from pipeline.run.files import atomic_write_json, make_folder
from pipeline.run.layout import HONESTY, StageFolder
from pipeline.run.lease import check_token
from pipeline.training.context import RunContext


class _HeldOutHooks(EvaluationHooks):
    """Reports chunks. Does not stop: the ranks agree on stopping in the next training step."""

    def __init__(self, context: RunContext) -> None:
        self._context = context

    def chunk_done(self, done: int, total: int) -> None:
        self._context.observe("chunk", {"stage": None, "done": done})


class _StageHooks(EvaluationHooks):
    """Reports and stops the evaluation of a stage's network, and refuses to write without the lease.

    From its start on, evaluate/progress.json has its name, and the number of images done and in total.
    """

    def __init__(self, context: RunContext, stage: Stage, name: str, images: int) -> None:
        self._context, self._stage, self._name, self._images = context, stage, name, images
        self._progress = StageFolder(context.folder(stage)).evaluation_progress
        self._write(0)

    def chunk_done(self, done: int, total: int) -> None:
        self._context.observe("chunk", {"stage": self._stage.name, "done": done})
        self._write(self._images * done // total)

    def _write(self, done: int) -> None:
        if self._context.group.is_first:  # the other ranks are about as far
            make_folder(self._progress.parent)
            atomic_write_json(self._progress, {"attack": self._name, "total": self._images, "done": done})

    def pass_begins(self) -> None:
        self._context.observe("pass", {"stage": self._stage.name})

    def stop_requested(self) -> bool:
        return self._context.stop_requested()

    def before_writing(self) -> None:
        check_token(self._context.folder(self._stage), self._context.token)

    def complete(self) -> None:
        if self._context.group.is_first:
            self._progress.unlink(missing_ok=True)


def build_validation(
    context: RunContext, stage: Stage, network: Network, ema: Ema | None, loader: Loader, ids: NDArray[np.int64]
) -> Callable[[float], dict[str, Any]]:
    """A function for clean and robust accuracy on the held-out images: a metrics row without its position. Collective.

    The function takes the current share of eps. With an EMA, which is the phase's result, it evaluates the EMA's
    weights. If the objective is guarded, it adds the counts of the overfitting probe at that share of eps.
    """
    recipe = context.recipe
    usual, threat_model = _validation_measure(recipe), recipe.threat_model
    images = EvaluationImages(loader, recipe.data.augmentation, ids)
    evaluator = Evaluator(images, context.group, _HeldOutHooks(context))

    def validate(strength: float) -> dict[str, Any]:
        measure = usual
        if stage.objective.guarded:
            assert threat_model is not None
            eps = threat_model.eps * Fraction(strength)
            pgd = _quick_pgd(recipe, threat_model.model_copy(update={"eps": eps}))
            measure = WithOverfittingProbe(usual, pgd)
        with nullcontext() if ema is None else ema.applied():
            verdicts = evaluator.verdicts(network, measure, recipe.evaluation.chunk)
        probe = {name: int(verdicts[name].sum()) for name in ("pgd_correct", "one_step_correct") if name in verdicts}
        return {
            "clean_accuracy": float(verdicts["clean_correct"].mean()),
            "robust_accuracy": float(verdicts["robust_correct"].mean()),
            "images": len(ids),
            **({"probe": probe} if probe else {}),
        }

    return validate


def evaluate_stage(context: RunContext, stage: Stage, labels: list[str]) -> Iterator[tuple[str, EvaluationResult]]:
    """Run the evaluations `labels` of the stage's exported network on the test set.

    Yields (label, result) once the result is written. Chunks finished before a stop or crash are not repeated.
    Collective. Errors: those of `Evaluator.evaluate`; LeaseHeld.
    """
    recipe, folder = context.recipe, context.folder(stage)
    images = _test_images(context)
    dense = StageFolder(context.run_folder / "pretrain").network
    for label in labels:
        attack = next((attack for attack in stage.attacks if attack.label == label), None)
        spec = evaluation_spec(recipe, attack, dense, context.group.device)
        hooks = _StageHooks(context, stage, label, len(images.spread(spec.images).ids))
        result = Evaluator(images, context.group, hooks).evaluate(spec, StageFolder(folder).network, label)
        hooks.complete()
        yield label, result


def check_honesty(context: RunContext, stage: Stage) -> None:
    """Write honesty.json of a finished stage, and log warnings. Collective.

    Only for recipes evaluated with PGD; certificates and proofs involve no attack. Chunks finished before a stop or
    crash are not repeated, and a current file is kept. Errors: those of `run_honesty_checks`; LeaseHeld.
    """
    recipe, folder, group = context.recipe, context.folder(stage), context.group
    pgd = recipe_measure(recipe)
    if not isinstance(pgd, Pgd) or pgd.threat_model is None or not recipe.evaluation.honesty_images:
        return
    file, target, images = StageFolder(folder).network, StageFolder(folder).honesty, _test_images(context)
    spec = honesty_spec(recipe, pgd, recipe.evaluation.images or len(images.ids))
    if group.broadcast(group.is_first and spec.header(images, file).read_if_current(target, HonestyResult) is not None):
        return
    trained, chunks = trained_network(recipe, folder, stage), StageFolder(folder).evaluations / "honesty.chunks"
    hooks = _StageHooks(context, stage, HONESTY, len(images.spread(spec.images).ids))
    result, _, store = run_honesty_checks(Evaluator(images, group, hooks), spec, file, trained, chunks)
    hooks.complete()
    if group.is_first:
        check_token(folder, context.token)
        atomic_write_json(target, result.to_json())
        store.remove()
        log_checks(stage.name, result.checks)
    group.barrier()


def _test_images(context: RunContext) -> EvaluationImages:
    return EvaluationImages.all_of(context.loader(context.recipe.data.test_file), context.recipe.data.augmentation)


def _validation_measure(recipe: Recipe) -> Measure:
    """A cheap version of the recipe's measure, for the held-out images between epochs."""
    steps = recipe.evaluation.validation_steps
    if isinstance(recipe.objective, Smoothing):
        return Noisy(float(recipe.objective.sigma), steps, recipe.seed)
    if recipe.objective.measure == "verified":
        assert recipe.threat_model is not None
        return Proved(recipe.threat_model, symbolic=False)
    return _quick_pgd(recipe, recipe.threat_model)


def _quick_pgd(recipe: Recipe, threat_model: ThreatModel | None) -> Pgd:
    """PGD of evaluation.validation_steps."""
    steps = recipe.evaluation.validation_steps
    # 2.5 eps / steps (Madry et al. 2018): with fewer steps than on the test set, each must be larger to cross the ball.
    size = 2.5 * float(threat_model.eps) / max(steps, 1) if threat_model is not None else 0.0
    return Pgd(threat_model, steps, size, restarts=1, seed=recipe.seed)
