"""Requirements shared by the leaderboards: a paper, standard AutoAttack, and their own test images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from pipeline.evaluation.measures.autoattack import ENSEMBLES, ITERATIONS, QUERIES, TARGETS
from pipeline.evaluation.result import EvaluationResult
from pipeline.recipe.schema import Recipe
from pipeline.report.extra_evaluations import kept_evaluations
from pipeline.report.results import NetworkResult, RunResult

MATCHING = ""
"""Images are the leaderboard's: no reason against them."""


class NotAccepted(ValueError):
    """A leaderboard does not accept a network or a run; the message says why."""


@dataclass(frozen=True)
class Paper:
    """The publication of a run's networks."""

    id: str
    """<first author><year><first word of the title>, the id of an entry on both leaderboards."""
    title: str
    authors: str
    link: str
    venue: str


def threat_model_of(recipe: Recipe) -> tuple[str, Fraction]:
    """(norm, eps). Errors: NotAccepted without a threat model."""
    if recipe.threat_model is None:
        raise NotAccepted("the recipe has no threat_model")
    return recipe.threat_model.norm, recipe.threat_model.eps


def uses_original_images(recipe: Recipe, size: int) -> bool:
    """Whether test images of `size` pixels a side reach the network neither resized nor cropped."""
    return recipe.data.image_size == size and recipe.data.augmentation != "random_resized_crop"


def autoattack_result(
    run: RunResult, network: NetworkResult, image_mismatch: Callable[[Path, EvaluationResult], str]
) -> tuple[Path, EvaluationResult]:
    """(file, result) of standard AutoAttack on the network, on images for which `image_mismatch` returns MATCHING.

    Errors: NotAccepted, with the reason of `image_mismatch` if AutoAttack was run on other images only.
    """
    evaluations = kept_evaluations(network)
    standard = [(path, result) for path, result in evaluations if _is_standard(result, run.recipe.model.num_classes)]
    if not standard:
        others = ", ".join(f"{result.title} on {result.images:,} images" for _, result in evaluations)
        raise NotAccepted(
            f"it was evaluated by {others or 'nothing'}, and only standard AutoAttack counts: "
            f"python -m launch evaluate {run.folder} --attack autoattack"
        )
    reasons = [image_mismatch(path, result) for path, result in standard]
    if MATCHING not in reasons:
        raise NotAccepted(reasons[-1])
    return standard[reasons.index(MATCHING)]


def _is_standard(result: EvaluationResult, classes: int) -> bool:
    budgets: dict[str, Any] = {"attacks": list(ENSEMBLES["autoattack"]), "iterations": ITERATIONS, "queries": QUERIES}
    budgets["targets"] = min(TARGETS, classes - 1)
    has_budgets = all(result.settings.get(key) == value for key, value in budgets.items())
    return result.attack == "autoattack" and has_budgets
