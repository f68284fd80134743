"""What of a run's recipe and origin others are shown: by wandb, and by the report's page, which is made to be mailed.

Nothing else of them goes there. The recipe's slurm section is held back, as its `setup` is shell, in which people
export keys; so are the command and the host, which are nobody's business.
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

from pipeline.recipe.schema import Recipe
from pipeline.run.files import read_json_if_there

OF_PROVENANCE = (
    *("commit", "created", "machine", "processor", "cores", "gpus", "python"),
    *("recipe_sha256", "data_sha256", "versions"),
)


def public_recipe(recipe: Recipe) -> dict[str, Any]:
    """The resolved recipe as plain values."""
    return recipe.model_dump(mode="json", exclude={"slurm"})


def public_provenance(run: Path) -> dict[str, Any]:
    """What may be told of a run directory's provenance.json; empty for a run that has none. Errors: ValueError for a
    damaged file."""
    origin = read_json_if_there(run / "provenance.json") or {}
    return {key: origin[key] for key in OF_PROVENANCE if key in origin}


def config_of(recipe: Recipe, run: Path) -> dict[str, Any]:
    """Both, as wandb's config of a run."""
    return {**public_recipe(recipe), "origin": public_provenance(run)}


CPUS = Path("/proc/cpuinfo")


def processor_model() -> str:
    """The first model that the kernel names, or at least the architecture where it names none."""
    try:
        lines = CPUS.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.machine())
