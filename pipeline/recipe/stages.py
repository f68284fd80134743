"""The stages of a recipe: what each trains, and what it starts from. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal, get_args

from pipeline.recipe.attacks import Attack
from pipeline.recipe.fields import canonical_decimal
from pipeline.recipe.objective import Objective
from pipeline.recipe.phase import Phase
from pipeline.recipe.schema import Recipe
from pipeline.recipe.sections import Baseline, ScoreInit

PhaseName = Literal["pretrain", "prune", "finetune"] | Baseline
NETWORK_OF_PHASE: dict[PhaseName, str] = {
    "pretrain": "dense",
    "prune": "HYDRA",
    "finetune": "HYDRA",
    "magnitude": "magnitude",
    "random": "random",
    "snip": "SNIP",
}
"""Phase -> name of its network in tables and charts."""
ScoresFrom = Literal["none", "source", "random", "snip"] | ScoreInit
BASELINE_SCORES: dict[Baseline, ScoresFrom] = {"magnitude": "scaled", "random": "random", "snip": "snip"}


@dataclass(frozen=True)
class Stage:
    """One phase at one sparsity; `name` is its folder in the run directory."""

    name: str
    phase: PhaseName
    optimisation: Phase
    objective: Objective
    first_epoch: int
    """Number of epochs before this stage, so that data order and crops continue instead of repeating pretraining's."""
    trains: Literal["weights", "scores"] = "weights"
    keep_fraction: Decimal | None = None
    starts_from: str | None = None
    """Stage whose selected checkpoint this one starts from."""
    scores_from: ScoresFrom = "none"
    """Initial scores: none, the source stage's, connection sensitivity (snip), random, or `sparsity.score_init`."""
    measure: str | None = None
    """How the finished network is evaluated on the test set; None for one that only the next stage uses."""
    attacks: tuple[Attack, ...] = ()
    """Additional attacks on the finished network."""

    @property
    def is_baseline(self) -> bool:
        return self.phase in get_args(Baseline)

    @property
    def evaluations(self) -> tuple[str, ...]:
        """Stems of the file names of its evaluations, its measure's first."""
        return () if self.measure is None else (self.measure, *(attack.label for attack in self.attacks))

    def describe(self, steps_per_epoch: int) -> dict[str, Any]:
        """Contents of `stage.json`, for people and for the progress display."""
        return {
            "stage": self.name,
            "phase": self.phase,
            "keep_fraction": None if self.keep_fraction is None else canonical_decimal(self.keep_fraction),
            "total_steps": self.optimisation.epochs * steps_per_epoch,
            "steps_per_epoch": steps_per_epoch,
        }


def stages_of(recipe: Recipe) -> list[Stage]:
    """All stages of a recipe, each after the one that it starts from.

    A baseline finetunes the dense network under a fixed mask at the finetune phase's learning rate, by default for as
    many epochs as prune and finetune have together. The mask comes from the scaled initialisation (magnitude, the
    paper's LWM), random scores, or connection sensitivity (snip). Without a finetune phase the pruned network itself
    is evaluated.
    """
    phases, sparsity, measure = recipe.phases, recipe.sparsity, recipe.objective.measure
    dense, pruned = phases.pretrain.epochs, phases.pretrain.epochs + phases.prune.epochs

    def stage(name: str, phase: PhaseName, optimisation: Phase, first_epoch: int, **fields: Any) -> Stage:
        objective = optimisation.objective or recipe.objective
        attacks = recipe.evaluation.attacks if fields.get("measure") else ()
        if phase == "pretrain":  # it is the source of transferred examples
            attacks = tuple(attack for attack in attacks if attack.name != "transfer")
        return Stage(name, phase, optimisation, objective, first_epoch, attacks=attacks, **fields)

    stages = [stage("pretrain", "pretrain", phases.pretrain, 0, measure=measure)]
    for keep in sparsity.keep_fractions:
        folder = f"keep-{canonical_decimal(keep)}"
        from_dense = {"keep_fraction": keep, "starts_from": "pretrain"}
        trains_scores = {"trains": "scores", "scores_from": sparsity.score_init}
        search = measure if phases.finetune is None else None
        prune = stage(f"{folder}/prune", "prune", phases.prune, dense, measure=search, **trains_scores, **from_dense)
        stages.append(prune)
        if phases.finetune is None:
            continue
        from_pruned = {"keep_fraction": keep, "starts_from": prune.name, "scores_from": "source"}
        stages.append(stage(f"{folder}/finetune", "finetune", phases.finetune, pruned, measure=measure, **from_pruned))
        extra = phases.prune.epochs if sparsity.baseline_epochs == "same_total_epochs" else 0
        baseline = phases.finetune.model_copy(update={"epochs": extra + phases.finetune.epochs})
        for name in sparsity.baselines:
            fixed_mask = {"scores_from": BASELINE_SCORES[name], "measure": measure}
            stages.append(stage(f"{folder}/{name}", name, baseline, dense, **fixed_mask, **from_dense))
    return stages
