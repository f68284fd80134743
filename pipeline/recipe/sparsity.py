"""The recipe's section of sparse networks. Imports no torch."""

from __future__ import annotations

from decimal import Decimal
from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.recipe.fields import Count, KeepFraction, Real, Section, canonical_decimal
from pipeline.recipe.methods import (
    FROM_SCRATCH,
    HYDRA,
    LEARNED,
    OF_CHANNELS,
    PRUNING,
    Allocation,
    Baseline,
    Method,
    Structure,
    density_of,
)

BatchNormMode = Literal["trained", "frozen"]
ScoreInit = Literal["scaled", "kaiming_uniform", "kaiming_normal", "xavier_uniform", "xavier_normal"]


LearningRate = Annotated[Real, Field(gt=0)]


class Tune(Section):
    """Learning rates to choose from. Every method gets the same number of trials; trial i has the rates at i."""

    finetune_lr: tuple[LearningRate, ...] = Field(examples=["[0.01, 0.03, 0.1]"])
    """Of the finetune phase, and of methods of one stage."""
    prune_lr: tuple[LearningRate, ...] | None = Field(default=None, examples=["[0.1, 0.1, 0.05]"])
    """Of the prune phase, for methods that have one; null: phases.prune.lr in every trial."""

    @property
    def trials(self) -> list[tuple[float, float | None]]:
        """(finetune_lr, prune_lr), the latter None where phases.prune.lr applies."""
        return list(zip(self.finetune_lr, self.prune_lr or (None,) * len(self.finetune_lr), strict=True))

    @model_validator(mode="after")
    def _trials_differ(self) -> Tune:
        finetune, prune = list(self.finetune_lr), self.prune_lr
        if len(finetune) < 2:
            raise ValueError(f"finetune_lr {finetune} is no choice; name at least two, for example [0.01, 0.03, 0.1]")
        if prune is not None and len(prune) != len(finetune):
            raise ValueError(
                f"finetune_lr {finetune} and prune_lr {list(prune)} differ in length; each trial needs one of both, or "
                "set prune_lr to null"
            )
        if len(set(self.trials)) < len(finetune):
            pairs = finetune if prune is None else self.trials
            raise ValueError(f"two trials are the same: {pairs}; change or remove one")
        return self


