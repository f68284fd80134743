"""The sections of a recipe, each validated on its own.

Constraints between sections are checked in `pipeline.recipe.schema`. Imports no torch, so it works on login nodes.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, Field, model_validator

from pipeline.recipe.architectures import known_architecture
from pipeline.recipe.attacks import Attack
from pipeline.recipe.fields import (
    Count,
    ExtraFraction,
    FilePath,
    KeepFraction,
    Pixels,
    Real,
    Section,
    divisors,
)
from pipeline.recipe.phase import Phase

Dataset = Literal["fashion_mnist", "cifar10", "cifar100", "svhn", "imagenet", "image_folder"]
DATASETS: tuple[str, ...] = get_args(Dataset)
"""Data sets that `data write` can read."""


class Data(Section):
    """The two FFCV files, and how images are sampled and augmented."""

    dataset: Dataset
    train_file: FilePath
    """FFCV file of the training set, written by `python -m launch data write`."""
    test_file: FilePath
    """FFCV file of the test set; used only to evaluate finished stages."""
    image_size: Count = Field(gt=0, le=1024)
    """Height and width of the network's input, in pixels."""
    augmentation: Literal["none", "pad_crop", "pad_crop_flip", "random_resized_crop"]
    validation_images: Count = Field(gt=0)
    """Training images held out for checkpoint selection; the same ones for every seed."""
    train_images: Count | None = Field(default=None, gt=0)
    """Train on this many of the remaining images; null means all of them."""
    extra_fraction: ExtraFraction | None = None
    """Fraction of every micro-batch drawn from the training file's extra images; null means none."""
    stage_to: FilePath | None = None
    """Folder on each node's local disk to copy the files to and read them from; null reads them in place."""

    @model_validator(mode="after")
    def _digits_are_not_mirrored(self) -> Data:
        if self.dataset == "svhn" and self.augmentation in ("pad_crop_flip", "random_resized_crop"):
            raise ValueError(
                f"augmentation {self.augmentation} mirrors images, and svhn's digits must not be mirrored; use pad_crop"
            )
        return self

    @model_validator(mode="after")
    def _stage_to_is_absolute(self) -> Data:
        if self.stage_to is not None and not self.stage_to.startswith("/"):
            raise ValueError(f"stage_to {self.stage_to} must begin with /, as each node has its own: /local/scratch")
        return self


class Model(Section):
    """The network. Normalisation is its first layer, so that images are in [0, 1] everywhere else."""

    arch: Annotated[str, AfterValidator(known_architecture)]
    num_classes: Count = Field(gt=1)
    mean: tuple[Real, Real, Real] = (0.485, 0.456, 0.406)
    std: tuple[Real, Real, Real] = (0.229, 0.224, 0.225)
    weights: FilePath | None = None
    """File of weights, or a run's folder for its dense network, that pretrain starts from; without a pretrain phase it
    is the dense network. null: random initialisation from the seed."""
    weights_head: Literal["file", "new"] = "file"
    """The last layer: the file's, or a new one from the seed, for another number of classes (transfer learning)."""
    weights_keep_fraction: KeepFraction | None = None
    """Keep this fraction of a masked checkpoint of HYDRA's reference code, by its scores; null keeps all weights."""

    @model_validator(mode="after")
    def _std_positive(self) -> Model:
        if min(self.std) <= 0:
            raise ValueError(f"std {list(self.std)} must be positive in every channel")
        return self

    @model_validator(mode="after")
    def _weights_have_a_file(self) -> Model:
        if self.weights is None:
            for key in ("weights_keep_fraction", "weights_head"):
                if getattr(self, key) != type(self).model_fields[key].default:
                    raise ValueError(f"{key} is set without weights; name the file or remove it")
        return self


class Phases(Section):
    pretrain: Phase | None
    """null: the dense network is that of model.weights, as it is."""
    prune: Phase
    finetune: Phase | None
    """null: the pruned networks are the result, as in the search for robust sub-networks (HYDRA, section 5.2)."""


