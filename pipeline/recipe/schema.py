"""Recipes: what an experiment consists of, typed and complete, checked once.

A recipe is the only configuration there is. `recipe_file` reads and writes it as YAML. Unknown keys and impossible
pairs are refused; the message names key, value and fix. No torch here: a login node can run it.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from pipeline.recipe.attacks import check_attack
from pipeline.recipe.errors import explain
from pipeline.recipe.fields import DeepSpeedOptions, Section
from pipeline.recipe.objective import Objective
from pipeline.recipe.sections import (
    Batch,
    Checkpoint,
    Data,
    Engine,
    Evaluation,
    Model,
    Phases,
    Resolution,
    Sparsity,
    Tracking,
    Workers,
    divisors,
)
from pipeline.recipe.slurm import Slurm
from pipeline.recipe.technique import Bounding
from pipeline.recipe.threat_model import ThreatModel


class RecipeError(ValueError):
    """A recipe or an override that cannot run; the message names key, value and fix."""


NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
"""What a run may be called; it becomes the name of a folder."""


class Recipe(Section):
    """One experiment: pretrain, then prune and finetune per keep_fraction, baselines, evaluation."""

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

    @property
    def objectives(self) -> dict[str, Objective]:
        """Key -> objective, for the recipe's own and those of single phases."""
        phases = {f"phases.{name}.objective": phase.objective for name, phase in self.phases if phase is not None}
        return {"objective": self.objective} | {key: one for key, one in phases.items() if one is not None}

    @property
    def growing(self) -> dict[str, Resolution]:
        """Key -> how images grow, for the phases where they do."""
        phases = {f"phases.{name}.resolution": phase.resolution for name, phase in self.phases if phase is not None}
        return {key: resolution for key, resolution in phases.items() if resolution is not None}

    @model_validator(mode="after")
    def _objectives_fit_the_threat_model(self) -> Recipe:
        for key, objective in self.objectives.items():
            objective.check_threat_model(key, self.threat_model)
        return self

    @model_validator(mode="after")
    def _baseline_is_finetuned(self) -> Recipe:
        if self.phases.finetune is None and self.sparsity.baselines:
            raise ValueError(
                f"sparsity.baselines {list(self.sparsity.baselines)}: a baseline is a finetuned network, and "
                "phases.finetune is null; set sparsity.baselines=[]"
            )
        return self

    @model_validator(mode="after")
    def _bounds_look_into_the_network(self) -> Recipe:
        for key, objective in self.objectives.items():
            if self.engine.mode == "compiled" and isinstance(objective, Bounding):
                raise ValueError(
                    f"engine.mode compiled: {key}.name {objective.name} bounds the network layer by layer, where a "
                    "compiled one has no layers; set engine.mode=eager"
                )
        return self

    @model_validator(mode="after")
    def _images_can_grow(self) -> Recipe:
        for key, growth in self.growing.items():
            if growth.smallest >= self.data.image_size:
                raise ValueError(
                    f"{key}.smallest {growth.smallest} must be less than data.image_size {self.data.image_size}"
                )
            if self.data.augmentation != "random_resized_crop":
                raise ValueError(
                    f"{key}: data.augmentation {self.data.augmentation} takes images as they are, so that they cannot "
                    f"be smaller; use random_resized_crop or remove {key}"
                )
            if any(objective.carries_noise for objective in self.objectives.values()):
                raise ValueError(
                    f"{key}: free training goes on with a perturbation of the last images, which must have the size of "
                    f"the next; remove {key}"
                )
        return self

    @model_validator(mode="after")
    def _pgd_has_its_step(self) -> Recipe:
        if self.objective.measure == "pgd" and self.evaluation.step_size is None:
            raise ValueError(
                f"evaluation.step_size is missing: networks trained with {self.objective.name} are judged by PGD; "
                "add it, for example evaluation.step_size=1/255"
            )
        return self

    @model_validator(mode="after")
    def _attacks_fit(self) -> Recipe:
        key, attacks, step = "evaluation.attacks", self.evaluation.attacks, self.evaluation.step_size
        taken = [self.objective.measure]
        for attack in attacks:
            check_attack(attack, key, self.objective, self.threat_model, self.model.num_classes, step)
            if attack.label in taken:
                raise ValueError(
                    f"{key}: {attack.label} is done already, and its files would have the same name; remove it, or "
                    "give it other steps or restarts"
                )
            taken.append(attack.label)
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
    def _guard_has_its_accuracies(self) -> Recipe:
        steps = self.evaluation.validation_steps
        for key, objective in self.objectives.items():
            if objective.guarded and steps < 2:
                raise ValueError(
                    f"{key}.overfitting_guard {objective.smallest_ratio} compares PGD with one step on the held-out "
                    f"images, and evaluation.validation_steps {steps} is no more than one; set "
                    f"evaluation.validation_steps=5 or {key}.overfitting_guard=null"
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

    @property
    def extra_per_step(self) -> int:
        """Images of every step that come from the training file's extra ones, the same number in each micro-batch."""
        return int(Fraction(self.data.extra_fraction or 0) * self.batch.batch_per_step)

    @model_validator(mode="after")
    def _extra_images_are_whole(self) -> Recipe:
        fraction, micro_batch = self.data.extra_fraction, self.batch.micro_batch
        if fraction is not None and (Fraction(fraction) * micro_batch).denominator != 1:
            raise ValueError(
                f"data.extra_fraction {fraction} of a micro-batch of {micro_batch} is {fraction * micro_batch} images; "
                f"it must be a whole number of them: a multiple of 1/{micro_batch}"
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
