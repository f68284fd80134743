"""The stages of a recipe: what each trains, and what it starts from. Imports no torch."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from decimal import Decimal
from fractions import Fraction
from typing import Any, Literal

from pipeline.recipe.attacks import Attack
from pipeline.recipe.fields import canonical_decimal
from pipeline.recipe.methods import (
    DYNAMIC,
    FROM_SCRATCH,
    HYDRA,
    LEARNED,
    PRUNING,
    Allocation,
    MaskSource,
    Method,
    MethodName,
    Structure,
)
from pipeline.recipe.objective import Objective
from pipeline.recipe.phase import Phase
from pipeline.recipe.schema import Recipe
from pipeline.recipe.sparsity import ScoreInit, Tune

PhaseName = Literal[
    "pretrain",
    "prune",
    "finetune",
    "magnitude",
    "random",
    "snip",
    "gradual",
    "flying_bird",
    "flying_bird_plus",
]
"""A method of one stage is a phase of its own."""
DENSE = "dense"
ScoresFrom = Literal["none", "source", "random", "snip", "ones"] | ScoreInit
BASELINE_SCORES: dict[MethodName, ScoresFrom] = {
    "magnitude": "scaled",
    "random": "random",
    "snip": "snip",
    "gradual": "ones",
    "flying_bird": "random",
    "flying_bird_plus": "random",
}


@dataclass(frozen=True)
class Trial:
    """A complete training of a method with learning rates of `sparsity.tune`."""

    stage: str
    """Its last stage."""
    finetune_lr: float
    prune_lr: float | None
    """None for methods without a prune phase."""


@dataclass(frozen=True)
class Stage:
    """One phase at one sparsity; `name` is its folder in the run directory."""

    name: str
    phase: PhaseName
    trained_by: Phase | None
    """How it is optimised; None for the dense network of a recipe that trains none: that of `model.weights`."""
    objective: Objective
    method: Method | None
    """What makes its sparse network; None for the dense network."""
    first_epoch: int
    """Number of epochs before this stage, so that data order and crops continue instead of repeating pretraining's."""
    trains: Literal["weights", "scores"] = "weights"
    keep_fraction: Decimal | None = None
    allocation: Allocation = "uniform"
    structure: Structure = "unstructured"
    round_to: int = 1
    """Of structure channel; see `sparsity.round_to`."""
    starts_from: str | None = None
    """Stage whose selected checkpoint this one starts from."""
    scores_from: ScoresFrom = "none"
    """Initial scores: none, the source stage's, connection sensitivity (snip), random, ones (dense), or
    `sparsity.score_init`."""
    prune_share: Fraction | None = None
    """Share of the stage's steps after which gradual pruning has reached `keep_fraction`."""
    measure: str | None = None
    """How the finished network is evaluated on the test set; None for one that only the next stage uses."""
    attacks: tuple[Attack, ...] = ()
    """Additional attacks on the finished network."""
    trial_of: str | None = None
    """For one of several trials: the name that the stage has without them."""
    trials: tuple[Trial, ...] = ()
    """What it chooses from, for a stage that trains nothing: its network is that of the best trial."""

    @property
    def optimisation(self) -> Phase:
        """How it is optimised, for a stage whose network is not that of `model.weights`."""
        assert self.trained_by is not None, f"{self.name} trains nothing"
        return self.trained_by

    @property
    def epochs(self) -> int:
        """Epochs that it trains."""
        return 0 if self.trials or self.trained_by is None else self.trained_by.epochs

    @property
    def sources(self) -> tuple[str, ...]:
        """Stages whose networks it needs."""
        return tuple(trial.stage for trial in self.trials) or ((self.starts_from,) if self.starts_from else ())

    @property
    def random_key(self) -> str:
        """Its random numbers are keyed by it: those of all trials are the same, and differ by their learning rates."""
        return self.trial_of or self.name

    @property
    def section(self) -> str:
        """The section of `phases` that its optimisation is from, with the schedules of its objective."""
        if self.method is not None and self.method.name in FROM_SCRATCH:
            return "pretrain"
        return self.phase if self.phase in ("pretrain", "prune") else "finetune"

    @property
    def is_dynamic(self) -> bool:
        """Whether its mask changes while weights train."""
        return self.method is not None and self.method.name in DYNAMIC

    @property
    def mask_source(self) -> MaskSource:
        return "binary" if self.is_dynamic else self.allocation

    @property
    def label(self) -> str:
        """Of its method: dense, hydra, magnitude-erk."""
        return DENSE if self.method is None else self.method.label

    @property
    def title(self) -> str:
        """Name of its network in tables and charts: dense, HYDRA, magnitude (ERK)."""
        return DENSE if self.method is None else self.method.title

    @property
    def is_sharpness_aware(self) -> bool:
        """Whether it trains scores by S2AP."""
        return self.trains == "scores" and self.method is not None and self.method.name == "s2ap"

    @property
    def extra_passes(self) -> int:
        """Forward-backward passes per image and step that its method takes in addition to the objective's."""
        return self.objective.update_passes if self.is_sharpness_aware else 0

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
            "total_steps": (self.trained_by.epochs if self.trained_by else 0) * steps_per_epoch,
            "steps_per_epoch": steps_per_epoch,
        }


