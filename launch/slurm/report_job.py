"""The last job of a run: writes its report once the others have ended."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from launch.slurm.control_files import ControlFiles, JobFailed, count_start, start_of_job
from pipeline.run.provenance import load_run_recipe

REPORT = "report"
"""Its job_name. It takes one node and no GPU."""


@dataclass
class Report:
    """The submitted object."""

    run_folder: str
    stages: list[str]

    def __call__(self) -> None:
        folder = Path(self.run_folder)
        control = ControlFiles.of(folder, *start_of_job())
        control.create()
        limit = load_run_recipe(folder).workers.restarts_without_progress
        count_start(folder, REPORT, 1, [], limit)
        code = subprocess.run([sys.executable, "-m", "launch", "report", self.run_folder]).returncode
        control.end(code, "" if code == 0 else "the report could not be written; see the reason above")
        if code:
            raise JobFailed(f"report: exit code {code}")