class Sparsity(Section):
    """Which pruned networks are derived from the dense one."""

    keep_fractions: tuple[KeepFraction, ...]
    allocation: Allocation = "uniform"
    """How the budget of connections is allocated to layers. uniform: the same fraction of each (the paper). erk:
    Erdos-Renyi-kernel densities (Evci et al. 2020). global: by rank among the scores of all layers, so that the prune
    phase learns the allocation too. learned: global, with one learned factor per layer that multiplies its scores
    (after Zhao and Wressnegger 2023). harp: one learned share per layer, with a penalty for the budget (HARP, as its
    authors have it); the finished network has the exact budget."""
    structure: Structure = "unstructured"
    """What of a layer is kept or pruned together. 2:4, 1:4, 4:8: N of every M consecutive input channels stay, those of
    largest importance, so that keep_fractions is N/M, of every layer. 1x4, 4x1, 16x16: blocks of so many outputs times
    inputs, whose importance is the sum over their connections. A layer that the structure does not divide is
    unstructured, and keeps the same fraction. channel: channels, each with all that writes or reads it, so that
    `launch export` removes them; keep_fractions are of the multiply-accumulates, allocated by importance per cost
    (allocation: global) or as the same fraction of channels everywhere (uniform, which destroys networks)."""
    round_to: Count = Field(default=1, ge=1)
    """With structure channel, layers keep a multiple of so many channels, or all; 8 suits most processors."""
    score_init: ScoreInit = "scaled"
    """Initial scores of the prune phase: scaled weights (the paper), or random."""
    score_weight_decay: Real | None = Field(default=None, ge=0)
    """Weight decay of the scores; null: that of the prune phase, as in the reference code."""
    batchnorm: BatchNormMode = "trained"
    """BatchNorm in the prune phase: trained, with running statistics updated, or frozen as in the dense network."""
    baselines: tuple[Baseline, ...] = (Method(name="magnitude"),)
    """What HYDRA is compared with: the dense network finetuned under a mask that is not learned or becomes sparser, a
    network that is sparse from the start, HYDRA with another allocation or structure, or with sharpness-aware scores:
    [magnitude, {name: hydra, allocation: harp}, {name: hydra, structure: "2:4"}, s2ap]."""
    baseline_epochs: Literal["same_total_epochs", "finetune_epochs"] = "same_total_epochs"
    """Epochs of a baseline: as many as HYDRA's prune and finetune (equal budget), or finetune only (the paper)."""
    tune: Tune | None = None
    """Learning rates that every method chooses from, on the held-out images; null: those of the phases."""

    @property
    def structures(self) -> list[Structure]:
        """Of all methods, each once."""
        return list(dict.fromkeys(method.structure or self.structure for method in (HYDRA, *self.baselines)))

    def methods_at(self, keep_fraction: Decimal) -> list[Method]:
        """HYDRA and the baselines that have a network of this keep_fraction: N:M structures have one alone."""
        methods = (HYDRA, *self.baselines)
        return [method for method in methods if density_of(method.structure or self.structure) in (None, keep_fraction)]

    @model_validator(mode="after")
    def _distinct(self) -> Sparsity:
        labels = [method.label for method in self.baselines]
        if len(set(labels)) != len(labels):
            raise ValueError(f"baselines {labels} name one twice; remove the duplicate")
        names = [canonical_decimal(k) for k in self.keep_fractions]
        if not names:
            raise ValueError("keep_fractions is empty; name at least one, for example [0.1]")
        if len(set(names)) != len(names):
            raise ValueError(f"keep_fractions {names} name one fraction twice; remove the duplicate")
        return self

    @model_validator(mode="after")
    def _baselines_differ_from_hydra(self) -> Sparsity:
        for method in self.baselines:
            own = method.allocation in (None, self.allocation) and method.structure in (None, self.structure)
            if method.name == HYDRA.name and own:
                raise ValueError(
                    f"baselines: {method.label} is the recipe's own method, which is always trained; give it another "
                    "allocation than sparsity.allocation or another structure than sparsity.structure, or remove it"
                )
            if method.allocation in LEARNED and method.name not in PRUNING:
                raise ValueError(
                    f"baselines: {method.name} has no prune phase that could learn allocation {method.allocation}; "
                    "use uniform, erk or global"
                )
        return self

    @model_validator(mode="after")
    def _n_of_m_determines_the_budget(self) -> Sparsity:
        for method in (HYDRA, *self.baselines):
            structure, allocation = method.structure or self.structure, method.allocation or self.allocation
            if (density := density_of(structure)) is None:
                continue
            share, start = float(density), "" if method == HYDRA else f"baselines: {method.label} has "
            start += f"structure {structure}, which keeps {share} of every layer"
            fractions = [canonical_decimal(keep) for keep in self.keep_fractions]
            if method == HYDRA and any(keep != density for keep in self.keep_fractions):
                raise ValueError(
                    f"{start}, and keep_fractions {fractions} ask for others; set keep_fractions to [{share}], or give "
                    f"it to a baseline, {{name: hydra, structure: {structure}}}, which has a network at {share} alone"
                )
            if density not in self.keep_fractions:
                raise ValueError(f"{start}, and keep_fractions {fractions} lack that; add {share}, or remove it")
            if allocation != "uniform":
                raise ValueError(f"{start}, and allocation {allocation} does not; use allocation uniform")
            if method.name in FROM_SCRATCH:
                raise ValueError(
                    f"{start}: {method.name} exchanges connections of a whole layer, which would not stay "
                    f"{structure}; give it a structure of blocks, or unstructured"
                )
        return self

    @model_validator(mode="after")
    def _channels_have_a_budget_of_their_own(self) -> Sparsity:
        if self.round_to > 1 and "channel" not in self.structures:
            raise ValueError(f"round_to {self.round_to} is of structure channel alone, which no method has; remove it")
        for method in (HYDRA, *self.baselines):
            if (method.structure or self.structure) != "channel":
                continue
            allocation, start = method.allocation or self.allocation, "" if method == HYDRA else "baselines: "
            start += f"{method.label} has structure channel"
            if allocation not in OF_CHANNELS:
                raise ValueError(
                    f"{start}, whose budget is of multiply-accumulates, and allocation {allocation} shares connections "
                    "among layers; use allocation global, or uniform"
                )
            if method.name in FROM_SCRATCH:
                raise ValueError(
                    f"{start}: {method.name} exchanges connections within a layer, and a channel is of several layers; "
                    "give it a structure of blocks, or unstructured"
                )
        return self

    @model_validator(mode="after")
    def _every_method_has_as_many_trials(self) -> Sparsity:
        one_stage = [method.label for method in self.baselines if method.name not in PRUNING]
        if self.tune is not None and one_stage and len(set(self.tune.finetune_lr)) < len(self.tune.finetune_lr):
            raise ValueError(
                f"tune.finetune_lr {list(self.tune.finetune_lr)} has equal values, with which {', '.join(one_stage)}, "
                "without a prune phase, would repeat a trial and have fewer than HYDRA; give each trial another one"
            )
        return self
