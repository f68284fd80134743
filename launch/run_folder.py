"""Run directories: created from a recipe, found by name. A restart reads nothing else."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pipeline.data.agreement import check_agreement, check_data_files, open_data_files
from pipeline.data.loading import sampling
from pipeline.data.manifest import Manifest
from pipeline.recipe.file import deciding_values, dump_recipe, load_resolved_recipe, recipe_hash
from pipeline.recipe.schema import NAME, Recipe
from pipeline.recipe.stages import Stage, stages_of
from pipeline.run.failures import FAILURES
from pipeline.run.files import PRIVATE, atomic_write_json, atomic_write_text, read_json, sha256_of
from pipeline.run.initial_weights import weights_file
from pipeline.run.layout import RunFolder, StageFolder
from pipeline.run.lease import LEASE, refuse_if_held
from pipeline.run.provenance import collect_provenance, load_run_recipe
from pipeline.run.records import Provenance
from pipeline.run.tracking.wandb_ids import forget_run

RUNS = Path("runs")


def check_name(name: str | None) -> None:
    """Errors: ValueError for a --name that is not a run's: it becomes part of paths and of sbatch files."""
    if name is not None and not re.fullmatch(NAME, name):
        shown = name if name.isprintable() else repr(name)
        raise ValueError(f"--name {shown}: a run's name is 1 to 64 letters, digits, dots, dashes and underscores")


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _differences(old: Recipe, new: Recipe) -> list[str]:
    before, after = _flat(deciding_values(old)), _flat(deciding_values(new))
    keys = [k for k in (before | after) if before.get(k) != after.get(k)]
    return [f"{k}: {before.get(k)} -> {after.get(k)}" for k in keys]


def with_absolute_paths(recipe: Recipe) -> Recipe:
    """The recipe with absolute paths: a restart may have another working folder, and so do Ray's workers."""
    data = recipe.data
    files = {"train_file": str(Path(data.train_file).absolute()), "test_file": str(Path(data.test_file).absolute())}
    recipe = recipe.model_copy(update={"data": data.model_copy(update=files)})
    if recipe.model.weights is not None:
        weights = {"weights": str(Path(recipe.model.weights).absolute())}
        recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update=weights)})
    return recipe


def check_start(recipe: Recipe, name: str | None) -> Path:
    """The run directory in which a recipe would start or resume. Changes nothing.

    Errors: ValueError for a name that is none, or taken by a run of another recipe that has trained something, naming
    what differs; LeaseHeld while a process runs it, as its workers read recipe.yaml whenever they restart.
    """
    check_name(name)
    recipe = with_absolute_paths(recipe)
    folder = RUNS / (name or recipe.name)
    path = RunFolder(folder).recipe
    if path.exists():
        if not has_trained_nothing(folder) and recipe_hash(old := load_run_recipe(folder)) != recipe_hash(recipe):
            changes = "; ".join(_differences(old, recipe))
            raise ValueError(f"{folder} was started with another recipe ({changes}); choose a new --name")
    elif folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; choose another --name")
    elif folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} exists and is not a run (it has no recipe.yaml); choose another --name")
    held = {path.parent for path in folder.rglob(LEASE)} | {folder / stage.name for stage in stages_of(recipe)}
    for stage in sorted(held):
        refuse_if_held(stage)
    return folder


def has_trained_nothing(folder: Path) -> bool:
    """Whether a run directory has no checkpoint and no result, so that nothing is lost if it starts over."""
    kept = ("step-*", StageFolder(folder).result.name, StageFolder(folder).network.name)
    return not any(True for pattern in kept for _ in folder.rglob(pattern))


def begins_anew(folder: Path, recipe: Recipe, data_sha256: dict[str, str]) -> bool:
    """Whether a start in this run directory replaces a try with another recipe or data, which has trained nothing."""
    path = RunFolder(folder).recipe
    if not path.exists() or not has_trained_nothing(folder):
        return False
    try:
        old_recipe = load_resolved_recipe(path)
        old = Provenance.read_if_there(RunFolder(folder).provenance)
    except ValueError:  # of an earlier version, which accepted what this one refuses
        return True
    other_recipe = recipe_hash(old_recipe) != recipe_hash(with_absolute_paths(recipe))
    return other_recipe or old is None or old.data_sha256 != data_sha256


def open_or_create(recipe: Recipe, name: str | None, data_sha256: dict[str, str]) -> Path:
    """The run directory of a recipe: a new one, or the existing one of the same recipe, which then resumes.

    One that has trained nothing starts over: its recipe and data may be other ones than before.
    `data_sha256` is from `check_data`. Workers, ZeRO stage, checkpoint interval and tracking may differ from before.
    Errors: those of `check_start`.
    """
    folder = check_start(recipe, name)
    if begins_anew(folder, recipe, data_sha256):
        _forget_first_try(folder)
    write_run_folder(folder, with_absolute_paths(recipe), data_sha256)
    return folder


