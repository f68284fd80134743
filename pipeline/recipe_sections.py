"""The sections of a recipe, each checked on its own: types, units in names, defaults.

What two sections must agree on is checked where they meet, in `recipe`. No torch here: a login node can run it.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from pipeline.recipe_fields import KeepFraction, Pixels, Section, canonical_decimal


def divisors(number: int) -> list[int]:
    """All of them, in order: what error messages offer."""
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
    stage_to: str | None = None
    """Folder on each node's own disk that the files are copied to and read from; null reads them where they are."""

    @model_validator(mode="after")
    def _stage_to_is_absolute(self) -> Data:
        if self.stage_to is not None and not self.stage_to.startswith("/"):
            raise ValueError(f"stage_to {self.stage_to} must begin with /, as each node has its own: /local/scratch")
        return self


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

    name: Literal["clean", "pgd", "fgsm", "trades", "ibp", "crown_ibp", "mixtrain"]
    steps: int = Field(default=1, ge=1)
    step_size: Pixels | None = None
    beta: float = Field(default=6.0, gt=0)
    """Weight of the robust term of TRADES (Zhang et al. 2019, eq. 5: beta is their 1/lambda); unused otherwise."""
    eps_ramp: float = Field(default=0.6, ge=0, le=1)
    """ibp, crown_ibp, mixtrain: share of pretrain over which eps rises from 0; it is whole in the other phases."""
    kappa_start: float = Field(default=1.0, ge=0, le=1)
    """ibp, crown_ibp: weight of clean cross-entropy as the ramp begins; the worst case has the rest."""
    kappa_end: float = Field(default=0.5, ge=0, le=1)
    """The same from the ramp's end on (Gowal et al. 2018, section 4)."""
    crown_start: float = Field(default=1.0, ge=0, le=1)
    """crown_ibp: share of the linear bound in the margins as the ramp begins; intervals have the rest."""
    crown_end: float = Field(default=0.0, ge=0, le=1)
    """The same from the ramp's end on (Zhang et al. 2020, section 4: beta)."""
    robust_samples: int = Field(default=1, ge=1)
    """mixtrain: images of a micro-batch that are bounded (k; HYDRA: 1 for large networks, 5 for small ones)."""
    robust_probability: float = Field(default=0.8, gt=0, le=1)
    """mixtrain: chance of a micro-batch to have a robust term."""
    robust_weight_start: float = Field(default=0.1, gt=0)
    """mixtrain: weight of the robust term against the clean one's 1 during the ramp."""
    robust_weight_end: float = Field(default=50.0, gt=0)
    """The weight that it has grown to at the end, geometrically."""

    @model_validator(mode="after")
    def _steps_fit(self) -> Objective:
        if self.name == "fgsm" and self.steps != 1:
            raise ValueError(f"fgsm takes one step, got steps={self.steps}; use name: pgd for more")
        if self.name in ("pgd", "fgsm", "trades") and self.step_size is None:
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
            legal = divisors(self.batch_per_step)
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
    hang_timeout_s: float = Field(default=600.0, ge=5)
    """Seconds without a step or an evaluated chunk after which a worker is taken for hung, and replaced."""


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
