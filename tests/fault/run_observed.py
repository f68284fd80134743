"""What `python -m launch resume` does, with an observer in the workers, on Ray or in processes without it.

`python -m tests.fault.run_observed FOLDER OBSERVER [without-ray]`
"""

from __future__ import annotations

import sys
from pathlib import Path

from launch.local import run_here
from pipeline.recipe.file import load_recipe
from tests.support.undisturbed_run import finish

if __name__ == "__main__":
    folder, observer = Path(sys.argv[1]), sys.argv[2]
    if sys.argv[3:] == ["without-ray"]:
        finish(folder, load_recipe(folder / "recipe.yaml"), observer)
    else:
        sys.exit(run_here(folder, observer=observer))
