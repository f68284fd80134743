"""Many random faults on one run, on a real SLURM: `python -m tests.slurm.soak DATA_FOLDER --faults 50 --seed 1`.

Each fault strikes while a step is being computed or saved. When all have struck, the run ends by itself, and its
weights, scores, momenta, metrics and verdicts must equal those of an undisturbed run. Prints the table that
docs/failures.md holds: which fault, how often, steps lost, seconds until the next step.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from launch.slurm.submit import active_jobs, read_jobs
from tests.fault.final_state import unlike
from tests.slurm.faults import KINDS, Outcome, as_row
from tests.slurm.struck import strike_in_turn, two_node_recipe
from tests.slurm.throttle import FOLDER
from tests.support.commands import wait_until
from tests.support.slurm_cluster import SlurmCluster
from tests.support.undisturbed_run import calm_run, new_run


def drawn(count: int, seed: int) -> list[str]:
    """`count` kinds in random order, all equally often but for the rest of the division."""
    chance = random.Random(seed)
    rounds, rest = divmod(count, len(KINDS))
    kinds = [*KINDS] * rounds + chance.sample(KINDS, rest)
    chance.shuffle(kinds)
    return kinds


def table(outcomes: Sequence[Outcome]) -> str:
    """Markdown: one row per kind."""
    lines = [
        "| fault | times (during a save) | steps lost, median (most) | seconds until the next step, median (most) |",
        "|---|---|---|---|",
    ]
    for kind in KINDS:
        ours = [outcome for outcome in outcomes if outcome.kind == kind]
        if ours:
            lost, seconds = [o.lost_steps for o in ours], [o.recovered_s for o in ours]
            saves = sum(o.place == "save" for o in ours)
            lines.append(
                f"| `{kind}` | {len(ours)} ({saves}) | {statistics.median(lost):.0f} ({max(lost)}) "
                f"| {statistics.median(seconds):.0f} ({max(seconds):.0f}) |"
            )
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with train.beton and test.beton")
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--record", type=Path, help="write every outcome there, as JSON")
    options = parser.parse_args(arguments)
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        place = Path(name)
        os.environ[FOLDER] = name
        recipe = two_node_recipe(options.data.resolve(), options.faults)
        with SlurmCluster(place / "s") as cluster:
            os.environ.update(cluster.environment)
            folder = new_run(place / "runs" / "struck", recipe)
            outcomes = []
            for outcome in strike_in_turn(cluster, folder, drawn(options.faults, options.seed), chance):
                outcomes.append(outcome)
                print(json.dumps(as_row(outcome)), flush=True)
                if options.record is not None:
                    record = {"seed": options.seed, "outcomes": [as_row(outcome) for outcome in outcomes]}
                    options.record.write_text(json.dumps(record, indent=1) + "\n")
            (place / "full-speed").touch()
            wait_until(lambda: not active_jobs(read_jobs(folder)), 900, "the end of all jobs")
        print(table(outcomes))
        calm = calm_run(place / "runs" / "calm", recipe)
        differences = unlike(recipe, calm, folder)
        print(
            f"{len(outcomes)} faults, seed {options.seed}: "
            + (f"DIFFERENT: {differences[:5]}" if differences else "equal bit for bit")
        )
        return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
