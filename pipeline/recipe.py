"""Recipes: what an experiment consists of, typed and complete, checked once.

A recipe is the only configuration there is. `recipe_file` reads and writes it as YAML. Unknown keys and impossible
pairs are refused; the message names key, value and fix. No torch here: a login node can run it.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from pipeline.recipe_fields import DeepSpeedOptions, KeepFraction, Pixels, Section, canonical_decimal, explain


class RecipeError(ValueError):
    """A recipe or an override that cannot run; the message names key, value and fix."""


NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
"""What a run may be called; it becomes the name of a folder."""


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


class Data(Section):
    """The two FFCV files and how images are fed."""

    dataset: Literal["fashion_mnist", "image_folder"]
    train_file: str
    """FFCV file of the training set; `python -m launch data write` makes it."""
    test_file: str
    """FFCV file of the test set; looked at once, when a stage is finished."""
    image_size: int = Field(gt=0, le=1024)
    """Height and width in pixels of what the network is fed."""
    augmentation: Literal["none", "pad_crop", "pad_crop_flip", "random_resized_crop"]
    validation_images: int = Field(gt=0)
    """Training images held out for choosing checkpoints; the same ones for every seed."""
    train_images: int | None = Field(default=None, gt=0)
    """Train on this many of the images that are left; null means all of them."""


class Model(Section):
    """The network; its normalisation is a layer inside it, so that images are [0, 1] everywhere else."""

    arch: Literal["small_cnn", "resnet18", "resnet50"]
    num_classes: int = Field(gt=1)
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    @model_validator(mode="after")
    def _std_positive(self) -> Model:
        if min(self.std) <= 0:
            raise ValueError(f"std {list(self.std)} must be positive in every channel")
        return self


class ThreatModel(Section):
    """Norm and radius of the ball that an adversary may move an image in."""

    norm: Literal["linf", "l2"]
    eps: Pixels

    @model_validator(mode="after")
    def _eps_positive(self) -> ThreatModel:
        if self.eps <= 0:
            raise ValueError(f"eps {self.eps} must be positive; use objective.name=clean to train without attack")
        if self.norm == "linf" and self.eps >= 1:
            raise ValueError(
                f"eps {self.eps} lets every pixel take any value; pixels are in [0, 1]: write 4/255, not 4"
            )
        return self


class Objective(Section):
    """The robust training technique."""

    name: Literal["clean", "pgd", "fgsm", "trades"]
    steps: int = Field(default=1, ge=1)
    step_size: Pixels | None = None
    beta: float = Field(default=6.0, gt=0)
    """Weight of the robust term of TRADES (Zhang et al. 2019, eq. 5: beta is their 1/lambda); unused otherwise."""

    @model_validator(mode="after")
    def _steps_fit(self) -> Objective:
        if self.name == "fgsm" and self.steps != 1:
            raise ValueError(f"fgsm takes one step, got steps={self.steps}; use name: pgd for more")
        if self.name != "clean" and self.step_size is None:
            raise ValueError(f"{self.name} needs step_size, for example 1/255")
        if self.step_size is not None and self.step_size <= 0:
            raise ValueError(f"step_size {self.step_size} must be positive")
        return self


class Phase(Section):
    """Optimisation of one phase: SGD with momentum, learning rate annealed to zero over these epochs."""

    epochs: int = Field(ge=1)
    lr: float = Field(gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=1e-4, ge=0)
    warmup_epochs: float = Field(default=0.0, ge=0)
    schedule: Literal["cosine", "constant"] = "cosine"

    @model_validator(mode="after")
    def _warmup_fits(self) -> Phase:
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs {self.warmup_epochs} must be less than epochs {self.epochs}")
        return self


class Phases(Section):
    pretrain: Phase
    prune: Phase
    finetune: Phase


class Sparsity(Section):
    """Which networks are made of the dense one."""

    keep_fractions: tuple[KeepFraction, ...]
    magnitude_baseline: Literal["same_total_epochs", "finetune_epochs", "none"] = "same_total_epochs"
    """Epochs of the magnitude baseline: HYDRA's prune + finetune (fair), the paper's finetune only, or no baseline."""

    @model_validator(mode="after")
    def _distinct(self) -> Sparsity:
        names = [canonical_decimal(k) for k in self.keep_fractions]
        if not names:
            raise ValueError("keep_fractions is empty; name at least one, for example [0.1]")
        if len(set(names)) != len(names):
            raise ValueError(f"keep_fractions {names} name one fraction twice; drop the duplicate")
        return self


class Batch(Section):
    """A step is a fixed number of micro-batches of fixed size, dealt to the workers there are."""

    batch_per_step: int = Field(ge=1)
    micro_batch: int = Field(ge=1)
    """Images in one forward: the group that BatchNorm's batch statistics are taken over."""

    @property
    def micro_batches_per_step(self) -> int:
        return self.batch_per_step // self.micro_batch

    @model_validator(mode="after")
    def _divides(self) -> Batch:
        if self.batch_per_step % self.micro_batch:
            legal = _divisors(self.batch_per_step)
            raise ValueError(
                f"batch_per_step {self.batch_per_step} is not a multiple of micro_batch {self.micro_batch}; "
                f"legal micro_batch values: {legal}"
            )
        return self


class Workers(Section):
    """Processes that train, one per GPU on a GPU machine."""

    count: int = Field(default=1, ge=1)
    threads: int = Field(default=1, ge=1)
    """CPU threads per worker, part of what makes a run repeat bit for bit."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    restarts_without_progress: int = Field(default=2, ge=0)
    """Restarts in a row that may commit no new checkpoint before the run gives up."""


class Engine(Section):
    """DeepSpeed: ZeRO stage and arithmetic."""

    zero_stage: Literal[0, 1, 2] = 1
    precision: Literal["fp32", "bf16"] = "fp32"

    @model_validator(mode="before")
    @classmethod
    def _no_stage_3(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("zero_stage") == 3:
            raise ValueError(
                "zero_stage 3 is refused: its gathered optimizer state was measured wrong, so a resume would not be "
                "exact; these networks fit at stage 2"
            )
        return values


class Checkpoint(Section):
    every_steps: int | None = Field(default=None, ge=1)
    """Steps between checkpoints; null means one at every epoch's end. The end of a stage always has one."""
    keep: int = Field(default=2, ge=1)
    """How many of a stage's checkpoints stay on disk."""


class Evaluation(Section):
    """PGD on the test set, the worst case over restarts per image; fp32."""

    steps: int = Field(default=20, ge=1)
    step_size: Pixels
    restarts: int = Field(default=1, ge=1)
    chunk: int = Field(default=250, ge=1)
    """Images in one forward, in file order; part of the result, as arithmetic depends on shapes."""
    validation_steps: int = Field(default=5, ge=0)
    """PGD steps on the held-out images at every epoch's end; 0 means that they are not looked at."""

    @model_validator(mode="after")
    def _step_size_positive(self) -> Evaluation:
        if self.step_size <= 0:
            raise ValueError(f"step_size {self.step_size} must be positive, for example 1/255")
        return self


class Tracking(Section):
    log_every_steps: int = Field(default=20, ge=1)
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: online where an API key is found, offline otherwise."""
    wandb_project: str = "hydra"


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

    @model_validator(mode="after")
    def _objective_has_its_threat(self) -> Recipe:
        if self.threat_model is None and self.objective.name != "clean":
            raise ValueError(
                f"objective.name {self.objective.name} needs a threat_model; "
                "add threat_model: {norm: linf, eps: 4/255} or use objective.name=clean"
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
                f"legal counts: {_divisors(total)}"
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
