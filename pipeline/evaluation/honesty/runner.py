"""Runs the honesty checks on one exported network; shared by training and `launch evaluate`."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from pipeline.evaluation.chunks import ChunkStore
from pipeline.evaluation.honesty.checks import build_checks
from pipeline.evaluation.honesty.exported_file import mask_check, plain_network
from pipeline.evaluation.honesty.probes import Probes
from pipeline.evaluation.measures.base import Verdicts
from pipeline.evaluation.measures.pgd import Pgd
from pipeline.evaluation.result import Check, HonestyResult
from pipeline.evaluation.runner import Evaluator
from pipeline.evaluation.spec import EvaluationSpec
from pipeline.models import Network, build_network
from pipeline.models.ema import overlaid
from pipeline.models.export import load_model
from pipeline.models.pruning.score_init import zero
from pipeline.models.pruning.scores import Scores
from pipeline.models.state import load_state
from pipeline.recipe.schema import Recipe
from pipeline.recipe.stages import Stage
from pipeline.run import checkpoint
from pipeline.run.checkpoint import CheckpointDamaged
from pipeline.run.layout import StageFolder
from pipeline.run.records import StageResult

CHUNK = 50
"""Images per chunk, unless evaluation.chunk is less: few, because an image costs as much as hundreds of PGD steps."""

log = logging.getLogger(__name__)


def honesty_spec(recipe: Recipe, pgd: Pgd, most: int) -> EvaluationSpec:
    """The checks of networks evaluated by `pgd`, on at most `most` images."""
    images, chunk = min(recipe.evaluation.honesty_images, most), min(CHUNK, recipe.evaluation.chunk)
    return EvaluationSpec("honesty", Probes(pgd), images, chunk)


def run_honesty_checks(
    evaluator: Evaluator, spec: EvaluationSpec, file: Path, trained: Network | None, chunks: Path
) -> tuple[HonestyResult, Verdicts, ChunkStore]:
    """Check the network in `file`, also against the `trained` network if it is given. Collective.

    Chunks already in the store in `chunks` are not repeated; the caller removes the store once it has saved the result.
    Errors: those of `Evaluator.verdicts` and of `load_model`.
    """
    assert isinstance(spec.measure, Probes)
    device, header = evaluator.group.device, spec.header(evaluator.images, file)
    twins = [plain_network(file)] if trained is None else [plain_network(file), trained.eval()]
    probes = replace(spec.measure, twins=tuple(twin.to(device) for twin in twins))
    store = ChunkStore(chunks, header.to_json() | {"twins": len(twins)})  # the columns depend on them
    part = replace(evaluator, images=evaluator.images.spread(spec.images))
    verdicts = part.verdicts(load_model(file).to(device), probes, spec.chunk, store)
    checks = [*build_checks(verdicts), mask_check(file)]
    if trained is None:
        checks = [_not_compared(check) if check.name == "exported file" else check for check in checks]
    return HonestyResult(**header.model_dump(), checks=tuple(checks)), verdicts, store


def trained_network(recipe: Recipe, folder: Path, stage: Stage) -> Network | None:
    """The stage's network with its scores and masks, from the checkpoint that was selected as its result; on the CPU.

    None, with a warning, if that checkpoint is missing or damaged.
    """
    try:
        snapshot = checkpoint.read_checkpoint(
            checkpoint.folder_of(folder, StageResult.read(StageFolder(folder).result).selected_step or 0)
        )
    except CheckpointDamaged as error:
        log.warning("%s: the exported file is not compared with the trained network: %s", stage.name, error)
        return None
    network = build_network(recipe.model, recipe.seed, recipe.data.image_size)
    keep = stage.keep_fraction
    structure = stage.structure, stage.round_to
    scores = None if keep is None else Scores.attach(network, keep, stage.mask_source, zero, *structure)
    load_state(network, overlaid(snapshot.model, snapshot.train_state), scores)
    return network


def _not_compared(check: Check) -> Check:
    reason = "the trained network's checkpoint is missing or damaged, so the file was compared only with itself"
    meaning = "Whether model.safetensors is the network that was trained is unknown."
    return Check(name=check.name, status="warn", figure=reason, meaning=meaning)


def log_checks(name: str, checks: tuple[Check, ...]) -> None:
    """Log every warning of network `name`, and how many checks pass."""
    for check in checks:
        if check.status == "warn":
            log.warning("%s: honesty check %s: %s. %s", name, check.name, check.figure, check.meaning)
    log.info("%s: %d of %d honesty checks pass", name, sum(c.status == "pass" for c in checks), len(checks))
