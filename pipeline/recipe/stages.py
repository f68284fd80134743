"""Phases as data: which stages a recipe has, what each trains, and what it starts from. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal, get_args

from pipeline.recipe.attacks import Attack
from pipeline.recipe.fields import canonical_decimal
from pipeline.recipe.objective import Objective
from pipeline.recipe.schema import Recipe
from pipeline.recipe.sections import Baseline, Phase, ScoreInit

PhaseName = Literal["pretrain", "prune", "finetune"] | Baseline
NETWORK_OF_PHASE: dict[PhaseName, str] = {
    "pretrain": "dense",
    "prune": "HYDRA",
    "finetune": "HYDRA",
    "magnitude": "magnitude",
    "random": "random",
    "snip": "SNIP",
}
"""What the network of a phase is called in tables and pictures."""
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
    """Epochs that came before: data order and crops go on from there instead of repeating pretraining's."""
    trains: Literal["weights", "scores"] = "weights"
    keep_fraction: Decimal | None = None
    starts_from: str | None = None
    """Stage whose last (or best) checkpoint this one begins with."""
    scores_from: ScoresFrom = "none"
    """No scores; those of the source stage; scaled from the weights (HYDRA eq. 3); drawn; or connection sensitivity."""
    measure: str | None = None
    """How the finished network is judged on the test set; None for one that only the next stage needs."""
    attacks: tuple[Attack, ...] = ()
    """What it is attacked with besides."""

    @property
    def is_baseline(self) -> bool:
        return self.phase in get_args(Baseline)

    @property
    def evaluations(self) -> tuple[str, ...]:
        """What the files of its evaluations are called, its measure's first."""
        return () if self.measure is None else (self.measure, *(attack.label for attack in self.attacks))

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

    A baseline finetunes the dense network under a mask that stays, with the finetune phase's learning rate; by default
    for as many epochs as prune and finetune have together. The mask is that of the scaled initialisation (magnitude,
    the paper's LWM), of random scores, or of connection sensitivity (snip). Without a finetune phase the pruned network
    itself is judged.
    """
    phases, sparsity, measure = recipe.phases, recipe.sparsity, recipe.objective.measure
    dense, pruned = phases.pretrain.epochs, phases.pretrain.epochs + phases.prune.epochs

    def stage(name: str, phase: PhaseName, optimisation: Phase, first_epoch: int, **facts: Any) -> Stage:
        objective = optimisation.objective or recipe.objective
        attacks = recipe.evaluation.attacks if facts.get("measure") else ()
        if phase == "pretrain":  # to itself nothing is transferred
            attacks = tuple(attack for attack in attacks if attack.name != "transfer")
        return Stage(name, phase, optimisation, objective, first_epoch, attacks=attacks, **facts)

    stages = [stage("pretrain", "pretrain", phases.pretrain, 0, measure=measure)]
    for keep in sparsity.keep_fractions:
        folder = f"keep-{canonical_decimal(keep)}"
        from_dense = {"keep_fraction": keep, "starts_from": "pretrain"}
        learns = {"trains": "scores", "scores_from": sparsity.score_init}
        search = measure if phases.finetune is None else None
        prune = stage(f"{folder}/prune", "prune", phases.prune, dense, measure=search, **learns, **from_dense)
        stages.append(prune)
        if phases.finetune is None:
            continue
        from_pruned = {"keep_fraction": keep, "starts_from": prune.name, "scores_from": "source"}
        stages.append(stage(f"{folder}/finetune", "finetune", phases.finetune, pruned, measure=measure, **from_pruned))
        fair = phases.prune.epochs if sparsity.baseline_epochs == "same_total_epochs" else 0
        longer = phases.finetune.model_copy(update={"epochs": fair + phases.finetune.epochs})
        for name in sparsity.baselines:
            frozen = {"scores_from": BASELINE_SCORES[name], "measure": measure}
            stages.append(stage(f"{folder}/{name}", name, longer, dense, **frozen, **from_dense))
    return stages
