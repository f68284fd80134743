"""The folder of a finished run whose networks are untrained: recipe, networks and results, and no evaluation."""

from __future__ import annotations

from pathlib import Path

from pipeline.models import build_network
from pipeline.models.export import write_model
from pipeline.models.state import effective_state
from pipeline.recipe.file import dump_recipe
from pipeline.recipe.schema import Recipe
from pipeline.recipe.stages import stages_of
from pipeline.run.files import atomic_write_json, sha256_of


def write_finished_run(folder: Path, recipe: Recipe, **facts: object) -> Path:
    """Every stage has a network of its own seed; `facts` join its metadata. Returns `folder`."""
    for seed, stage in enumerate(stages_of(recipe)):
        (folder / stage.name).mkdir(parents=True)
        file = folder / stage.name / "model.safetensors"
        state = effective_state(build_network(recipe.model, seed, recipe.data.image_size))
        write_model(file, state, recipe.model, {"image_size": recipe.data.image_size, **facts})
        atomic_write_json(file.with_name("result.json"), {"model_sha256": sha256_of(file)})
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    return folder
