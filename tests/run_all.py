"""All tests, in two lanes side by side: `python -m tests.run_all`, which `make test` calls.

SLURM's tests mostly wait: for its deadlines, for Ray to start, for a fault's end. The rest uses what they leave of the
processors, in Linux's idle class, so that SLURM and Ray run as if they were alone. Every line says when it was printed
and by which lane. Exit code: 0 if every test passed, and 1 otherwise; a call of pytest that ran no test fails.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

LANES: dict[str, list[list[str]]] = {
    "slurm": [["tests/slurm"]],
    "rest": [
        # One at a time: most of them start several processes.
        ["tests/distributed", "tests/end_to_end", "tests/fault", "tests/golden"],
        ["tests/unit", "-n", "logical", "--maxprocesses=8", "--dist=loadfile"],
    ],
}
"""What pytest is called with, one call after the other."""
POLITE = "rest"
INTERRUPTED = 2
"""pytest's exit code."""


def _leave_processors_to_others() -> None:
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def _run(name: str, arguments: list[str], began: float) -> int:
    """pytest's exit code, once all that it printed has been shown."""
    lane = subprocess.Popen(
        [sys.executable, "-u", "-m", "pytest", "--durations=10", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=_leave_processors_to_others if name == POLITE else None,
    )
    assert lane.stdout is not None
    for line in lane.stdout:
        minutes, seconds = divmod(int(time.monotonic() - began), 60)
        print(f"{minutes:2d}:{seconds:02d} {name:5s} {line}", end="", flush=True)
    return lane.wait()


def main() -> int:
    began = time.monotonic()

    def codes(name: str) -> list[int]:
        ended: list[int] = []
        for arguments in LANES[name]:
            ended.append(_run(name, arguments, began))
            # Ctrl-C reaches every pytest as it reaches this process; they clean up and end.
            if ended[-1] == INTERRUPTED:
                break
        return ended

    with ThreadPoolExecutor(len(LANES)) as pool:
        results = dict(zip(LANES, pool.map(codes, LANES), strict=True))
    for name, ended in results.items():
        failed = [f"{LANES[name][call][0]} ({code})" for call, code in enumerate(ended) if code]
        print(
            f"lane {name}: {'passed' if not failed else 'FAILED, with the exit codes of pytest: ' + ', '.join(failed)}"
        )
    return int(any(code for ended in results.values() for code in ended))


if __name__ == "__main__":
    sys.exit(main())
