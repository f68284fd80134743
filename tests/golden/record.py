"""Runs the golden recipes and records their losses in losses.json: `python -m tests.golden.record`.

Use it after a change that is meant to change numbers, and on a processor model that has no section yet. A section
belongs to one processor model, because its vector instructions determine the order of floating-point sums.
"""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from pipeline.distributed import Group
from pipeline.recipe.file import dump_recipe
from pipeline.recipe.schema import Recipe
from pipeline.recipe.stages import stages_of
from pipeline.run.files import atomic_write_json, atomic_write_text, read_json, read_rows
from pipeline.run.lease import Leases
from pipeline.run.provenance import CPUS, processor_model
from pipeline.training.context import RunContext
from pipeline.training.stage import run_stages
from tests.conftest import write_fashion_data
from tests.golden.recipes import RECIPES, golden_recipe
from tests.support.processes import run_group

FILE = Path(__file__).with_name("losses.json")
DEADLINE_S = 1200
"""For all steps, on a machine under ten times the load."""

Facts = dict[str, str]
"""One stage: its `losses`, a hexadecimal float per step; SHA-256 of its final `weights`, and `masks` if pruned."""
Golden = dict[str, dict[str, Facts]]
"""Recipe -> stage -> facts."""


def processor() -> str:
    """The name of this machine's section. Includes more than the model's name, which virtual machines may hide."""
    first = CPUS.read_text(encoding="utf-8", errors="replace").partition("\n\n")[0] if CPUS.exists() else ""
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
    numbers = [f"{key} {fields[key]}" for key in ("cpu family", "model", "cache size") if key in fields]
    vectors = sorted(flag for flag in fields.get("flags", "").split() if flag.startswith(("avx", "amx", "fma")))
    return ", ".join([processor_model(), *numbers, *vectors])


def run_golden_recipes(data: Path, root: Path) -> Golden:
    """Run every golden recipe in the folder `root` with one worker, all in one process."""
    recipes = {name: golden_recipe(data, name) for name in RECIPES}
    leases: list[Leases] = []
    try:
        for name, recipe in recipes.items():
            (root / name).mkdir()
            atomic_write_text(root / name / "recipe.yaml", dump_recipe(recipe))
            leases.append(Leases([root / name / stage.name for stage in stages_of(recipe)]))
        runs = [
            (recipe, root / name, lease.token) for (name, recipe), lease in zip(recipes.items(), leases, strict=True)
        ]
        run_group(1, _run_recipes, runs, deadline_s=DEADLINE_S)
    finally:
        for lease in leases:
            lease.release()
    return {
        name: {stage.name: _facts(root / name / stage.name) for stage in stages_of(recipe)}
        for name, recipe in recipes.items()
    }


def _run_recipes(group: Group, runs: list[tuple[Recipe, Path, str]]) -> None:
    for recipe, folder, token in runs:
        run_stages(RunContext(recipe, folder, token, group), stages_of(recipe))


def _facts(stage: Path) -> Facts:
    weights = hashlib.sha256()
    for name, tensor in sorted(load_file(stage / "model.safetensors").items()):
        weights.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode() + tensor.numpy().tobytes())
    losses = [float(row["loss"]).hex() for row in read_rows(stage / "metrics.jsonl") if row["kind"] == "train"]
    masks = read_json(stage / "result.json")["mask_sha256"]
    return {"losses": " ".join(losses), "weights": weights.hexdigest(), **({} if masks is None else {"masks": masks})}


def replace_section(sections: dict[str, Any], name: str, section: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The sections of losses.json with section `name` replaced, and a description of the change.

    If its numbers have changed, the sections of other processor models belong to earlier code, and are dropped.
    """
    before = sections.get(name)
    if before is None:
        return {**sections, name: section}, f"new section for {name}"
    if before["recipes"] == section["recipes"]:
        return {**sections, name: section}, f"unchanged numbers for {name}"
    changes = [
        f"{recipe}: {stage}"
        for recipe, stages in section["recipes"].items()
        for stage, facts in stages.items()
        if before["recipes"].get(recipe, {}).get(stage) != facts
    ]
    drops = [f"dropped, as it belongs to earlier code: {other}" for other in sections if other != name]
    return {name: section}, "\n  ".join([f"changed numbers for {name}", *changes, *drops])


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        data, root = Path(folder) / "data", Path(folder) / "runs"
        data.mkdir()
        root.mkdir()
        write_fashion_data(data)
        section = {"torch": torch.__version__, "recipes": run_golden_recipes(data, root)}
    sections, change = replace_section(read_json(FILE) if FILE.exists() else {}, processor(), section)
    atomic_write_json(FILE, sections)
    print(f"{FILE}: {change}")


if __name__ == "__main__":
    main()