def stages_of(recipe: Recipe) -> list[Stage]:
    """All stages of a recipe, each after the one that it starts from.

    A fixed mask comes from the scaled initialisation (magnitude, the paper's LWM), random scores, or connection
    sensitivity (snip); under it, the dense network is finetuned at the finetune phase's learning rate, by default for
    as many epochs as prune and finetune have together. Gradual pruning does the same under a mask that starts dense,
    and prunes over prune's share of these epochs. Flying Bird trains a
    sparse network from scratch, with pretrain's optimisation and as many epochs as all phases have.

    Without a pretrain phase the dense network is that of `model.weights`. Without a finetune phase the pruned network
    itself is evaluated.
    """
    dense = _stage(recipe, "pretrain", "pretrain", recipe.phases.pretrain, None, 0, measure=recipe.objective.measure)
    sparsity = recipe.sparsity
    networks = ((keep, method) for keep in sparsity.keep_fractions for method in sparsity.methods_at(keep))
    methods = (_with_trials(_sparse(recipe, keep, method), sparsity.tune) for keep, method in networks)
    return [dense, *itertools.chain.from_iterable(methods)]


def _stage(
    recipe: Recipe,
    name: str,
    phase: PhaseName,
    trained_by: Phase | None,
    method: Method | None,
    first_epoch: int,
    **fields: Any,
) -> Stage:
    objective = (trained_by and trained_by.objective) or recipe.objective
    attacks = recipe.evaluation.attacks if fields.get("measure") else ()
    if phase == "pretrain":  # it is the source of transferred examples
        attacks = tuple(attack for attack in attacks if attack.name != "transfer")
    return Stage(name, phase, trained_by, objective, method, first_epoch, attacks=attacks, **fields)


def _sparse(recipe: Recipe, keep: Decimal, method: Method) -> list[Stage]:
    """The stages of one method at one sparsity. The recipe's own HYDRA has no folder of its own."""
    phases, sparsity, measure = recipe.phases, recipe.sparsity, recipe.objective.measure
    dense = phases.pretrain.epochs if phases.pretrain else 0
    pruned = dense + phases.prune.epochs
    folder = f"keep-{canonical_decimal(keep)}"
    common: dict[str, Any] = {"keep_fraction": keep, "allocation": method.allocation or sparsity.allocation}
    common |= {"structure": method.structure or sparsity.structure, "round_to": sparsity.round_to}
    if method.name in DYNAMIC and common["allocation"] in LEARNED:
        common["allocation"] = "uniform"  # from which learned shares start
    if method.name in PRUNING:
        folder = folder if method == HYDRA else f"{folder}/{method.label}"
        fields = common | {"trains": "scores", "scores_from": sparsity.score_init, "starts_from": "pretrain"}
        fields |= {"measure": measure if phases.finetune is None else None}
        prune = _stage(recipe, f"{folder}/prune", "prune", phases.prune, method, dense, **fields)
        if phases.finetune is None:
            return [prune]
        fields = common | {"starts_from": prune.name, "scores_from": "source", "measure": measure}
        return [prune, _stage(recipe, f"{folder}/finetune", "finetune", phases.finetune, method, pruned, **fields)]
    assert phases.finetune is not None, "the recipe's validation"
    assert method.name not in ("hydra", "s2ap"), "they have a prune phase"
    if method.name in FROM_SCRATCH:
        assert phases.pretrain is not None, "the recipe's validation"
        epochs, objective = pruned + phases.finetune.epochs, phases.finetune.objective
        whole = phases.pretrain.model_copy(update={"epochs": epochs, "objective": objective})
        fields = common | {"scores_from": BASELINE_SCORES[method.name], "measure": measure}
        return [_stage(recipe, f"{folder}/{method.label}", method.name, whole, method, 0, **fields)]
    extra = phases.prune.epochs if sparsity.baseline_epochs == "same_total_epochs" else 0
    finetune = phases.finetune.model_copy(update={"epochs": extra + phases.finetune.epochs})
    fields = common | {"starts_from": "pretrain", "scores_from": BASELINE_SCORES[method.name], "measure": measure}
    if method.name == "gradual":
        fields["prune_share"] = Fraction(phases.prune.epochs, phases.prune.epochs + phases.finetune.epochs)
    return [_stage(recipe, f"{folder}/{method.label}", method.name, finetune, method, dense, **fields)]


def _with_trials(stages: list[Stage], tune: Tune | None) -> list[Stage]:
    """A method's stages, the last one once per trial, and then, under its name, the stage that chooses the best.

    Trials with the same learning rate of the prune phase share a prune stage.
    """
    if tune is None:
        return stages
    *earlier, last = stages
    prunes: dict[float | None, Stage] = {}
    finetunes: list[Stage] = []
    trials: list[Trial] = []
    for number, (finetune_lr, prune_lr) in enumerate(tune.trials, 1):
        finetune, used_prune_lr = _trial(last, number, finetune_lr, measure=None, attacks=()), None
        if earlier:
            (prune,) = earlier
            prune = prunes.setdefault(prune_lr, prune if prune_lr is None else _trial(prune, number, prune_lr))
            finetune, used_prune_lr = replace(finetune, starts_from=prune.name), prune.optimisation.lr
        finetunes.append(finetune)
        trials.append(Trial(finetune.name, finetune_lr, used_prune_lr))
    return [*prunes.values(), *finetunes, replace(last, starts_from=None, trials=tuple(trials))]


def _trial(stage: Stage, number: int, lr: float, **changes: Any) -> Stage:
    folder, _, name = stage.name.rpartition("/")
    optimisation = stage.optimisation.model_copy(update={"lr": lr})
    name = f"{folder}/trial-{number}/{name}"
    return replace(stage, name=name, trained_by=optimisation, trial_of=stage.name, **changes)
