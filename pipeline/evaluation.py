"""Evaluation inside a run: on the held-out images while a stage trains, on the test set when it is finished."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.data.loader import Loader
from pipeline.data.manifest import read_manifest
from pipeline.evaluate.pgd import Attack, evaluate, summarise
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
    attack = Attack(recipe.threat_model, steps, _validation_step_size(recipe), restarts=1, seed=recipe.seed)

    def on_chunk(done: int, total: int) -> bool:
        job.observe("chunk", {"stage": None, "done": done})
        return False  # the next step agrees on stopping

    def validate() -> dict[str, Any]:
        verdicts = evaluate(
            network, loader, ids, job.evaluation_crops(loader), attack, recipe.evaluation.chunk, job.group, on_chunk
        )
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
    """The finished file, as anybody would load it, on the whole test set; rank 0 returns the counts. Collective."""
    recipe, folder = job.recipe, job.folder(stage)
    network = load_model(folder / "model.safetensors").to(job.group.device)
    loader = job.loader(recipe.data.test_file)
    attack = Attack.of(recipe.threat_model, recipe.evaluation, recipe.seed)

    def on_chunk(done: int, total: int) -> bool:
        job.observe("chunk", {"stage": stage.name, "done": done})
        if job.group.is_first:  # the others are about as far
            images = loader.num_samples * done // total
            shown = {"attack": "pgd", "done": images, "total": loader.num_samples}
            atomic_write_json(folder / "evaluate" / "progress.json", shown)
        return job.stop_requested()

    (folder / "evaluate").mkdir(exist_ok=True)
    ids = np.arange(loader.num_samples, dtype=np.int64)
    verdicts = evaluate(
        network, loader, ids, job.evaluation_crops(loader), attack, recipe.evaluation.chunk, job.group, on_chunk
    )
    facts = None
    if job.group.is_first:
        check_token(folder, job.token)
        facts = write_evaluation(folder / "evaluate", verdicts, recipe, loader, sha256_of(folder / "model.safetensors"))
        (folder / "evaluate" / "progress.json").unlink(missing_ok=True)
    job.group.barrier()
    return facts


def write_evaluation(
    folder: Path, verdicts: dict[str, NDArray[Any]], recipe: Recipe, loader: Loader, model_sha256: str
) -> dict[str, Any]:
    """Verdicts per image as pgd.parquet, then counts and intervals as pgd.json; returns the latter."""
    temporary = folder / ".pgd.parquet.tmp"
    pq.write_table(pa.table(dict(verdicts)), temporary)
    temporary.replace(folder / "pgd.parquet")
    threat = recipe.threat_model
    facts = {
        "attack": "pgd",
        "norm": threat.norm if threat else None,
        "eps": str(threat.eps) if threat else None,
        "steps": recipe.evaluation.steps,
        "restarts": recipe.evaluation.restarts,
        "step_size": str(recipe.evaluation.step_size),
        **summarise(verdicts),
        "model_sha256": model_sha256,
        "data_sha256": read_manifest(loader.path).sha256,
    }
    atomic_write_json(folder / "pgd.json", facts)
    return facts
