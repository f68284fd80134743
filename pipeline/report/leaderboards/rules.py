"""What leaderboards have in common: a paper, the standard AutoAttack, and images that are prepared as there."""

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

ENOUGH = ""
"""In place of a reason why images are not the leaderboard's."""


class NotAccepted(ValueError):
    """A network, or a run, that a leaderboard does not take; the message says why."""


@dataclass(frozen=True)
class Paper:
    """What a run does not know: where its networks are published."""

    id: str
    """<name of the first author><year><first word of the title>, which is how both leaderboards call entries."""
    title: str
    authors: str
    link: str
    venue: str


def threat_model_of(recipe: Recipe) -> tuple[str, Fraction]:
    """(norm, eps). Errors: NotTheirs without a threat model."""
    if recipe.threat_model is None:
        raise NotAccepted("the recipe has no threat_model")
    return recipe.threat_model.norm, recipe.threat_model.eps


def unchanged(recipe: Recipe, size: int) -> bool:
    """Whether a test image of `size` pixels a side reaches the network as it is in the data set."""
    return recipe.data.image_size == size and recipe.data.augmentation != "random_resized_crop"


def autoattack_result(
    run: RunResult, network: NetworkResult, of_images: Callable[[Path, EvaluationResult], str]
) -> tuple[Path, EvaluationResult]:
    """(file, result) of the network under the whole of AutoAttack, on images for which `of_images` says ENOUGH.

    Errors: NotTheirs, with `of_images`' reason if AutoAttack was run on others only.
    """
    kept = kept_evaluations(network)
    whole = [(path, result) for path, result in kept if _is_standard(result, run.recipe.model.num_classes)]
    if not whole:
        there = ", ".join(f"{result.title} on {result.images:,} images" for _, result in kept)
        raise NotAccepted(
            f"it was judged by {there or 'nothing'}, and only AutoAttack counts: "
            f"python -m launch evaluate {run.folder} --attack autoattack"
        )
    reasons = [of_images(path, result) for path, result in whole]
    if ENOUGH not in reasons:
        raise NotAccepted(reasons[-1])
    return whole[reasons.index(ENOUGH)]


def _is_standard(result: EvaluationResult, classes: int) -> bool:
    budgets: dict[str, Any] = {"attacks": list(ENSEMBLES["autoattack"]), "iterations": ITERATIONS, "queries": QUERIES}
    budgets["targets"] = min(TARGETS, classes - 1)
    same = all(result.settings.get(key) == value for key, value in budgets.items())
    return result.attack == "autoattack" and same