class Batch(Section):
    """A step is a fixed number of micro-batches of fixed size, split among the workers."""

    batch_per_step: Count = Field(ge=1, le=10**6)
    micro_batch: Count = Field(ge=1)
    """Images per forward pass, over which BatchNorm computes its batch statistics."""

    @property
    def micro_batches_per_step(self) -> int:
        return self.batch_per_step // self.micro_batch

    def largest_workers(self, room: int) -> int:
        """The largest legal number of workers for which there is `room`, which is at least 1."""
        return max(count for count in divisors(self.micro_batches_per_step) if count <= room)

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
    """Training processes: one per GPU where there are GPUs."""

    count: Count = Field(default=1, ge=1)
    threads: Count = Field(default=1, ge=1)
    """CPU threads per worker; bitwise reproducibility depends on it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    restarts_without_progress: Count = Field(default=2, ge=0)
    """Consecutive restarts without a new checkpoint after which the run gives up."""
    hang_timeout_s: Real = Field(default=600.0, ge=5)
    """Seconds without a step or an evaluated chunk after which a worker counts as hung and is replaced."""


class Engine(Section):
    """DeepSpeed: ZeRO stage, precision and compilation."""

    zero_stage: Literal[0, 1, 2] = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    mode: Literal["eager", "compiled"] = "eager"
    """compiled: torch.compile for the network in updates and attacks; costs minutes at the start of every stage."""

    @model_validator(mode="before")
    @classmethod
    def _no_stage_3(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("zero_stage") == 3:
            raise ValueError(
                "zero_stage 3 is refused: the optimizer state that it gathers is wrong (measured), so a resume would "
                "not be exact; these networks fit at stage 2"
            )
        return values


class Checkpoint(Section):
    every_steps: Count | None = Field(default=None, ge=1)
    """Steps between checkpoints; null means one per epoch. The end of a stage always has one."""
    keep: Count = Field(default=2, ge=1)
    """Number of checkpoints of a stage kept on disk."""


class Evaluation(Section):
    """How finished networks are evaluated on the test set, in fp32: by PGD (worst case per image over restarts), by
    randomized smoothing or by verified bounds, depending on the objective."""

    images: Count | None = Field(default=None, ge=1)
    """Number of test images, evenly spaced over the file; null means all of them."""
    steps: Count = Field(default=20, ge=1)
    step_size: Pixels | None = None
    restarts: Count = Field(default=1, ge=1)
    n0: Count = Field(default=100, ge=1)
    """Noise draws that select the class to certify (Cohen et al. 2019)."""
    n: Count = Field(default=100_000, ge=1)
    """Further, independent noise draws that bound its probability."""
    alpha: Real = Field(default=0.001, gt=0, lt=1)
    """Upper bound on the probability of a wrong certificate, per image."""
    noise_batch: Count = Field(default=500, ge=1)
    """Noise draws per forward pass; affects the result, since floating-point arithmetic depends on shapes."""
    chunk: Count = Field(default=250, ge=1)
    """Images per forward pass, in file order; affects the result, since floating-point arithmetic depends on shapes."""
    bounds: Literal["crown_ibp", "symbolic"] = "crown_ibp"
    """Bounds used for verification: IBP and CROWN-IBP, or symbolic intervals too, which take seconds per image
    that the others leave unverified."""
    honesty_images: Count = Field(default=100, ge=0)
    """Test images for the honesty checks of networks that PGD evaluates; 0: no checks."""
    validation_steps: Count = Field(default=5, ge=0)
    """PGD steps, or noise draws, on the held-out images after every epoch; 0: no validation."""
    attacks: tuple[Attack, ...] = ()
    """Additional attacks on finished networks."""

    @model_validator(mode="after")
    def _step_size_positive(self) -> Evaluation:
        if self.step_size is not None and self.step_size <= 0:
            raise ValueError(f"step_size {self.step_size} must be positive, for example 1/255")
        return self


class Tracking(Section):
    log_every_steps: Count = Field(default=20, ge=1)
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: online where wandb finds an API key, else offline."""
    wandb_project: str = "hydra"
