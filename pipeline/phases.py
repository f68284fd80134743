"""Phases as data: which stages a recipe has, what each trains, and what it starts from. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal

from pipeline.recipe import Recipe
from pipeline.recipe_fields import canonical_decimal
from pipeline.recipe_sections import Phase


@dataclass(frozen=True)
class Stage:
    """One phase at one sparsity; `name` is its folder in the run directory."""

    name: str
    phase: Literal["pretrain", "prune", "finetune", "magnitude"]
    trains: Literal["weights", "scores"]
    keep_fraction: Decimal | None
    optimisation: Phase
    starts_from: str | None
    """Stage whose last (or best) checkpoint this one begins with."""
    scores_from: Literal["none", "weights", "source"]
    """No scores; scaled initialisation from the weights (HYDRA eq. 3); or the scores of the source stage."""
    measure: str | None
    """How the finished network is judged on the test set; None for one that only the next stage needs."""
    first_epoch: int
    """Epochs that came before: data order and crops go on from there instead of repeating pretraining's."""

    def describe(self, steps_per_epoch: int) -> dict[str, Any]:
        """What `stage.json` says for people and for the progress display."""
        return {
            "stage": self.name,
            "phase": self.phase,
            "keep_fraction": None if self.keep_fraction is None else canonical_decimal(self.keep_fraction),
            "total_steps": self.optimisation.epochs * steps_per_epoch,
            "steps_per_epoch": steps_per_epoch,
        }


def stages_of(recipe: Recipe) -> list[Stage]:
    """All stages of a recipe in an order in which each follows what it starts from.

    The magnitude baseline (the paper's LWM) finetunes under the mask that the scaled initialisation gives, with the
    finetune phase's learning rate; by default for as many epochs as prune and finetune have together.
    """
    phases, sparsity, measure = recipe.phases, recipe.sparsity, recipe.objective.measure
    dense, pruned = phases.pretrain.epochs, phases.pretrain.epochs + phases.prune.epochs
    stages = [Stage("pretrain", "pretrain", "weights", None, phases.pretrain, None, "none", measure, 0)]
    baseline_epochs = phases.finetune.epochs
    if sparsity.magnitude_baseline == "same_total_epochs":
        baseline_epochs += phases.prune.epochs
    baseline = phases.finetune.model_copy(update={"epochs": baseline_epochs})
    for keep in sparsity.keep_fractions:
        folder = f"keep-{canonical_decimal(keep)}"
        stages += [
            Stage(f"{folder}/prune", "prune", "scores", keep, phases.prune, "pretrain", "weights", None, dense),
            Stage(
                f"{folder}/finetune",
                "finetune",
                "weights",
                keep,
                phases.finetune,
                f"{folder}/prune",
                "source",
                measure,
                pruned,
            ),
        ]
        if sparsity.magnitude_baseline != "none":
            stages.append(
                Stage(
                    f"{folder}/magnitude",
                    "magnitude",
                    "weights",
                    keep,
                    baseline,
                    "pretrain",
                    "weights",
                    measure,
                    dense,
                )
            )
    return stages
