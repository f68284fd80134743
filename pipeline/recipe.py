"""Recipes: what an experiment consists of, typed and complete, checked once.

A recipe is the only configuration there is. `recipe_file` reads and writes it as YAML. Unknown keys and impossible
pairs are refused; the message names key, value and fix. No torch here: a login node can run it.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from pipeline.recipe_fields import DeepSpeedOptions, Section, explain
from pipeline.recipe_sections import (
    Batch,
    Checkpoint,
    Data,
    Engine,
    Evaluation,
    Model,
    Objective,
    Phases,
    Sparsity,
    ThreatModel,
    Tracking,
    Workers,
    divisors,
)
from pipeline.recipe_slurm import Slurm


class RecipeError(ValueError):
    """A recipe or an override that cannot run; the message names key, value and fix."""


NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
"""What a run may be called; it becomes the name of a folder."""


class Recipe(Section):
    """One experiment: pretrain, then prune and finetune per keep_fraction, the baseline, evaluation."""

    name: str = Field(pattern=NAME)
    seed: int = Field(default=0, ge=0)
    data: Data
    model: Model
    threat_model: ThreatModel | None = None
    objective: Objective
    phases: Phases
    sparsity: Sparsity
    select: Literal["last", "best_validation_robust"] = "last"
    """Which checkpoint of a stage the next one and the evaluation take."""
    batch: Batch
    workers: Workers = Workers()
    engine: Engine = Engine()
    deepspeed: DeepSpeedOptions = Field(default_factory=dict)
    """Passed to deepspeed.initialize as it is; it may not say again what the recipe says elsewhere."""
    checkpoint: Checkpoint = Checkpoint()
    evaluation: Evaluation
    tracking: Tracking = Tracking()
    slurm: Slurm | None = None
    """What jobs ask SLURM for; only --on slurm reads it."""

    @model_validator(mode="after")
    def _objective_has_its_threat(self) -> Recipe:
        if self.threat_model is None and self.objective.name != "clean":
            raise ValueError(
                f"objective.name {self.objective.name} needs a threat_model; "
                "add threat_model: {norm: linf, eps: 4/255} or use objective.name=clean"
            )
        return self

    @model_validator(mode="after")
    def _bounds_are_of_linf_balls(self) -> Recipe:
        certified = self.objective.name in ("ibp", "crown_ibp", "mixtrain")
        if certified and self.threat_model is not None and self.threat_model.norm != "linf":
            raise ValueError(
                f"objective.name {self.objective.name} bounds networks over linf balls, and threat_model.norm is "
                f"{self.threat_model.norm}; use threat_model.norm=linf"
            )
        return self

    @model_validator(mode="after")
    def _selection_has_its_accuracy(self) -> Recipe:
        if self.select == "best_validation_robust" and self.evaluation.validation_steps == 0:
            raise ValueError(
                "select best_validation_robust needs robust accuracy on the held-out images, and "
                "evaluation.validation_steps 0 measures none; set evaluation.validation_steps=5 or select=last"
            )
        return self

    @model_validator(mode="after")
    def _workers_share_a_step(self) -> Recipe:
        total = self.batch.micro_batches_per_step
        if total % self.workers.count:
            raise ValueError(
                f"workers.count {self.workers.count} does not divide the {total} micro-batches of a step "
                f"(batch_per_step {self.batch.batch_per_step} / micro_batch {self.batch.micro_batch}); "
                f"legal counts: {divisors(total)}"
            )
        return self

    @model_validator(mode="after")
    def _deepspeed_agrees(self) -> Recipe:
        stage = self.deepspeed.get("zero_optimization", {}).get("stage", self.engine.zero_stage)
        if stage != self.engine.zero_stage:
            raise ValueError(
                f"deepspeed.zero_optimization.stage {stage} contradicts engine.zero_stage {self.engine.zero_stage}; "
                "set engine.zero_stage and remove the other"
            )
        return self

    @model_validator(mode="after")
    def _test_set_is_another(self) -> Recipe:
        if self.data.train_file == self.data.test_file:
            raise ValueError(
                f"data.train_file and data.test_file are both {self.data.train_file}; the test set must be another file"
            )
        return self


def parse_recipe(values: dict[str, Any], origin: str) -> Recipe:
    """Build a Recipe from plain values. Errors: RecipeError, one line per problem, each starting with `origin`."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError(explain(error, Recipe, origin)) from None
