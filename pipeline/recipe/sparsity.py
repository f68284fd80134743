"""The recipe's section of sparse networks. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from pipeline.recipe.fields import KeepFraction, Real, Section, canonical_decimal
from pipeline.recipe.methods import HYDRA, LEARNED, PRUNING, Allocation, Baseline, Method

BatchNormMode = Literal["trained", "frozen"]
ScoreInit = Literal["scaled", "kaiming_uniform", "kaiming_normal", "xavier_uniform", "xavier_normal"]


class Sparsity(Section):
    """Which pruned networks are derived from the dense one."""

    keep_fractions: tuple[KeepFraction, ...]
    allocation: Allocation = "uniform"
    """How the budget of connections is allocated to layers. uniform: the same fraction of each (the paper). erk:
    Erdos-Renyi-kernel densities (Evci et al. 2020). global: by rank among the scores of all layers, so that the prune
    phase learns the allocation too. learned: global, with one learned factor per layer that multiplies its scores
    (after Zhao and Wressnegger 2023)."""
    score_init: ScoreInit = "scaled"
    """Initial scores of the prune phase: scaled weights (the paper), or random."""
    score_weight_decay: Real | None = Field(default=None, ge=0)
    """Weight decay of the scores; null: that of the prune phase, as in the reference code."""
    batchnorm: BatchNormMode = "trained"
    """BatchNorm in the prune phase: trained, with running statistics updated, or frozen as in the dense network."""
    baselines: tuple[Baseline, ...] = (Method(name="magnitude"),)
    """What HYDRA is compared with: the dense network finetuned under a mask that is not learned or becomes sparser, a
    network that is sparse from the start, or HYDRA with another allocation:
    [magnitude, {name: hydra, allocation: erk}]."""
    baseline_epochs: Literal["same_total_epochs", "finetune_epochs"] = "same_total_epochs"
    """Epochs of a baseline: as many as HYDRA's prune and finetune (equal budget), or finetune only (the paper)."""

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
