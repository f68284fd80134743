"""What a run talks to: Ray, wandb's server, SLURM."""

from __future__ import annotations

import os
from pathlib import Path

from launch.doctor.outcome import Outcome, ProgressCallback, Subject
from pipeline.run.tracking.wandb_mode import asked_mode

RAY_S = 400.0


def check_ray(subject: Subject, progress: ProgressCallback) -> Outcome:
    """A cluster of one worker starts, runs a task and ends."""
    from launch.ray_cluster.trial import run_trial

    reason = run_trial(RAY_S)
    if reason is not None:
        fix = "what the lines about memory, open files and the temporary folder say; or run it again on an idle machine"
        return Outcome("fail", reason, fix)
    return Outcome("pass", "it starts, runs a task, and leaves no process")


def check_wandb(subject: Subject, progress: ProgressCallback) -> Outcome:
    """The mode that a run here would have; whether the server accepts the key, if it is online."""
    from pipeline.run.tracking.wandb_mirror import ask_server, choose_mode

    setting = "auto" if subject.recipe is None else subject.recipe.tracking.wandb
    asked = asked_mode(os.environ, Path.cwd())
    mode = choose_mode() if setting == "auto" else setting
    if mode != "online":
        if setting != "auto":
            return Outcome("pass", f"{mode}, by tracking.wandb")
        if asked is not None:
            return Outcome("pass", f"{mode}, by choice (WANDB_MODE, WANDB_DISABLED or wandb's settings)")
        text = "no key is here: runs are recorded offline (`wandb sync` uploads them)"
        return Outcome("warn", text, "wandb login; or WANDB_MODE=offline, if that is meant")
    try:
        server = ask_server()
    except Exception as error:  # of wandb, of many types
        text = f"online, and its server cannot be reached: {' '.join(str(error).split())}"
        return Outcome("fail", text, "a proxy (HTTPS_PROXY), wandb login, or WANDB_MODE=offline")
    return Outcome("pass", f"online: {server} accepts the key")


def check_slurm(subject: Subject, progress: ProgressCallback) -> Outcome:
    """sinfo answers, and the recipe's partition is up."""
    from launch.slurm.submit import run_client

    section = None if subject.recipe is None else subject.recipe.slurm
    wanted = subject.on_slurm or section is not None
    try:
        lines = [line.split() for line in run_client("sinfo", "--noheader", "--format=%R %a %D").splitlines()]
    except ValueError as error:
        if not wanted:
            return Outcome("pass", f"not asked for ({error})")
        return Outcome("fail", str(error), "a login node of the cluster, with SLURM's commands on PATH")
    partitions: dict[str, int] = {}
    for name, availability, nodes in (line for line in lines if len(line) == 3):
        partitions[name] = partitions.get(name, 0) + (int(nodes) if availability == "up" else 0)
    if section is not None and section.partition is not None:
        for name in section.partition.split(","):
            if not partitions.get(name):
                text = (
                    f"slurm.partition = {name} {'has no node that is up' if name in partitions else 'does not exist'}"
                )
                return Outcome("fail", text, f"one of {', '.join(sorted(partitions)) or 'no partition'}")
    sizes = ", ".join(f"{name} ({nodes} nodes)" for name, nodes in partitions.items())
    return Outcome("pass", f"it answers: {sizes or 'no partition'}")
