"""The sections of a recipe, each checked on its own: types, units in names, defaults.

What two sections must agree on is checked where they meet, in `recipe`. No torch here: a login node can run it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, Field, model_validator

from pipeline.recipe.architectures import known_architecture
from pipeline.recipe.attacks import Attack
from pipeline.recipe.fields import ExtraFraction, KeepFraction, Pixels, Section, canonical_decimal
from pipeline.recipe.objective import Objective


def divisors(number: int) -> list[int]:
    """All of them, in order: what error messages offer."""
    return [d for d in range(1, number + 1) if number % d == 0]


Dataset = Literal["fashion_mnist", "cifar10", "cifar100", "svhn", "imagenet", "image_folder"]
DATASETS: tuple[str, ...] = get_args(Dataset)
"""What `data write` reads."""


class Data(Section):
    """The two FFCV files and how images are fed."""

    dataset: Dataset
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
    extra_fraction: ExtraFraction | None = None
    """Share of every micro-batch that is taken from the training file's extra images; null means none."""
    stage_to: str | None = None
    """Folder on each node's own disk that the files are copied to and read from; null reads them where they are."""

    @model_validator(mode="after")
    def _digits_are_not_mirrored(self) -> Data:
        if self.dataset == "svhn" and self.augmentation in ("pad_crop_flip", "random_resized_crop"):
            raise ValueError(
                f"augmentation {self.augmentation} mirrors images, and a mirrored digit of svhn is none; use pad_crop"
            )
        return self

    @model_validator(mode="after")
    def _stage_to_is_absolute(self) -> Data:
        if self.stage_to is not None and not self.stage_to.startswith("/"):
            raise ValueError(f"stage_to {self.stage_to} must begin with /, as each node has its own: /local/scratch")
        return self


class Model(Section):
    """The network; its normalisation is a layer inside it, so that images are [0, 1] everywhere else."""

    arch: Annotated[str, AfterValidator(known_architecture)]
    num_classes: int = Field(gt=1)
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    weights: str | None = None
    """File of weights that pretrain starts from; null starts from the seed."""
    weights_keep_fraction: KeepFraction | None = None
    """Take only these connections of a masked file of HYDRA's reference, by its scores; null takes all of them."""

    @model_validator(mode="after")
    def _std_positive(self) -> Model:
        if min(self.std) <= 0:
            raise ValueError(f"std {list(self.std)} must be positive in every channel")
        return self

    @model_validator(mode="after")
    def _kept_of_something(self) -> Model:
        if self.weights_keep_fraction is not None and self.weights is None:
            raise ValueError("weights_keep_fraction is there without weights; name the file or remove it")
        return self


GRAIN = 32
"""Sizes of growing images are multiples of it, in pixels, so that there are few of them."""


class Resolution(Section):
    """Training images that grow during a phase, up to data.image_size; epochs count from the phase's first, 0."""

    smallest: int = Field(gt=0, multiple_of=GRAIN)
    """Height and width in pixels of the images up to the epoch `grows_from`; a multiple of 32."""
    grows_from: int = Field(default=0, ge=0)
    """The last epoch of the smallest images; then they grow by steps of 32 pixels, linearly in epochs."""
    full_from: int = Field(ge=1)
    """The first epoch of images of data.image_size."""

    @model_validator(mode="after")
    def _grows(self) -> Resolution:
        if self.full_from <= self.grows_from:
            raise ValueError(f"full_from {self.full_from} must be a later epoch than grows_from {self.grows_from}")
        return self


class Phase(Section):
    """Optimisation of one phase: the learning rate is annealed to zero over these epochs."""

    epochs: int = Field(ge=1)
    lr: float = Field(gt=0)
    optimizer: Literal["sgd", "adam"] = "sgd"
    """SGD with momentum, or Adam with betas 0.9 and 0.999, as HYDRA has it for MixTrain and CROWN-IBP. Weight decay is
    part of the gradient in both."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Of sgd; adam has none."""
    weight_decay: float = Field(default=1e-4, ge=0)
    warmup_epochs: float = Field(default=0.0, ge=0)
    schedule: Literal["cosine", "constant"] = "cosine"
    objective: Objective | None = None
    """Training technique of this phase alone; null means the recipe's."""
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Decay per step of the exponential moving average of what trains, which is then the phase's result; null: none."""
    resolution: Resolution | None = None
    """Images that are smaller at first, which trains faster; null: all of data.image_size."""

    @model_validator(mode="after")
    def _images_are_whole_in_the_end(self) -> Phase:
        if self.resolution is not None and self.resolution.full_from >= self.epochs:
            raise ValueError(
                f"resolution.full_from {self.resolution.full_from} must be one of the phase's epochs, 1 to "
                f"{self.epochs - 1}: networks are judged on images of data.image_size"
            )
        return self

    @model_validator(mode="after")
    def _warmup_fits(self) -> Phase:
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs {self.warmup_epochs} must be less than epochs {self.epochs}")
        return self


