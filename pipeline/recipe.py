"""Recipes: one YAML file, typed, complete, checked once at load.

A recipe is the only configuration there is. `load_recipe` reads the file, applies `key=value` overrides, refuses unknown
keys and impossible pairs, and names key, value and fix in a `RecipeError`. No torch here: a login node can run it.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    model_validator,
)


class RecipeError(ValueError):
    """A recipe or an override that cannot run; the message names key, value and fix."""


def _parse_fraction(value: Any) -> Fraction:
    if isinstance(value, bool):
        raise ValueError("expected a number or a fraction such as 4/255")
    try:
        return Fraction(str(value).replace(" ", ""))
    except (ValueError, ZeroDivisionError):
        raise ValueError("expected a number or a fraction such as 4/255") from None


def _parse_decimal(value: Any) -> Decimal:
    try:
        number = Decimal(str(value))
    except InvalidOperation:
        raise ValueError("expected a decimal such as 0.1") from None
    if not number.is_finite() or not 0 < number <= 1:
        raise ValueError("a keep_fraction is kept / all connections: it must lie in (0, 1]; write 0.1 for 90 % pruned")
    return number


def canonical_decimal(number: Decimal) -> str:
    """The one spelling of a decimal: 0.10 and 1E-1 are both '0.1'. Folder names use it."""
    return format(number.normalize(), "f")


Pixels = Annotated[Fraction, BeforeValidator(_parse_fraction), PlainSerializer(str)]
"""A distance in [0, 1] pixel units, exact: written '4/255' or 0.1."""

KeepFraction = Annotated[Decimal, BeforeValidator(_parse_decimal), PlainSerializer(canonical_decimal)]


class Section(BaseModel):
    """A recipe section: immutable, unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


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

    keep_fractions: tuple[KeepFraction, ...] = Field(min_length=1)
    magnitude_baseline: Literal["same_total_epochs", "finetune_epochs", "none"] = "same_total_epochs"
    """Epochs of the magnitude baseline: HYDRA's prune + finetune (fair), the paper's finetune only, or no baseline."""

    @model_validator(mode="after")
    def _distinct(self) -> Sparsity:
        names = [canonical_decimal(k) for k in self.keep_fractions]
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
            legal = [d for d in range(1, self.batch_per_step + 1) if self.batch_per_step % d == 0]
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
    """PGD steps on the held-out images at every epoch's end."""


class Tracking(Section):
    log_every_steps: int = Field(default=20, ge=1)
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: online where an API key is found, offline otherwise."""
    wandb_project: str = "hydra"


RESERVED_DEEPSPEED = {
    "train_batch_size": "batch.batch_per_step",
    "train_micro_batch_size_per_gpu": "batch.micro_batch",
    "gradient_accumulation_steps": "batch and workers.count",
    "optimizer": "phases.*",
    "scheduler": "phases.*.schedule",
    "fp16": "engine.precision",
    "bf16": "engine.precision",
    "torch_autocast": "engine.precision",
    "amp": "engine.precision",
    "data_types": "engine.precision",
    "zero_allow_untested_optimizer": "the engine itself",
    "gradient_clipping": "nothing yet: HYDRA trains without clipping",
}


class Recipe(Section):
    """One experiment: pretrain, then prune and finetune per keep_fraction, the baseline, evaluation."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
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
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """Passed to deepspeed.initialize as it is; it may not say again what the recipe says elsewhere."""
    checkpoint: Checkpoint = Checkpoint()
    evaluation: Evaluation
    tracking: Tracking = Tracking()

    @model_validator(mode="after")
    def _pairs(self) -> Recipe:
        if self.threat_model is None and self.objective.name != "clean":
            raise ValueError(
                f"objective.name {self.objective.name} needs a threat_model; add threat_model: {{norm: linf, eps: 4/255}} "
                "or use objective.name=clean"
            )
        legal_worker_count(self.batch, self.workers.count)
        for key, owner in RESERVED_DEEPSPEED.items():
            if key in self.deepspeed:
                raise ValueError(
                    f"deepspeed.{key} = {self.deepspeed[key]!r} is set by {owner}; set it there and remove it here"
                )
        stage = self.deepspeed.get("zero_optimization", {}).get("stage", self.engine.zero_stage)
        if stage != self.engine.zero_stage:
            raise ValueError(
                f"deepspeed.zero_optimization.stage {stage} contradicts engine.zero_stage {self.engine.zero_stage}; "
                "set engine.zero_stage and remove the other"
            )
        if self.data.train_file == self.data.test_file:
            raise ValueError("data.train_file and data.test_file are one file; the test set must be another")
        return self


