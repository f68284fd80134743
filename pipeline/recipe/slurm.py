"""The `slurm:` section of a recipe: what a job asks the cluster for. Names are sbatch's where it has one.

Only the schema is here, so that a recipe is checked as a whole; what is done with it is `launch`'s business. The values
stand in lines that sbatch reads, so none may hold a space or a line break; `setup` is shell, and is meant to be.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, StringConstraints, model_validator

from pipeline.recipe.fields import Section

Word = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.,:;|&()\[\]*@%+=/-][A-Za-z0-9_.,:;|&()\[\]*@%+=/#-]*$")]
"""A value of an sbatch option. Not at its beginning, # begins no comment: Pyxis has it in registry#image."""

_TIME = re.compile(r"^(?:(?P<d>\d+)-)?(?P<h>\d+):(?P<m>\d{2})(?::(?P<s>\d{2}))?$")


def _minutes(value: Any) -> int:
    """90, '90', '1:30:00' (h:m:s), '1-12:00' (days-h:m) -> minutes, rounded up."""
    text = str(value).strip()
    if text.isdigit():
        return int(text)
    match = _TIME.match(text)
    if match is None or (match["d"] is None and match["s"] is None):
        raise ValueError("expected minutes, hours:minutes:seconds or days-hours:minutes, such as 12:00:00")
    days, hours, minutes, seconds = (int(match[key] or 0) for key in "dhms")
    return (days * 24 + hours) * 60 + minutes + (seconds > 0)


def _node_range(value: Any) -> tuple[int, int]:
    """2, '2' or '1-4' -> (fewest, most)."""
    if isinstance(value, (tuple, list)) and len(value) == 2:
        low, high = value
    else:
        low, dash, high = str(value).replace(" ", "").partition("-")
        high = high if dash else low
    try:
        low, high = int(low), int(high)
    except ValueError:
        raise ValueError("expected a number of nodes, or a range such as 1-4") from None
    if not 1 <= low <= high:
        raise ValueError(f"the range of nodes {low}-{high} must begin at 1 or more and not end before it begins")
    return low, high


_OURS = (
    *("array", "dependency", "error", "job-name", "kill-on-invalid-dep", "no-requeue", "ntasks"),
    *("ntasks-per-node", "open-mode", "output", "parsable", "requeue", "signal", "tasks-per-node", "test-only", "wait"),
    "wrap",
)
"""sbatch options that a job is made with, or that would undo those."""


class Slurm(Section):
    """What one job asks for."""

    partition: Word | None = None
    account: Word | None = None
    qos: Word | None = None
    constraint: Word | None = None
    exclude: Word | None = None
    """Nodes that the job must not get."""
    nodes: Annotated[tuple[int, int], BeforeValidator(_node_range)] = (1, 1)
    """2, or 1-4: a restart may then continue on another number of nodes."""
    gpus_per_node: int | None = Field(default=None, ge=1)
    gres: Word | None = None
    """For clusters that know GPUs only as gres, for example gpu:a100:8; then say workers_per_node as well."""
    cpus_per_task: int = Field(default=1, ge=1)
    """CPUs of a node; one task runs per node."""
    workers_per_node: int | None = Field(default=None, ge=1)
    """Default: one per GPU; without GPUs as many as cpus_per_task has workers.threads."""
    mem: Word | None = None
    """Memory per node, for example 64G."""
    time: Annotated[int, BeforeValidator(_minutes)] = Field(default=60, ge=1)
    """Time limit in minutes, or 12:00:00."""
    signal_s: int = Field(default=120, ge=10)
    """How many seconds before its end a job is warned, to write a checkpoint and queue again."""
    node_start_s: int = Field(default=300, ge=10)
    """How many seconds the nodes of a job may take to come together."""
    parallel_jobs: int = Field(default=16, ge=1)
    """How many of a run's jobs may run at the same time."""
    setup: tuple[str, ...] = ()
    """Shell lines that run on the node first, for example `module load cuda`."""
    container_image: Word | None = None
    """For clusters with pyxis: the image the job runs in."""
    container_mounts: Word | None = None
    mail_user: Word | None = None
    mail_type: Word | None = None
    options: dict[str, Word] = Field(default_factory=dict)
    """Any other sbatch option by its long name, for example {reservation: icml}."""

    @model_validator(mode="after")
    def _gpus_once(self) -> Slurm:
        if self.gres is not None and self.gpus_per_node is not None:
            raise ValueError(f"gres {self.gres} and gpus_per_node {self.gpus_per_node} both ask for GPUs; keep one")
        if self.gres is not None and "gpu" in self.gres and self.workers_per_node is None:
            raise ValueError(f"gres {self.gres} needs workers_per_node: how many GPUs, and workers, a node has")
        return self

    @model_validator(mode="after")
    def _warned_in_time(self) -> Slurm:
        if self.signal_s >= self.time * 60:
            raise ValueError(f"signal_s {self.signal_s} must be less than the time limit of {self.time * 60} s")
        return self

    @model_validator(mode="after")
    def _options_are_others(self) -> Slurm:
        for name, value in self.options.items():
            if (key := name.replace("-", "_")) in Slurm.model_fields:
                raise ValueError(f"options.{name} = {value!r}: it has a key of its own; say slurm.{key}={value}")
            if name in _OURS:
                raise ValueError(f"options.{name} = {value!r}: a job is made with its own value of it; leave it out")
            if not re.match(r"^[a-z][a-z-]*$", name):
                raise ValueError(f"options.{name} = {value!r}: write the long name of an sbatch option, without --")
        return self

    def workers_of_a_node(self, threads: int) -> int:
        """How many workers of `threads` CPU threads a node carries. Errors: ValueError if none."""
        if self.workers_per_node is not None:
            return self.workers_per_node
        if self.gpus_per_node is not None:
            return self.gpus_per_node
        if self.cpus_per_task < threads:
            raise ValueError(
                f"slurm.cpus_per_task {self.cpus_per_task} is less than the workers.threads {threads} of one worker"
            )
        return self.cpus_per_task // threads
