"""One evaluation of one finished network, from its file to kept verdicts: what a run and `launch evaluate` share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from pipeline.distributed import Group
from pipeline.evaluation.chunks import ChunkStore, Crops, Images, evaluate, write_verdicts
from pipeline.evaluation.corruptions.measure import Corrupted
from pipeline.evaluation.measures.autoattack import Ensemble
from pipeline.evaluation.measures.base import Measure, Verdicts, summarise
from pipeline.evaluation.measures.pgd import Pgd
from pipeline.evaluation.measures.randomized_smoothing import Certified
from pipeline.evaluation.measures.transfer import Transfer
from pipeline.evaluation.measures.verified_bounds import Proved
from pipeline.models.export import load_model
from pipeline.recipe.attacks import Attack
from pipeline.recipe.schema import Recipe
from pipeline.run.files import atomic_write_json, sha256_of


@dataclass(frozen=True)
class Task:
    """One evaluation: how networks are judged, and on what."""

    label: str
    """What its files are called."""
    measure: Measure
    images: int | None
    """How many test images; None means all of them."""
    chunk: int
    passes: int | None = None
    """Through the network for a chunk, where that is the same for all."""

    def ids(self, loader: Images) -> NDArray[np.int64]:
        """The samples, evenly spread over the file, which may be sorted by class."""
        total = loader.num_samples
        if self.images is None or self.images >= total:
            return np.arange(total)
        return np.arange(self.images) * total // self.images

    def facts(self, loader: Images, model_sha256: str) -> dict[str, Any]:
        """Everything that verdicts are a function of."""
        prepared = loader.identity.get("preprocessing")
        return {
            "attack": self.measure.name,
            "title": f"{self.measure.title}; {prepared}" if prepared else self.measure.title,
            "settings": self.measure.settings,
            "chunk": self.chunk,
            "model_sha256": model_sha256,
            **loader.identity,
            "images": len(self.ids(loader)),
        }


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


def task_of(attack: Attack, recipe: Recipe, dense: Path, group: Group) -> Task:
    """An attack of a recipe as it is run; `dense` is the file whose examples are transferred."""
    threat_model, evaluation, passes = recipe.threat_model, recipe.evaluation, None
    if attack.name == "pgd" or attack.name == "transfer":
        given = attack.model_dump(include={"steps", "restarts"}, exclude_none=True)
        given["step_size"] = attack.step_size or evaluation.step_size
        measure = Pgd.of(threat_model, evaluation.model_copy(update=given), recipe.seed)
        if attack.name == "transfer":
            measure = Transfer(load_model(dense).to(group.device), sha256_of(dense), measure)
    elif attack.name == "corruptions":
        measure = Corrupted(recipe.data.image_size, recipe.seed)
        passes = measure.passes
    else:
        assert threat_model is not None
        measure = Ensemble(attack.name, threat_model, recipe.model.num_classes, recipe.seed)
    return Task(attack.label, measure, attack.images, attack.chunk or evaluation.chunk, passes)


def judge(
    network: nn.Module,
    facts: dict[str, Any],
    task: Task,
    loader: Images,
    crops: Crops,
    group: Group,
    *,
    store: ChunkStore,
    on_chunk: Callable[[int, int], bool],
    on_pass: Callable[[], bool],
) -> tuple[dict[str, Any], Verdicts]:
    """(facts with counts, verdicts), on every rank; chunks that `store` has are not judged again. Collective.

    Errors: StopRequested if `on_chunk` or `on_pass` says so.
    """
    ids = task.ids(loader)
    verdicts = evaluate(network, loader, ids, crops, task.measure, task.chunk, group, on_chunk, store, on_pass)
    return facts | summarise(verdicts), verdicts


def keep(folder: Path, label: str, facts: dict[str, Any], verdicts: Verdicts) -> None:
    """Write the verdicts, and then the counts, whose file says that the evaluation is done."""
    write_verdicts(folder / f"{label}.parquet", verdicts)
    atomic_write_json(folder / f"{label}.json", facts)