def legal_worker_count(batch: Batch, count: int) -> None:
    """Raise ValueError unless `count` workers share a step's micro-batches evenly; the message lists the counts."""
    total = batch.micro_batches_per_step
    if total % count:
        legal = [d for d in range(1, total + 1) if total % d == 0]
        raise ValueError(
            f"workers.count {count} does not divide the {total} micro-batches of a step "
            f"(batch_per_step {batch.batch_per_step} / micro_batch {batch.micro_batch}); legal counts: {legal}"
        )


def apply_overrides(values: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """Return `values` with every 'a.b=value' applied; values are read as YAML. Errors: RecipeError."""
    result = json.loads(json.dumps(values, default=str))
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise RecipeError(f"override {override!r}: expected key=value, for example phases.prune.epochs=3")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise RecipeError(f"override {override!r}: the value is not YAML: {error}") from None
        node = result
        *parents, leaf = key.split(".")
        for part in parents:
            child = node.setdefault(part, {})
            if child is None:
                child = node[part] = {}
            if not isinstance(child, dict):
                raise RecipeError(f"override {override!r}: {part} is a value, not a section")
            node = child
        node[leaf] = value
    return result


def _known_keys(location: tuple[Any, ...]) -> list[str]:
    section: Any = Recipe
    for part in location:
        if not (isinstance(section, type) and issubclass(section, BaseModel)):
            return []
        field = section.model_fields.get(str(part))
        section = field.annotation if field else None
        if section is not None and not isinstance(section, type):
            candidates = [a for a in getattr(section, "__args__", ()) if isinstance(a, type)]
            section = next((a for a in candidates if issubclass(a, BaseModel)), None)
    if isinstance(section, type) and issubclass(section, BaseModel):
        return list(section.model_fields)
    return []


def _explain(error: ValidationError, origin: str) -> str:
    lines = []
    for item in error.errors(include_url=False):
        location = tuple(item["loc"])
        key = ".".join(str(part) for part in location) or "recipe"
        if item["type"] == "extra_forbidden":
            known = _known_keys(location[:-1])
            near = difflib.get_close_matches(str(location[-1]), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
            lines.append(f"{origin}: {key} = {item['input']!r}: unknown key; {hint}")
        elif item["type"] == "missing":
            lines.append(f"{origin}: {key}: missing; add it")
        else:
            message = item["msg"].removeprefix("Value error, ")
            shown = "" if isinstance(item["input"], dict) else f" = {item['input']!r}"
            lines.append(f"{origin}: {key}{shown}: {message}")
    return "\n".join(lines)


def parse_recipe(values: dict[str, Any], origin: str) -> Recipe:
    """Build a Recipe from plain values. Errors: RecipeError, one line per problem, each starting with `origin`."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError(_explain(error, origin)) from None


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read, override and check a recipe file. Errors: RecipeError."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read ({error}); the recipes shipped are in recipes/") from None
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not YAML: {error}") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of sections, got {type(values).__name__}")
    return parse_recipe(apply_overrides(values, overrides or []), str(path))


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML: every key written out, readable by `load_recipe`."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


SCIENCE_FREE = ("workers", "checkpoint", "tracking")


def recipe_hash(recipe: Recipe) -> str:
    """SHA-256 of what decides the result: workers, checkpoint cadence and tracking are left out, so they may change
    when a run is resumed."""
    values = {k: v for k, v in recipe.model_dump(mode="json").items() if k not in SCIENCE_FREE}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
