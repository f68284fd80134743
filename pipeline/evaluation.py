"""Evaluation inside a run: on the held-out images while a stage trains, on the test set when it is finished."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.loader import Loader
from pipeline.data.manifest import read_manifest
from pipeline.evaluate.chunks import ChunkStore, evaluate, write_verdicts
from pipeline.evaluate.measure import Measure, summarise
from pipeline.evaluate.pgd import Pgd
from pipeline.export import load_model
from pipeline.files import atomic_write_json, sha256_of
from pipeline.job import Job
from pipeline.lease import check_token
from pipeline.models import Network
from pipeline.phases import Stage
from pipeline.recipe import Recipe


def validation_of(job: Job, network: Network, loader: Loader, ids: NDArray[np.int64]) -> Callable[[], dict[str, Any]]:
    """Clean and PGD accuracy on the held-out images, as a metrics row without its position. Collective."""
    recipe = job.recipe
    steps = recipe.evaluation.validation_steps
    measure = Pgd(recipe.threat_model, steps, _validation_step_size(recipe), restarts=1, seed=recipe.seed)

    def on_chunk(done: int, total: int) -> bool:
        job.observe("chunk", {"stage": None, "done": done})
        return False  # the next step agrees on stopping

    def validate() -> dict[str, Any]:
        crops, chunk = job.evaluation_crops(loader), recipe.evaluation.chunk
        verdicts = evaluate(network, loader, ids, crops, measure, chunk, job.group, on_chunk)
        return {
            "clean_accuracy": float(verdicts["clean_correct"].mean()),
            "robust_accuracy": float(verdicts["robust_correct"].mean()),
            "images": len(ids),
        }

    return validate


def _validation_step_size(recipe: Recipe) -> float:
    """2.5 eps / steps (Madry et al. 2018): with fewer steps than on the test set, each must be larger to cross."""
    if recipe.threat_model is None:
        return float(recipe.evaluation.step_size)
    return 2.5 * float(recipe.threat_model.eps) / max(recipe.evaluation.validation_steps, 1)


def evaluate_stage(job: Job, stage: Stage) -> dict[str, Any] | None:
    """The finished file, as anybody would load it, on the whole test set; rank 0 returns the counts. Collective.

    What was judged before a stop or a crash is not judged again.
    """
    recipe, folder = job.recipe, job.folder(stage)
    model = folder / "model.safetensors"
    network = load_model(model).to(job.group.device)
    loader = job.loader(recipe.data.test_file)
    measure = measure_of(recipe)

    def on_chunk(done: int, total: int) -> bool:
        job.observe("chunk", {"stage": stage.name, "done": done})
        if job.group.is_first:  # the others are about as far
            images = loader.num_samples * done // total
            shown = {"attack": measure.name, "done": images, "total": loader.num_samples}
            atomic_write_json(folder / "evaluate" / "progress.json", shown)
        return job.stop_requested()

    (folder / "evaluate").mkdir(exist_ok=True)
    facts = facts_of(measure, recipe.evaluation.chunk, loader, sha256_of(model))
    store = ChunkStore(folder / "evaluate" / f"{measure.name}.chunks", facts)
    ids = np.arange(loader.num_samples, dtype=np.int64)
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
    """How the networks of a recipe are judged."""
    return Pgd.of(recipe.threat_model, recipe.evaluation, recipe.seed)


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
