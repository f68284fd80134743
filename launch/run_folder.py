"""Run directories: created from a recipe, found by name. A restart reads nothing else."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pipeline.data.manifest import read_manifest
from pipeline.recipe.file import deciding_values, dump_recipe, recipe_hash
from pipeline.recipe.schema import NAME, Recipe
from pipeline.recipe.stages import stages_of
from pipeline.run.files import atomic_write_json, atomic_write_text, make_folder, read_json, sha256_of
from pipeline.run.layout import RunFolder
from pipeline.run.lease import refuse_if_held
from pipeline.run.provenance import collect_provenance, load_run_recipe
from pipeline.run.records import Provenance

RUNS = Path("runs")


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


def _with_absolute_paths(recipe: Recipe) -> Recipe:
    """A restart may have another working folder, and so do Ray's workers."""
    data = recipe.data
    files = {"train_file": str(Path(data.train_file).absolute()), "test_file": str(Path(data.test_file).absolute())}
    recipe = recipe.model_copy(update={"data": data.model_copy(update=files)})
    if recipe.model.weights is not None:
        weights = {"weights": str(Path(recipe.model.weights).absolute())}
        recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update=weights)})
    return recipe


def open_or_create(recipe: Recipe, name: str | None, data_sha256: dict[str, str]) -> Path:
    """The run directory of a recipe: a new one, or the existing one of the same recipe, which then resumes.

    `data_sha256` is from `check_data`. Workers, ZeRO stage, checkpoint interval and tracking may differ from before.
    Errors: ValueError naming what else differs; LeaseHeld while a process runs it, as its workers read recipe.yaml
    whenever they restart.
    """
    if name is not None and not re.match(NAME, name):
        raise ValueError(f"--name {name}: a run's name is 1 to 64 letters, digits, dots, dashes and underscores")
    recipe = _with_absolute_paths(recipe)
    folder = RUNS / (name or recipe.name)
    path = RunFolder(folder).recipe
    if path.exists():
        old = load_run_recipe(folder)
        if recipe_hash(old) != recipe_hash(recipe):
            changes = "; ".join(_differences(old, recipe))
            raise ValueError(f"{folder} was started with another recipe ({changes}); choose a new --name")
    elif folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} exists and is not a run (it has no recipe.yaml); choose another --name")
    for stage in stages_of(recipe):
        refuse_if_held(folder / stage.name)
    write_run_folder(folder, recipe, data_sha256)
    return folder


def write_run_folder(folder: Path, recipe: Recipe, data_sha256: dict[str, str]) -> None:
    """Create a run directory, or update the recipe of an existing one, which decides the same results."""
    make_folder(folder)
    if not RunFolder(folder).provenance.exists():
        atomic_write_json(RunFolder(folder).provenance, collect_provenance(recipe, data_sha256))
    provenance = read_json(RunFolder(folder).provenance)
    if provenance.get("recipe_sha256") != recipe_hash(recipe):  # of an older version, which knew fewer keys
        atomic_write_json(RunFolder(folder).provenance, provenance | {"recipe_sha256": recipe_hash(recipe)})
    atomic_write_text(RunFolder(folder).recipe, dump_recipe(recipe))


def check_data(recipe: Recipe) -> dict[str, str]:
    """The SHA-256 in the data files' manifests, and that of imported weights, by recipe key.

    Errors: ValueError naming the command that fixes it.
    """
    data, hashes = recipe.data, {}
    for key, name in (("data.train_file", data.train_file), ("data.test_file", data.test_file)):
        path = Path(name)
        if not path.is_file():
            source = " --source DIR" if data.dataset in ("image_folder", "imagenet") else ""
            raise ValueError(
                f"{key} = {path} does not exist; write it with: "
                f"python -m launch data write {data.dataset}{source} --out {path.parent}"
            )
        manifest = read_manifest(path)
        if manifest.dataset != data.dataset:
            raise ValueError(
                f"{key} = {path} holds {manifest.dataset}, but data.dataset is {data.dataset}; "
                f"set data.dataset={manifest.dataset}, or name another file"
            )
        hashes[key] = manifest.sha256
        if key == "data.train_file" and data.extra_fraction is not None and manifest.num_extra == 0:
            raise ValueError(
                f"data.extra_fraction = {data.extra_fraction}: {path} has no extra images; write it again with "
                "--extra FILE, or leave the key out"
            )
    if recipe.model.weights is not None:
        weights = Path(recipe.model.weights)
        if not weights.is_file():
            raise ValueError(f"model.weights = {weights} does not exist; name a file, or leave the key out")
        hashes["model.weights"] = sha256_of(weights)
    return hashes


def check_same_data(folder: Path) -> None:
    """Raise ValueError unless recipe and data files are those that the run was started with."""
    original = Provenance.read(RunFolder(folder).provenance).data_sha256 or {}
    for key, sha256 in check_data(load_run_recipe(folder)).items():
        before = original.get(key, "unknown")
        if sha256 != before:
            raise ValueError(
                f"{key} was replaced after {folder} was started (sha256 {before[:12]}... -> {sha256[:12]}...); "
                "restore the file, or start again under another --name"
            )


def find_run(reference: str) -> Path:
    """'runs/demo' or 'demo' -> the run directory. Errors: ValueError listing the existing runs."""
    for folder in (Path(reference), RUNS / reference):
        if RunFolder(folder).recipe.exists():
            return folder
    names = sorted(p.parent.name for p in RUNS.glob("*/recipe.yaml"))
    raise ValueError(f"{reference}: no such run; runs here: {', '.join(names) or 'none'} (in {RUNS}/)")
