"""The `slurm:` section of a recipe: the resources of its jobs, under sbatch's names where it has them.

Schema only, so that a recipe is validated as a whole; `launch.slurm` uses it. Values are written into #SBATCH lines, so
none may contain a space or a line break. `setup` is shell code by design.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, StringConstraints, model_validator

from pipeline.recipe.fields import Count, Section, exact_decimal

Word = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.,:;|&()\[\]*@%+=/-][A-Za-z0-9_.,:;|&()\[\]*@%+=/#-]*$")]
"""A value of an sbatch option. A # begins a comment only at its start: Pyxis uses registry#image."""

_TIME = re.compile(r"(?:(?P<d>\d{1,6})-)?(?P<h>\d{1,6}):(?P<m>\d{2})(?::(?P<s>\d{2}))?")


def _minutes(value: Any) -> int:
    """90, '90', '1:30:00' (h:m:s), '1-12:00' (days-h:m) -> minutes, rounded up."""
    text = str(value).strip()
    if text.isdecimal() and (number := exact_decimal(text)) is not None:
        return int(number)
    match = _TIME.fullmatch(text)
    if match is None or (match["d"] is None and match["s"] is None):
        raise ValueError("expected minutes, hours:minutes:seconds or days-hours:minutes, such as 12:00:00")
    days, hours, minutes, seconds = (int(match[key] or 0) for key in "dhms")
    return (days * 24 + hours) * 60 + minutes + (seconds > 0)


def _node_range(value: Any) -> tuple[int, int]:
    """2, '2' or '1-4' -> (min, max)."""
    if isinstance(value, (tuple, list)) and len(value) == 2:
        low, high = value
    else:
        low, dash, high = str(value).replace(" ", "").partition("-")
        high = high if dash else low
    try:
        low, high = int(str(low)), int(str(high))
    except ValueError:
        raise ValueError("expected a number of nodes, or a range such as 1-4") from None
    if not 1 <= low <= high:
        raise ValueError(f"the range of nodes {low}-{high} must be ascending and begin at 1 or more")
    return low, high


_RESERVED = (
    *("array", "dependency", "error", "job-name", "kill-on-invalid-dep", "no-requeue", "ntasks"),
    *("ntasks-per-node", "open-mode", "output", "parsable", "requeue", "signal", "tasks-per-node", "test-only", "wait"),
    "wrap",
)
"""sbatch options that the launcher sets, or that would conflict with those."""


class Slurm(Section):
    """Resources of one job."""

    partition: Word | None = None
    account: Word | None = None
    qos: Word | None = None
    constraint: Word | None = None
    exclude: Word | None = None
    """Nodes that the job must not run on."""
    nodes: Annotated[tuple[Count, Count], BeforeValidator(_node_range)] = (1, 1)
    """2, or a range such as 1-4, within which a restart may change the number of nodes."""
    gpus_per_node: Count | None = Field(default=None, ge=1)
    gres: Word | None = None
    """For clusters that offer GPUs only as gres, for example gpu:a100:8; set workers_per_node as well."""
    cpus_per_task: Count = Field(default=1, ge=1)
    """CPUs per node, since one task runs per node."""
    workers_per_node: Count | None = Field(default=None, ge=1)
    """Default: one per GPU; without GPUs, cpus_per_task // workers.threads."""
    mem: Word | None = None
    """Memory per node, for example 64G."""
    time: Annotated[Count, BeforeValidator(_minutes)] = Field(default=60, ge=1)
    """Time limit in minutes, or 12:00:00."""
    signal_s: Count = Field(default=120, ge=10)
    """Seconds before its time limit at which a job is signalled, to write a checkpoint and requeue."""
    node_start_s: Count = Field(default=300, ge=10)
    """Seconds within which all nodes of a job must have joined."""
    parallel_jobs: Count = Field(default=16, ge=1)
    """Maximum number of a run's jobs that run concurrently."""
    setup: tuple[str, ...] = ()
    """Shell lines to run first on each node, for example `module load cuda`."""
    container_image: Word | None = None
    """For clusters with Pyxis: the container image of the job."""
    container_mounts: Word | None = None
    mail_user: Word | None = None
    mail_type: Word | None = None
    options: dict[str, Word] = Field(default_factory=dict)
    """Any other sbatch option by its long name, for example {reservation: icml}."""

    @model_validator(mode="after")
    def _one_request_for_gpus(self) -> Slurm:
        if self.gres is not None and self.gpus_per_node is not None:
            raise ValueError(f"gres {self.gres} and gpus_per_node {self.gpus_per_node} both ask for GPUs; keep one")
        if self.gres is not None and "gpu" in self.gres and self.workers_per_node is None:
            raise ValueError(f"gres {self.gres} needs workers_per_node, the number of GPUs per node")
        return self

    @model_validator(mode="after")
    def _signal_precedes_time_limit(self) -> Slurm:
        if self.signal_s >= self.time * 60:
            raise ValueError(f"signal_s {self.signal_s} must be less than the time limit of {self.time * 60} s")
        return self

    @model_validator(mode="after")
    def _options_have_no_key(self) -> Slurm:
        for name, value in self.options.items():
            if (key := name.replace("-", "_")) in Slurm.model_fields:
                raise ValueError(f"options.{name} = {value!r}: it has its own key; use slurm.{key}={value}")
            if name in _RESERVED:
                raise ValueError(f"options.{name} = {value!r}: the launcher sets this option; leave it out")
            if not re.fullmatch(r"[a-z][a-z-]*", name):
                raise ValueError(f"options.{name} = {value!r}: write the long name of an sbatch option, without --")
        return self

    @property
    def asks_for_gpus(self) -> bool:
        return self.gpus_per_node is not None or "gpu" in (self.gres or "")

    def check_room(self, device: str, threads: int) -> None:
        """Refuse jobs that would wait for GPUs that they did not ask for, or whose workers would share cores.

        `device` and `threads` are those of `workers`. Errors: ValueError.
        """
        if device == "cuda" and not self.asks_for_gpus:
            raise ValueError(
                "workers.device cuda: the job asks for no GPU, and its workers would wait for one; add "
                "slurm.gpus_per_node=N, or slurm.gres and slurm.workers_per_node where GPUs are offered as gres"
            )
        workers = self.workers_of_a_node(threads)
        if self.asks_for_gpus and self.cpus_per_task < (needed := workers * threads):
            raise ValueError(
                f"slurm.cpus_per_task {self.cpus_per_task}: a node's {workers} workers, one per GPU, with "
                f"workers.threads {threads} each, would share cores; set slurm.cpus_per_task={needed} or more"
            )

    def workers_of_a_node(self, threads: int) -> int:
        """Number of workers with `threads` CPU threads each that a node runs. Errors: ValueError if none fits."""
        if self.workers_per_node is not None:
            return self.workers_per_node
        if self.gpus_per_node is not None:
            return self.gpus_per_node
        if self.cpus_per_task < threads:
            raise ValueError(
                f"slurm.cpus_per_task {self.cpus_per_task} is less than the workers.threads {threads} of one worker"
            )
        return self.cpus_per_task // threads
