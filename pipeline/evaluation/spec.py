"""How a recipe's networks are evaluated on the test set: by the recipe's own measure or by a further attack."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.evaluation.corruptions.measure import Corrupted
from pipeline.evaluation.images import EvaluationImages
from pipeline.evaluation.measures.autoattack import Ensemble
from pipeline.evaluation.measures.base import Measure
from pipeline.evaluation.measures.pgd import Pgd
from pipeline.evaluation.measures.randomized_smoothing import Certified
from pipeline.evaluation.measures.transfer import Transfer
from pipeline.evaluation.measures.verified_bounds import Proved
from pipeline.evaluation.result import EvaluationHeader
from pipeline.models.export import load_model
from pipeline.recipe.attacks import Attack
from pipeline.recipe.schema import Recipe
from pipeline.recipe.technique import Smoothing
from pipeline.run.files import sha256_of


@dataclass(frozen=True)
class EvaluationSpec:
    """One evaluation, independent of the network: a measure and a number of images."""

    label: str
    """Stem of its result files."""
    measure: Measure
    images: int | None
    """Number of test images; None means all."""
    chunk: int
    passes: int | None = None
    """Forward passes per chunk, if constant."""

    def header(self, images: EvaluationImages, file: Path) -> EvaluationHeader:
        """The header of this evaluation of the network in `file`, on up to `self.images` of `images`."""
        identity = images.loader.identity
        preprocessing = identity.get("preprocessing")
        values = {
            "attack": self.measure.name,
            "title": f"{self.measure.title}; {preprocessing}" if preprocessing else self.measure.title,
            "settings": self.measure.settings,
            "chunk": self.chunk,
            "model_sha256": sha256_of(file),
            **identity,
            "images": len(images.spread(self.images).ids),
        }
        return EvaluationHeader.model_validate(values)


def recipe_measure(recipe: Recipe) -> Measure:
    """The measure by which every network of a recipe is evaluated."""
    if isinstance(recipe.objective, Smoothing):
        assert recipe.threat_model is not None
        return Certified.of(float(recipe.objective.sigma), recipe.threat_model, recipe.evaluation, recipe.seed)
    if recipe.objective.measure == "verified":
        assert recipe.threat_model is not None
        return Proved(recipe.threat_model, recipe.evaluation.bounds == "symbolic")
    return Pgd.of(recipe.threat_model, recipe.evaluation, recipe.seed)


def evaluation_spec(recipe: Recipe, attack: Attack | None, source: Path, device: torch.device) -> EvaluationSpec:
    """The evaluation by a further attack, or by the recipe's own measure if `attack` is None.

    `source` is the model file of the network that `transfer` attacks; it is loaded onto `device`.
    """
    threat_model, evaluation, passes = recipe.threat_model, recipe.evaluation, None
    if attack is None:
        measure = recipe_measure(recipe)
        return EvaluationSpec(measure.name, measure, evaluation.images, evaluation.chunk)
    if attack.name == "pgd" or attack.name == "transfer":
        overrides = attack.model_dump(include={"steps", "restarts"}, exclude_none=True)
        overrides["step_size"] = attack.step_size or evaluation.step_size
        measure = Pgd.of(threat_model, evaluation.model_copy(update=overrides), recipe.seed)
        if attack.name == "transfer":
            measure = Transfer(load_model(source).to(device), sha256_of(source), measure)
    elif attack.name == "corruptions":
        measure = Corrupted(recipe.data.image_size, recipe.seed)
        passes = measure.passes
    else:
        assert threat_model is not None
        measure = Ensemble(attack.name, threat_model, recipe.model.num_classes, recipe.seed)
    return EvaluationSpec(attack.label, measure, attack.images, attack.chunk or evaluation.chunk, passes)
