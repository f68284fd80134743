"""The recipe's section of sparse networks. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.recipe.fields import KeepFraction, Real, Section, canonical_decimal
from pipeline.recipe.methods import HYDRA, LEARNED, PRUNING, Allocation, Baseline, Method

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
    score_init: ScoreInit = "scaled"
    """Initial scores of the prune phase: scaled weights (the paper), or random."""
    score_weight_decay: Real | None = Field(default=None, ge=0)
    """Weight decay of the scores; null: that of the prune phase, as in the reference code."""
    batchnorm: BatchNormMode = "trained"
    """BatchNorm in the prune phase: trained, with running statistics updated, or frozen as in the dense network."""
    baselines: tuple[Baseline, ...] = (Method(name="magnitude"),)
    """What HYDRA is compared with: the dense network finetuned under a mask that is not learned or becomes sparser, a
    network that is sparse from the start, HYDRA with another allocation, or with sharpness-aware scores:
    [magnitude, {name: hydra, allocation: harp}, s2ap]."""
    baseline_epochs: Literal["same_total_epochs", "finetune_epochs"] = "same_total_epochs"
    """Epochs of a baseline: as many as HYDRA's prune and finetune (equal budget), or finetune only (the paper)."""
    tune: Tune | None = None
    """Learning rates that every method chooses from, on the held-out images; null: those of the phases."""

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
            if method.name == HYDRA.name and method.allocation in (None, self.allocation):
                raise ValueError(
                    f"baselines: {method.label} is the recipe's own method, which is always trained; give it another "
                    "allocation than sparsity.allocation, or remove it"
                )
            if method.allocation in LEARNED and method.name not in PRUNING:
                raise ValueError(
                    f"baselines: {method.name} has no prune phase that could learn allocation {method.allocation}; "
                    "use uniform, erk or global"
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
