"""Evaluation inside a run: on the held-out images while a stage trains, on the test set when it is finished."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pipeline.averaging import averaged
from pipeline.data.loader import Loader
from pipeline.data.manifest import read_manifest
from pipeline.evaluate.certify import Certified, Noisy
from pipeline.evaluate.chunks import ChunkStore, evaluate, write_verdicts
from pipeline.evaluate.measure import Measure, summarise
from pipeline.evaluate.pgd import Pgd
from pipeline.evaluate.probed import Probed
from pipeline.evaluate.verified import Proved
from pipeline.export import load_model
from pipeline.files import atomic_write_json, sha256_of
from pipeline.job import Job
from pipeline.lease import check_token
from pipeline.models import Network
from pipeline.phases import Stage
from pipeline.recipe import Recipe
from pipeline.recipe_objective import ThreatModel


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


def evaluate_stage(job: Job, stage: Stage) -> dict[str, Any] | None:
    """The finished file, as anybody would load it, on the whole test set; rank 0 returns the counts. Collective.

    What was judged before a stop or a crash is not judged again.
    """
    recipe, folder = job.recipe, job.folder(stage)
    model = folder / "model.safetensors"
    network = load_model(model).to(job.group.device)
    loader = job.loader(recipe.data.test_file)
    measure = measure_of(recipe)
    ids = spread(loader.num_samples, recipe.evaluation.images)

    def on_chunk(done: int, total: int) -> bool:
        job.observe("chunk", {"stage": stage.name, "done": done})
        if job.group.is_first:  # the others are about as far
            shown = {"attack": measure.name, "done": len(ids) * done // total, "total": len(ids)}
            atomic_write_json(folder / "evaluate" / "progress.json", shown)
        return job.stop_requested()

    (folder / "evaluate").mkdir(exist_ok=True)
    facts = facts_of(measure, recipe.evaluation.chunk, loader, sha256_of(model)) | {"images": len(ids)}
    store = ChunkStore(folder / "evaluate" / f"{measure.name}.chunks", facts)
    crops, chunk = job.evaluation_crops(loader), recipe.evaluation.chunk
    verdicts = evaluate(network, loader, ids, crops, measure, chunk, job.group, on_chunk, store)
    facts |= summarise(verdicts)
    if job.group.is_first:
        check_token(folder, job.token)
        write_verdicts(folder / "evaluate" / f"{measure.name}.parquet", verdicts)
        atomic_write_json(folder / "evaluate" / f"{measure.name}.json", facts)
        (folder / "evaluate" / "progress.json").unlink(missing_ok=True)
        store.remove()
    job.group.barrier()
    return facts if job.group.is_first else None


def measure_of(recipe: Recipe) -> Measure:
    """How the finished networks of a recipe are judged."""
    if recipe.objective.measure == "certified":
        assert recipe.threat_model is not None
        assert recipe.objective.sigma is not None
        return Certified.of(float(recipe.objective.sigma), recipe.threat_model, recipe.evaluation, recipe.seed)
    if recipe.objective.measure == "verified":
        assert recipe.threat_model is not None
        return Proved(recipe.threat_model, recipe.evaluation.bounds == "symbolic")
    return Pgd.of(recipe.threat_model, recipe.evaluation, recipe.seed)


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


def spread(total: int, count: int | None) -> NDArray[np.int64]:
    """`count` of `total` samples, evenly spread over the file, which may be sorted by class; None means all."""
    return np.arange(total) if count is None or count >= total else np.arange(count) * total // count


def facts_of(measure: Measure, chunk: int, loader: Loader, model_sha256: str) -> dict[str, Any]:
    """Everything that verdicts are a function of."""
    return {
        "attack": measure.name,
        "title": measure.title,
        "settings": measure.settings,
        "chunk": chunk,
        "model_sha256": model_sha256,
        "data_sha256": read_manifest(loader.path).sha256,
    }
