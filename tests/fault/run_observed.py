"""What `python -m launch resume` does, with an observer in the workers.

`python -m tests.fault.run_observed FOLDER OBSERVER`
"""

from __future__ import annotations

import sys
from pathlib import Path

from launch.local import run_here

if __name__ == "__main__":
    sys.exit(run_here(Path(sys.argv[1]), observer=sys.argv[2]))
