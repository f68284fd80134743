"""Runs all tests, in four lanes: `python -m tests.run_all`, which `make test` calls.

The unit tests come first, with a process per core, and then, in the same way, those of process groups, which start
neither Ray nor a command. SLURM's tests and the runs follow, in parallel: SLURM's often wait, for its deadlines, for
Ray to start, for a fault to end, and the runs use the CPU time that they leave. Two SLURM clusters at a time on two
cores led to timeouts, and so did unit tests beside the other lanes. Every line of output has its time and lane, and the
failed tests are named again at the end. Exit code: 0 if every test passed, and 1 otherwise; a call of pytest that runs
no test counts as failed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat

from tests.support.shared import FOLDER

# A process that dies is not replaced: with --dist=loadfile, its replacement may wait for ever.
PER_CORE = ("-n", "logical", "--maxprocesses=8", "--dist=loadfile", "--max-worker-restart=0")
LANES: tuple[dict[str, list[str]], ...] = (
    {"unit": ["tests/unit", *PER_CORE]},
    {"groups": ["tests/distributed", "tests/golden", *PER_CORE, "--no-loadscope-reorder"]},  # in the order of LONGEST
    {
        "slurm": ["tests/slurm", "-v"],
        # One at a time: most of them start several processes.
        "runs": ["tests/end_to_end", "tests/fault"],
    },
)
"""Lane -> the arguments of its call of pytest. The lanes of one dict run in parallel."""
LONGEST = (
    *("test_faults.py", "test_elastic.py", "test_races.py", "test_missing_node.py"),
    *("test_every_objective.py", "test_imagenet_shape.py", "test_compiled.py", "test_command_line.py"),
    *("test_exact_resume.py", "test_bounded_restarts.py", "test_non_finite.py", "test_dynamic_masks.py"),
    *("test_golden.py", "test_engine.py", "test_world_sizes.py", "test_tracked_run.py", "test_trials.py"),
    *("test_learned_masks.py", "test_full_disk.py", "test_overfitting.py", "test_free.py", "test_attacks.py"),
)
"""Files whose tests take longest, the longest first: conftest runs them first, in this order."""


@dataclass(frozen=True)
class Outcome:
    code: int
    """Exit code of pytest."""
    failed: list[str]
    """Its lines that name a failed test."""


def _run_lane(lane: str, arguments: list[str], start: float) -> Outcome:
    """Call pytest and print its output. Ctrl-C reaches every pytest, which cleans up."""
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "pytest", *arguments, "--durations=10"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=(lambda: os.nice(19)) if lane == "runs" else None,
    )
    assert process.stdout is not None
    failed: list[str] = []
    for line in process.stdout:
        minutes, seconds = divmod(int(time.monotonic() - start), 60)
        print(f"{minutes:2d}:{seconds:02d} {lane:6s} {line}", end="", flush=True)
        if line.startswith(("FAILED ", "ERROR ")):
            failed.append(line.rstrip())
    return Outcome(process.wait(), failed)


def main() -> int:
    start = time.monotonic()
    outcomes: dict[str, Outcome] = {}
    with tempfile.TemporaryDirectory(prefix="robust-tests-") as folder:
        os.environ[FOLDER] = folder
        for lanes in LANES:
            with ThreadPoolExecutor(len(lanes)) as pool:
                outcomes |= zip(lanes, pool.map(_run_lane, lanes.keys(), lanes.values(), repeat(start)), strict=False)
    for lane, outcome in outcomes.items():
        print(f"lane {lane}: {f'FAILED, with exit code {outcome.code} of pytest' if outcome.code else 'passed'}")
        for line in outcome.failed:
            print(f"  {line}")
    return int(any(outcome.code for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
