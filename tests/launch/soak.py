"""Many random faults on one run, on a real SLURM: `python -m tests.launch.soak DATA_FOLDER --faults 50 --seed 1`.

Each fault lands while a step is being computed or saved. When all have struck, the run ends by itself, and its weights,
scores, momenta, metrics and verdicts must equal those of an undisturbed run. Prints the table that docs/failures.md
holds: which fault, how often, steps lost, seconds until the next step.
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

from launch.slurm import living, read_jobs, submit
from tests.calm import calm_run, new_run
from tests.commands import launch, wait_until
from tests.fault.final_state import differences, final_state
from tests.launch.faults import KINDS, RECOVERY_S, Outcome, Victim, as_row
from tests.launch.test_faults import STAGES, job_of, two_node_recipe
from tests.launch.throttle import FOLDER
from tests.slurm_cluster import SlurmCluster

WITHOUT_PROGRESS = 2
"""Faults in a row that the run is let recover from without a checkpoint in between."""
UNWARNED = "unwarned_preemption"
AT_LEAST = 3
"""How often every kind strikes."""
STEPS_PER_FAULT = 25
"""Room for the steps between two faults; more than are needed are computed at full speed in the end."""


def drawn(count: int, seed: int) -> list[str]:
    """`count` kinds in random order, each at least AT_LEAST times; first those that need the cluster's warnings off."""
    chance = random.Random(seed)
    kinds = [*KINDS] * AT_LEAST
    kinds += chance.choices(KINDS, k=max(0, count - len(kinds)))
    chance.shuffle(kinds)
    return sorted(kinds, key=lambda kind: kind != UNWARNED)


def table(outcomes: Sequence[Outcome]) -> str:
    """Markdown: one row per kind."""
    lines = [
        "| fault | times | steps lost, median (most) | seconds until the next step, median (most) |",
        "|---|---|---|---|",
    ]
    for kind in KINDS:
        ours = [outcome for outcome in outcomes if outcome.kind == kind]
        if ours:
            lost, seconds = [o.lost_steps for o in ours], [o.recovered_s for o in ours]
            lines.append(
                f"| `{kind}` | {len(ours)} | {statistics.median(lost):.0f} ({max(lost)}) "
                f"| {statistics.median(seconds):.0f} ({max(seconds):.0f}) |"
            )
    return "\n".join(lines)


def _let_it_progress(victim: Victim, outcomes: Sequence[Outcome]) -> None:
    """A run that never gets from one checkpoint to the next gives up, as it should; so it is not struck for ever."""
    held = [outcome.resumed_from == victim.checkpoint() for outcome in outcomes[-WITHOUT_PROGRESS:]]
    if len(held) == WITHOUT_PROGRESS and all(held):
        before = victim.checkpoint()
        wait_until(lambda: victim.checkpoint() > before, RECOVERY_S, f"a checkpoint after step {before}")


def _started(cluster: SlurmCluster, folder: Path) -> Victim:
    submit(folder, observer="tests.launch.throttle:slow")
    return Victim(cluster, folder, job_of(folder, "pretrain"), "pretrain")


def _ended(folder: Path) -> None:
    if launch(folder.parent.parent, "cancel", str(folder)).code:
        raise RuntimeError(f"{folder} could not be cancelled")
    wait_until(lambda: not living(read_jobs(folder)), 60, "the end of all jobs")


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
        recipe = two_node_recipe(options.data.resolve(), pretrain_steps=options.faults * STEPS_PER_FAULT)
        with SlurmCluster(place / "s") as cluster:
            os.environ.update(cluster.environment)
            folder = new_run(place / "runs" / "struck", recipe)
            cluster.set_warning(False)
            victim = _started(cluster, folder)
            outcomes = []
            for kind in drawn(options.faults, options.seed):
                if kind != UNWARNED and not cluster.warns:
                    _ended(folder)
                    cluster.set_warning(True)
                    victim = _started(cluster, folder)
                _let_it_progress(victim, outcomes)
                victim.wait_for_step(victim.step() + chance.randint(2, 8))
                outcomes.append(victim.strike(kind, chance.randrange(4)))
                print(json.dumps(as_row(outcomes[-1])), flush=True)
                if options.record is not None:
                    record = {"seed": options.seed, "outcomes": [as_row(outcome) for outcome in outcomes]}
                    options.record.write_text(json.dumps(record, indent=1) + "\n")
            (place / "full-speed").touch()
            wait_until(lambda: not living(read_jobs(folder)), 900, "the end of all jobs")
        print(table(outcomes))
        calm = calm_run(place / "runs" / "calm", recipe)
        unlike = differences(final_state(calm, STAGES), final_state(folder, STAGES))
        print(
            f"{len(outcomes)} faults, seed {options.seed}: "
            + (f"DIFFERENT: {unlike[:5]}" if unlike else "equal bit for bit")
        )
        return 1 if unlike else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
