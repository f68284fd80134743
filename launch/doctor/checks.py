"""The checks, in their order, and which of them apply."""

from __future__ import annotations

from launch.doctor.outcome import Check, Subject

MACHINE = (
    Check("versions", "launch.doctor.software:check_versions", 60.0),
    Check("shared memory", "launch.doctor.machine:check_shared_memory", 30.0),
    Check("temporary folder", "launch.doctor.machine:check_temporary_folder", 60.0),
    Check("open files", "launch.doctor.machine:check_open_files", 30.0),
    Check("disk", "launch.doctor.files:check_disk", 300.0),
    Check("GPUs", "launch.doctor.gpus:check_gpus", 450.0),
    Check("FFCV", "launch.doctor.files:check_ffcv", 450.0),
    Check("Ray", "launch.doctor.services:check_ray", 450.0),
    Check("wandb", "launch.doctor.services:check_wandb", 90.0),
)
RECIPE = (
    Check("network", "launch.doctor.files:check_network", 300.0),
    Check("data", "launch.doctor.files:check_data", 180.0),
)
"""Of a recipe or run."""
SLURM = Check("SLURM", "launch.doctor.services:check_slurm", 90.0)
"""Where jobs are submitted."""


def checks_of(subject: Subject) -> list[Check]:
    """The checks of a machine that runs the recipe, if any is named."""
    return [*MACHINE, *(RECIPE if subject.values is not None else ())]
