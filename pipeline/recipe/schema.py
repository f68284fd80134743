"""The recipe: the complete, typed configuration of an experiment, validated once.

There is no other configuration. `pipeline.recipe.file` reads and writes it as YAML. Unknown keys and contradictory
values are refused with messages that name key, value and fix. Imports no torch, so it works on login nodes.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from pipeline.recipe.attacks import check_attack
from pipeline.recipe.deepspeed_options import DeepSpeedOptions
from pipeline.recipe.errors import explain
from pipeline.recipe.fields import Section, Seed, divisors
from pipeline.recipe.methods import FROM_SCRATCH
from pipeline.recipe.objective import FgsmPgi, Objective
from pipeline.recipe.phase import Resolution
from pipeline.recipe.sections import (
    Batch,
    Checkpoint,
    Data,
    Engine,
    Evaluation,
    Model,
    Phases,
    Tracking,
    Workers,
)
from pipeline.recipe.slurm import Slurm
from pipeline.recipe.sparsity import Sparsity
from pipeline.recipe.technique import Bounding
from pipeline.recipe.threat_model import ThreatModel


class RecipeError(ValueError):
    """An invalid recipe or override; the message names key, value and fix."""


NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
"""Legal run names; a run's name becomes a folder's."""


class Recipe(Section):
    """One experiment: pretrain, then prune and finetune per keep_fraction, baselines, evaluation."""

    name: str = Field(pattern=NAME)
    seed: Seed = 0
    data: Data
    model: Model
    threat_model: ThreatModel | None = None
    objective: Objective
    phases: Phases
    sparsity: Sparsity
    select: Literal["last", "best_validation_robust"] = "last"
    """Checkpoint of a stage that the next stage and the evaluation use."""
    batch: Batch
    workers: Workers = Workers()
    engine: Engine = Engine()
    deepspeed: DeepSpeedOptions = Field(default_factory=dict)
    """Passed to deepspeed.initialize unchanged; keys that other sections determine are refused."""
    checkpoint: Checkpoint = Checkpoint()
    evaluation: Evaluation
    tracking: Tracking = Tracking()
    slurm: Slurm | None = None
    """Resources of SLURM jobs; used by --on slurm only."""

    @property
    def objectives(self) -> dict[str, Objective]:
        """Key -> objective: the recipe's own, and those that phases override."""
        phases = {f"phases.{name}.objective": phase.objective for name, phase in self.phases if phase is not None}
        return {"objective": self.objective} | {key: one for key, one in phases.items() if one is not None}

    @property
    def growing(self) -> dict[str, Resolution]:
        """Key -> progressive resizing, for the phases that have it."""
        phases = {f"phases.{name}.resolution": phase.resolution for name, phase in self.phases if phase is not None}
        return {key: resolution for key, resolution in phases.items() if resolution is not None}

    @model_validator(mode="after")
    def _objectives_fit_the_threat_model(self) -> Recipe:
        for key, objective in self.objectives.items():
            objective.check_threat_model(key, self.threat_model)
        return self

    @model_validator(mode="after")
    def _baseline_is_finetuned(self) -> Recipe:
        labels = [method.label for method in self.sparsity.baselines]
        if self.phases.finetune is None and labels:
            raise ValueError(
                f"sparsity.baselines {labels}: a baseline is a finetuned network, and "
                "phases.finetune is null; set sparsity.baselines=[]"
            )
        return self

    @model_validator(mode="after")
    def _dense_network_comes_from_somewhere(self) -> Recipe:
        if self.phases.pretrain is not None:
            return self
        if self.model.weights is None:
            raise ValueError(
                "phases.pretrain is null, so that no dense network is trained, and model.weights is null; set "
                "model.weights to a file of weights or to a run's folder, or give phases.pretrain"
            )
        if self.model.weights_head == "new":
            raise ValueError(
                "model.weights_head new: a new last layer must be trained, and phases.pretrain is null; give "
                "phases.pretrain, or set model.weights_head=file"
            )
        if labels := [method.label for method in self.sparsity.baselines if method.name in FROM_SCRATCH]:
            raise ValueError(
                f"sparsity.baselines {labels} train from scratch as phases.pretrain says, which is null; remove them, "
                "or give phases.pretrain"
            )
        return self

    @model_validator(mode="after")
    def _bounds_need_layers(self) -> Recipe:
        for key, objective in self.objectives.items():
            if self.engine.mode == "compiled" and isinstance(objective, Bounding):
                raise ValueError(
                    f"engine.mode compiled: {key}.name {objective.name} bounds the network layer by layer, and a "
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
                    f"{key}: data.augmentation {self.data.augmentation} does not resize images; "
                    f"use random_resized_crop or remove {key}"
                )
            if any(objective.carries_noise for objective in self.objectives.values()):
                raise ValueError(
                    f"{key}: free training carries its perturbation over to the next images, which must have the same "
                    f"size; remove {key}"
                )
        return self

    @model_validator(mode="after")
    def _perturbations_can_be_remembered(self) -> Recipe:
        for key, objective in self.objectives.items():
            if not isinstance(objective, FgsmPgi):
                continue
            fix = f"or use {key}.name=fgsm"
            if self.data.augmentation == "random_resized_crop":
                raise ValueError(
                    f"{key}.name {objective.name} starts from the image's perturbation of its last epoch, and "
                    "data.augmentation random_resized_crop shows another part of it at another scale; use pad_crop, "
                    f"pad_crop_flip or none, {fix}"
                )
            if self.data.extra_fraction is not None:
                raise ValueError(
                    f"{key}.name {objective.name} starts from the image's perturbation of its last epoch, and with "
                    f"data.extra_fraction {self.data.extra_fraction} an extra image may occur twice in an epoch, on "
                    f"different workers; set data.extra_fraction=null {fix}"
                )
        return self

    @model_validator(mode="after")
    def _pgd_has_a_step_size(self) -> Recipe:
        if self.objective.measure == "pgd" and self.evaluation.step_size is None:
            raise ValueError(
                f"evaluation.step_size is missing: networks trained with {self.objective.name} are evaluated by PGD; "
                "add it, for example evaluation.step_size=1/255"
            )
        return self

    @model_validator(mode="after")
    def _attacks_fit(self) -> Recipe:
        key, attacks, step = "evaluation.attacks", self.evaluation.attacks, self.evaluation.step_size
        labels = [self.objective.measure]
        for attack in attacks:
            check_attack(attack, key, self.objective, self.threat_model, self.model.num_classes, step)
            if attack.label in labels:
                raise ValueError(
                    f"{key}: {attack.label} is evaluated already, and its files would have the same name; remove it or "
                    "change its steps or restarts"
                )
            labels.append(attack.label)
        return self

    @model_validator(mode="after")
    def _selection_has_accuracies(self) -> Recipe:
        if self.select == "best_validation_robust" and self.evaluation.validation_steps == 0:
            raise ValueError(
                "select best_validation_robust needs robust accuracy on the held-out images, and "
                "evaluation.validation_steps 0 measures none; set evaluation.validation_steps=5 or select=last"
            )
        return self

    @model_validator(mode="after")
    def _trials_have_accuracies(self) -> Recipe:
        if self.sparsity.tune is not None and self.phases.finetune is None:
            raise ValueError(
                "sparsity.tune chooses among finetuned networks, and phases.finetune is null; set sparsity.tune=null"
            )
        if self.sparsity.tune is not None and self.evaluation.validation_steps == 0:
            raise ValueError(
                "sparsity.tune chooses by robust accuracy on the held-out images, and evaluation.validation_steps 0 "
                "measures none; set evaluation.validation_steps=5 or sparsity.tune=null"
            )
        return self

    @model_validator(mode="after")
    def _guard_has_accuracies(self) -> Recipe:
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
    def _flying_bird_plus_has_accuracies(self) -> Recipe:
        if all(method.name != "flying_bird_plus" for method in self.sparsity.baselines):
            return self
        if self.evaluation.validation_steps == 0:
            raise ValueError(
                "sparsity.baselines: flying_bird_plus changes its sparsity by robust accuracy on the held-out images, "
                "and evaluation.validation_steps 0 measures none; set evaluation.validation_steps=5 or use flying_bird"
            )
        objective = (self.phases.finetune and self.phases.finetune.objective) or self.objective
        if not objective.counts_robust:
            raise ValueError(
                "sparsity.baselines: flying_bird_plus changes its sparsity by robust accuracy in training, and "
                f"objective {objective.name} measures none; use flying_bird"
            )
        return self

    @model_validator(mode="after")
    def _workers_divide_a_step(self) -> Recipe:
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
        """Extra images per step, the same number in each micro-batch."""
        return int(Fraction(self.data.extra_fraction or 0) * self.batch.batch_per_step)

    @model_validator(mode="after")
    def _extra_images_are_whole(self) -> Recipe:
        fraction, micro_batch = self.data.extra_fraction, self.batch.micro_batch
        if fraction is not None and (Fraction(fraction) * micro_batch).denominator != 1:
            raise ValueError(
                f"data.extra_fraction {fraction} of a micro-batch of {micro_batch} is {fraction * micro_batch} images; "
                f"it must be a whole number: a multiple of 1/{micro_batch}"
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
    def _test_set_is_separate(self) -> Recipe:
        if self.data.train_file == self.data.test_file:
            raise ValueError(
                f"data.train_file and data.test_file are both {self.data.train_file}; use another file for the test set"
            )
        return self


def parse_recipe(values: dict[str, Any], origin: str, of_a_run: bool = False) -> Recipe:
    """Build a Recipe from plain values; `of_a_run` as in `file.load_resolved_recipe`.

    Errors: RecipeError, one line per problem, each starting with `origin`.
    """
    try:
        return Recipe.model_validate(values, context={"of_a_run": True} if of_a_run else None)
    except ValidationError as error:
        raise RecipeError(explain(error, Recipe, origin)) from None
