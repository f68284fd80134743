"""What `python -m launch resume` does, with an observer in the workers, on Ray or in processes without it.

`python -m tests.fault.run_observed FOLDER [without-ray]`
"""

from __future__ import annotations

import sys
from pathlib import Path

from launch.local import run_here
from pipeline.recipe_file import load_recipe
from tests.calm import finish
from tests.fault.cuts import cut

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    if sys.argv[2:] == ["without-ray"]:
        finish(folder, load_recipe(folder / "recipe.yaml"), cut)
    else:
        sys.exit(run_here(folder, observer="tests.fault.cuts:cut"))
