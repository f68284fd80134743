"""Runs a run directory on this machine and shows its progress."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

from launch.display import follow
from pipeline.phases import stages_of
from pipeline.recipe_file import load_recipe


def check_data(folder: Path) -> None:
    """Raise ValueError, naming the command that mends it, unless the recipe's data files exist."""
    data = load_recipe(folder / "recipe.yaml").data
    for key, path in (("data.train_file", data.train_file), ("data.test_file", data.test_file)):
        if not Path(path).is_file():
            out = Path(path).parent
            source = "" if data.dataset == "fashion_mnist" else " --source IMAGE_FOLDER"
            raise ValueError(
                f"{key} = {path} does not exist; write it with: "
                f"python -m launch data write {data.dataset}{source} --out {out}"
            )


def run_here(folder: Path, observer: str | None = None) -> int:
    """Do what is left of the run; returns the exit code."""
    check_data(folder)
    from pipeline.driver import RunFailed, run, unfinished  # loads torch and ray: seconds, and not needed above

    recipe = load_recipe(folder / "recipe.yaml")
    if not unfinished(folder, recipe):
        print(f"{folder}: finished already; see: python -m launch report {folder}")
        return 0
    stop = threading.Event()
    names = [stage.name for stage in stages_of(recipe)]
    display = threading.Thread(target=follow, args=(folder, names, stop, sys.stderr), name="display", daemon=True)
    display.start()
    try:
        run(folder, observer)
    except RunFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        stop.set()
        display.join(timeout=10)
    return 0
