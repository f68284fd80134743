"""Evaluation inside a run: on the held-out images while a stage trains, on the test set when it is finished."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pipeline.data.loading.loader import Loader
from pipeline.evaluation.chunks import ChunkStore, evaluate
from pipeline.evaluation.measures.base import Measure
from pipeline.evaluation.measures.overfitting_probe import Probed
from pipeline.evaluation.measures.pgd import Pgd
from pipeline.evaluation.measures.randomized_smoothing import Noisy
from pipeline.evaluation.measures.verified_bounds import Proved
from pipeline.evaluation.runner import Task, judge, keep, measure_of, task_of
from pipeline.models import Network
from pipeline.models.ema import averaged
from pipeline.models.export import load_model
from pipeline.recipe.objective import ThreatModel
from pipeline.recipe.schema import Recipe
from pipeline.recipe.stages import Stage
from pipeline.run.files import atomic_write_json, sha256_of
from pipeline.run.lease import check_token
from pipeline.training.context import Job


def validation_of(
    job: Job, stage: Stage, network: Network, average: dict[str, Tensor], loader: Loader, ids: NDArray[np.int64]
) -> Callable[[float], dict[str, Any]]:
    """Clean and robust accuracy on the held-out images, as a metrics row without its position. Collective.

    They are those of the average, for a phase that has one, as it is the phase's result. Where the objective is
    guarded, the counts of the probe are there too, at the share of eps that is handed in.
    """
    recipe = job.recipe
    usual, threat_model = _validation_measure(recipe), recipe.threat_model

    def on_chunk(done: int, total: int) -> bool:
        job.observe("chunk", {"stage": None, "done": done})
        return False  # the next step agrees on stopping

    def validate(strength: float) -> dict[str, Any]:
        measure = usual
        if stage.objective.guarded:
            assert threat_model is not None
            eps = threat_model.eps * Fraction(strength)
            measure = Probed(usual, _quick_pgd(recipe, threat_model.model_copy(update={"eps": eps})))
        crops, chunk = job.evaluation_crops(loader), recipe.evaluation.chunk
        with averaged(network, average) if average else nullcontext():
            verdicts = evaluate(network, loader, ids, crops, measure, chunk, job.group, on_chunk)
        probe = {name: int(verdicts[name].sum()) for name in ("pgd_correct", "one_step_correct") if name in verdicts}
        return {
            "clean_accuracy": float(verdicts["clean_correct"].mean()),
            "robust_accuracy": float(verdicts["robust_correct"].mean()),
            "images": len(ids),
            **({"probe": probe} if probe else {}),
        }

    return validate


def evaluate_stage(job: Job, stage: Stage, labels: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The finished file, as anybody would load it, on the test set: those of `stage.evaluations` that are asked for.

    Yields each with its counts, once they are kept. What was judged before a stop or a crash is not judged again.
    Collective.
    """
    recipe, folder, group = job.recipe, job.folder(stage), job.group
    model, evaluations = folder / "model.safetensors", folder / "evaluate"
    evaluations.mkdir(exist_ok=True)
    loader = job.loader(recipe.data.test_file)
    network, sha256 = load_model(model).to(group.device), sha256_of(model)
    dense = job.run_folder / "pretrain" / "model.safetensors"
    shown: dict[str, Any] = {}

    def on_chunk(done: int, total: int) -> bool:
        job.observe("chunk", {"stage": stage.name, "done": done})
        if group.is_first:  # the others are about as far
            progress = {**shown, "done": shown["total"] * done // total}
            atomic_write_json(evaluations / "progress.json", progress)
        return job.stop_requested()

    def on_pass() -> bool:
        job.observe("pass", {"stage": stage.name})
        return job.stop_requested()

    for label in labels:
        attack = next((attack for attack in stage.attacks if attack.label == label), None)
        task = own_task(recipe) if attack is None else task_of(attack, recipe, dense, group)
        facts = task.facts(loader, sha256)
        shown.update(attack=label, total=facts["images"])
        store = ChunkStore(evaluations / f"{label}.chunks", facts)
        crops = job.evaluation_crops(loader)
        facts, verdicts = judge(
            network, facts, task, loader, crops, group, store=store, on_chunk=on_chunk, on_pass=on_pass
        )
        if group.is_first:
            check_token(folder, job.token)
            keep(evaluations, label, facts, verdicts)
            (evaluations / "progress.json").unlink(missing_ok=True)
            store.remove()
        group.barrier()
        yield label, facts


def own_task(recipe: Recipe) -> Task:
    """How the finished networks of a recipe are judged in any case."""
    measure, evaluation = measure_of(recipe), recipe.evaluation
    return Task(measure.name, measure, evaluation.images, evaluation.chunk)


def _validation_measure(recipe: Recipe) -> Measure:
    """The same, as cheap as a look between epochs must be."""
    steps = recipe.evaluation.validation_steps
    if recipe.objective.measure == "certified":
        assert recipe.objective.sigma is not None
        return Noisy(float(recipe.objective.sigma), steps, recipe.seed)
    if recipe.objective.measure == "verified":
        assert recipe.threat_model is not None
        return Proved(recipe.threat_model, symbolic=False)
    return _quick_pgd(recipe, recipe.threat_model)


def _quick_pgd(recipe: Recipe, threat_model: ThreatModel | None) -> Pgd:
    """PGD of evaluation.validation_steps."""
    steps = recipe.evaluation.validation_steps
    # 2.5 eps / steps (Madry et al. 2018): with fewer steps than on the test set, each must be larger to cross.
    size = 2.5 * float(threat_model.eps) / max(steps, 1) if threat_model is not None else 0.0
    return Pgd(threat_model, steps, size, restarts=1, seed=recipe.seed)
