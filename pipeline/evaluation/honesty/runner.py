"""One look at one finished network, for its honesty checks: what a run and `launch evaluate` share."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.distributed import Group
from pipeline.evaluation.chunks import ChunkStore, Crops, Images, evaluate
from pipeline.evaluation.honesty.checks import Check, checks
from pipeline.evaluation.honesty.exported_file import mask_check, plain_network
from pipeline.evaluation.honesty.probes import Probes
from pipeline.evaluation.measures.base import Verdicts
from pipeline.evaluation.measures.pgd import Pgd
from pipeline.evaluation.runner import Task
from pipeline.models import Network, build_network
from pipeline.models.ema import overlaid
from pipeline.models.export import load_model
from pipeline.models.pruning.score_init import zero
from pipeline.models.pruning.scores import attach_scores, load_state
from pipeline.recipe.schema import Recipe
from pipeline.recipe.stages import Stage
from pipeline.run import checkpoint
from pipeline.run.checkpoint import CheckpointDamaged
from pipeline.run.files import read_json

CHUNK = 50
"""Images in one forward, or evaluation.chunk if that is less: few, as each takes as long as hundreds of PGD's steps."""

log = logging.getLogger(__name__)


def honesty_task(recipe: Recipe, pgd: Pgd, most: int) -> Task:
    """The look at networks that `pgd` judges, on at most so many images."""
    images, chunk = min(recipe.evaluation.honesty_images, most), min(CHUNK, recipe.evaluation.chunk)
    return Task("honesty", Probes(pgd), images, chunk)


def chunk_store(folder: Path, facts: dict[str, Any], live: Network | None) -> ChunkStore:
    """For a `look`, whose columns depend on what there is to compare with."""
    return ChunkStore(folder, facts | {"twins": 1 if live is None else 2})


def look(
    model: Path,
    live: Network | None,
    task: Task,
    loader: Images,
    crops: Crops,
    group: Group,
    *,
    store: ChunkStore,
    on_chunk: Callable[[int, int], bool],
    on_pass: Callable[[], bool],
) -> tuple[Verdicts, list[Check]]:
    """What an honesty task finds of a file, beside the `live` network that was exported, if that is there. Collective.

    Chunks that `store` has are not looked at again. Errors: those of `evaluate`; StopRequested.
    """
    assert isinstance(task.measure, Probes)
    twins = [plain_network(model)] if live is None else [plain_network(model), live.eval()]
    probes = replace(task.measure, twins=tuple(twin.to(group.device) for twin in twins))
    network, ids = load_model(model).to(group.device), task.ids(loader)
    verdicts = evaluate(network, loader, ids, crops, probes, task.chunk, group, on_chunk, store, on_pass)
    return verdicts, _found(verdicts, model, live is not None)


def live_network(recipe: Recipe, folder: Path, stage: Stage) -> Network | None:
    """What was trained, with its scores and masks, from the checkpoint that became the stage's result; on the CPU.

    None, loudly, if that checkpoint is gone or damaged.
    """
    try:
        snapshot = checkpoint.read_checkpoint(
            checkpoint.folder_of(folder, read_json(folder / "result.json")["selected_step"])
        )
    except CheckpointDamaged as error:
        log.warning("%s: the exported file is not compared with the trained network: %s", stage.name, error)
        return None
    network = build_network(recipe.model, recipe.seed, recipe.data.image_size)
    if stage.keep_fraction is not None:
        attach_scores(network, stage.keep_fraction, recipe.sparsity.allocation, zero)
    load_state(network, overlaid(snapshot.model, snapshot.carried))
    return network


def _found(verdicts: Verdicts, model: Path, compared: bool) -> list[Check]:
    listed = [*checks(verdicts), mask_check(model)]
    if compared:
        return listed
    missing = "the checkpoint of the live network is gone or damaged, so that only the file's own parts were compared"
    meaning = "It is not known whether model.safetensors is the network that was trained."
    unknown = Check("exported file", "warn", missing, meaning)
    return [unknown if check.name == unknown.name else check for check in listed]


def made_before(path: Path, facts: dict[str, Any]) -> dict[str, Any] | None:
    """What a file says, if it is of what `facts` describe."""
    try:
        found = read_json(path)
    except ValueError:
        return None
    return found if all(found.get(name) == value for name, value in facts.items()) else None


def say(name: str, found: list[Check]) -> None:
    for check in found:
        if check.verdict == "warn":
            log.warning("%s: honesty check %s: %s. %s", name, check.name, check.figure, check.meaning)
    log.info("%s: %d of %d honesty checks pass", name, sum(c.verdict == "pass" for c in found), len(found))