class Phases(Section):
    pretrain: Phase
    prune: Phase
    finetune: Phase | None
    """null: the networks that pruning finds are the result, as in a search for sub-networks (HYDRA, section 5.2)."""


Allocation = Literal["uniform", "erk", "global", "learned"]
Baseline = Literal["magnitude", "random", "snip"]
BatchNormMode = Literal["trained", "frozen"]
ScoreInit = Literal["scaled", "kaiming_uniform", "kaiming_normal", "xavier_uniform", "xavier_normal"]


class Sparsity(Section):
    """Which networks are made of the dense one."""

    keep_fractions: tuple[KeepFraction, ...]
    allocation: Allocation = "uniform"
    """How connections are dealt to layers: the same fraction of each (the paper), Erdos-Renyi-kernel densities (Evci et
    al. 2020), by rank among the scores of all layers, so that the prune phase learns the allocation too, or by that
    rank with one learned rate per layer that multiplies its scores (after Zhao and Wressnegger 2023)."""
    score_init: ScoreInit = "scaled"
    """Where the prune phase's scores start: scaled from the weights (the paper), or drawn."""
    score_weight_decay: float | None = Field(default=None, ge=0)
    """Weight decay of the scores; null: that of the prune phase, as in the reference."""
    batchnorm: BatchNormMode = "trained"
    """What BatchNorm does in the prune phase: learn and gather statistics, or stay as the dense network has it."""
    baselines: tuple[Baseline, ...] = ("magnitude",)
    """What HYDRA is compared with: the dense network finetuned under a mask that nobody learnt."""
    baseline_epochs: Literal["same_total_epochs", "finetune_epochs"] = "same_total_epochs"
    """Epochs of a baseline: HYDRA's prune + finetune (fair), or the paper's finetune only."""

    @model_validator(mode="after")
    def _distinct(self) -> Sparsity:
        if len(set(self.baselines)) != len(self.baselines):
            raise ValueError(f"baselines {list(self.baselines)} name one twice; drop the duplicate")
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
    mode: Literal["eager", "compiled"] = "eager"
    """compiled: torch.compile for the network of updates and attacks, minutes at every stage's start, then faster."""

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
    """How finished networks are judged on the test set, in fp32: by PGD, the worst case over restarts per image, or by
    certificates, whichever the objective trains for."""

    images: int | None = Field(default=None, ge=1)
    """How many test images, evenly spread over the file; null means all of them."""
    steps: int = Field(default=20, ge=1)
    step_size: Pixels | None = None
    restarts: int = Field(default=1, ge=1)
    n0: int = Field(default=100, ge=1)
    """Draws of noise that choose the class to certify (Cohen et al. 2019)."""
    n: int = Field(default=100_000, ge=1)
    """Draws of noise, others, that bound its probability."""
    alpha: float = Field(default=0.001, gt=0, lt=1)
    """How probable a wrong certificate may be, per image."""
    noise_batch: int = Field(default=500, ge=1)
    """Draws in one forward; part of the result, as arithmetic depends on shapes."""
    chunk: int = Field(default=250, ge=1)
    """Images in one forward, in file order; part of the result, as arithmetic depends on shapes."""
    bounds: Literal["crown_ibp", "symbolic"] = "crown_ibp"
    """What proofs are made with: IBP and CROWN-IBP, or also symbolic intervals, image by image: seconds for each image
    that the others leave open."""
    honesty_images: int = Field(default=100, ge=0)
    """Test images that honesty checks are made on, of networks that PGD judges; 0: none are made."""
    validation_steps: int = Field(default=5, ge=0)
    """PGD steps, or draws of noise, on the held-out images at every epoch's end; 0: they are not looked at."""
    attacks: tuple[Attack, ...] = ()
    """What finished networks are attacked with besides, once each."""

    @model_validator(mode="after")
    def _step_size_positive(self) -> Evaluation:
        if self.step_size is not None and self.step_size <= 0:
            raise ValueError(f"step_size {self.step_size} must be positive, for example 1/255")
        return self


class Tracking(Section):
    log_every_steps: int = Field(default=20, ge=1)
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: online where an API key is found, offline otherwise."""
    wandb_project: str = "hydra"