def _forget_first_try(folder: Path) -> None:
    """Remove what a start that trained nothing has recorded; its logs stay, but for the list of failures."""
    plans, ids = folder.rglob(StageFolder(folder).plan.name), folder.rglob("wandb/run_id")
    for path in {*(plan.parent for plan in plans), *(id_file.parents[1] for id_file in ids)}:
        stage = StageFolder(path)
        forget_run(path)
        stage.metrics.unlink(missing_ok=True)
        stage.plan.unlink(missing_ok=True)
    for path in (folder / "jobs.json", RunFolder(folder).logs / FAILURES, RunFolder(folder).provenance):
        path.unlink(missing_ok=True)


def write_run_folder(folder: Path, recipe: Recipe, data_sha256: dict[str, str]) -> None:
    """Create a run directory, or update the recipe of an existing one, which decides the same results.

    Recipe and provenance can be read by this user only: `slurm.setup` and the command may hold keys.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = RunFolder(folder).provenance
    if not path.exists():
        atomic_write_json(path, collect_provenance(recipe, data_sha256), PRIVATE)
    provenance = read_json(path)
    if provenance.get("recipe_sha256") != recipe_hash(recipe):  # of an older version, which knew fewer keys
        atomic_write_json(path, provenance | {"recipe_sha256": recipe_hash(recipe)}, PRIVATE)
    atomic_write_text(RunFolder(folder).recipe, dump_recipe(recipe), PRIVATE)


def check_data(recipe: Recipe) -> dict[str, str]:
    """The SHA-256 of the data files, once they agree with each other and the recipe, and of weights, by recipe key.

    Errors: ValueError naming the command that fixes it.
    """
    return _hashes(recipe, check_data_files(recipe))


def _hashes(recipe: Recipe, manifests: dict[str, Manifest]) -> dict[str, str]:
    hashes = {key: manifest.sha256 for key, manifest in manifests.items()}
    if recipe.model.weights is not None:
        weights = weights_file(Path(recipe.model.weights))
        try:
            hashes["model.weights"] = sha256_of(weights)
        except OSError as error:
            raise ValueError(f"model.weights = {weights} cannot be read: {error.strerror or error}") from None
    return hashes


def network_size(recipe: Recipe) -> int:
    """Number of weights. Errors: ValueError if the network does not take the images or has no layer of a structure, or
    model.weights do not fit it."""
    from pipeline.models import build_network, check_micro_batch  # imports torch, which takes seconds
    from pipeline.models.import_weights import load_foreign
    from pipeline.models.pruning.scores import check_structures

    size = recipe.data.image_size
    network = build_network(recipe.model, recipe.seed, size)
    check_micro_batch(recipe.model, size, size, recipe.batch.micro_batch)
    sparsity = recipe.sparsity
    check_structures(network, sparsity.structures, sparsity.keep_fractions, sparsity.round_to)
    if recipe.model.weights is not None:
        load_foreign(network, Path(recipe.model.weights), recipe.model, recipe.data.image_size)
    return sum(parameter.numel() for parameter in network.parameters())


def train_images(recipe: Recipe, manifest: Manifest) -> int:
    """Number of images that are trained on: neither held out nor extra."""
    own = manifest.num_samples - manifest.num_extra
    return sampling.num_train_images(own, recipe.data.validation_images, recipe.data.train_images)


def disk_bytes(recipe: Recipe, stages: list[Stage], weights: int, remembered: list[int]) -> int:
    """Checkpoints that are kept, with optimizer state in float32 and remembered perturbations; exported networks."""
    total = sum(remembered) * recipe.checkpoint.keep
    for stage in stages:
        phase, tensors = stage.trained_by, 1 + (stage.keep_fraction is not None)
        if phase is not None:
            tensors += (1 if phase.optimizer == "sgd" else 2) + phase.is_averaged
        total += 4 * weights * (tensors * (recipe.checkpoint.keep if stage.epochs else 1) + 1)
    return total


def check_same_data(folder: Path) -> None:
    """Raise ValueError unless recipe and data files are those that the run was started with, and agree."""
    original = Provenance.read(RunFolder(folder).provenance).data_sha256 or {}
    recipe = load_run_recipe(folder)
    manifests = open_data_files(recipe)
    for key, sha256 in _hashes(recipe, manifests).items():
        before = original.get(key, "unknown")
        if sha256 != before:
            raise ValueError(
                f"{key} was replaced after {folder} was started (sha256 {before[:12]}... -> {sha256[:12]}...); "
                "restore the file, or start again under another --name"
            )
    check_agreement(recipe, manifests)


def find_run(reference: str) -> Path:
    """'runs/demo' or 'demo' -> the run directory. Errors: ValueError listing the existing runs."""
    for folder in (Path(reference), RUNS / reference):
        if RunFolder(folder).recipe.exists():
            return folder
    names = sorted(p.parent.name for p in RUNS.glob("*/recipe.yaml"))
    raise ValueError(f"{reference}: no such run; runs here: {', '.join(names) or 'none'} (in {RUNS}/)")
