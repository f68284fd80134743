"""A node whose task never starts: the job ends, and `status` names the node and what to do."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

from launch.slurm.submit import active_jobs, read_jobs
from pipeline.recipe.file import dump_yaml
from pipeline.run.files import read_json
from tests.slurm.struck import cancel, job_of
from tests.support.commands import launch, wait_until
from tests.support.slurm_cluster import SlurmCluster
from tests.support.small_recipe import small_values

pytestmark = pytest.mark.timeout(600)
WAITED_S = 20
PROFILE = {
    **{"partition": "low", "account": "tests", "qos": "normal", "cpus_per_task": 1, "time": 30, "signal_s": 30},
    **{"node_start_s": WAITED_S, "mail_user": "me@here", "mail_type": "END,FAIL"},
}


def test_a_node_that_does_not_come_is_named(slurm: SlurmCluster, fashion_data: Path, tmp_path: Path) -> None:
    """By the command line with a cluster's profile, whose mails arrive as well."""
    recipe, profile = tmp_path / "recipe.yaml", tmp_path / "cluster.yaml"
    recipe.write_text(dump_yaml({**small_values(fashion_data), "workers": {"restarts_without_progress": 0}}))
    profile.write_text(dump_yaml(PROFILE))
    command = ["run", str(recipe), "--name", "shy", "--on", "slurm", "--cluster", str(profile), "slurm.nodes=3"]
    started = launch(tmp_path, *command)
    assert started.code == 0, started.err
    assert "3 nodes: using 2 of 3 workers; legal: 1, 2, 4" in started.out
    folder = tmp_path / "runs" / "shy"
    job = job_of(folder, "pretrain")
    wait_until(lambda: _stopped(slurm, job, task=1), 60, "the second node's task")
    host = slurm.job_nodes(job)[1]
    wait_until(lambda: not active_jobs(read_jobs(folder)), 240, "the end of all jobs")

    assert slurm.job_state(job) == "FAILED"
    missing = f"of 3 nodes, {host} did not join Ray in {WAITED_S} s; check {host}, or repeat the `run` command"
    ended = read_json(folder / "control" / f"{job}-0" / "ended.json")
    assert ended["code"] == 1
    assert f"last: {missing} with slurm.exclude={host}; see " in ended["message"]
    log = (folder / "jobs" / f"{job}_0_log.err").read_text()
    assert missing in log
    assert "using 2 of 3 workers" in log
    status = " ".join(launch(tmp_path, "status", "shy").out.split())
    assert missing in status
    mail = next(mail for mail in slurm.mails() if f"Job_id={job} " in mail)
    assert "Name=shy-pretrain Failed," in mail
    assert mail.endswith("me@here")

    advice = re.search(r"slurm\.exclude=[^; ]+", status)
    assert advice is not None
    assert launch(tmp_path, *command, advice[0]).code == 0
    again = job_of(folder, "pretrain")
    assert again != job
    assert f"ExcNodeList={host}\n" in slurm.client("scontrol", "show", "job", again)
    cancel(folder)


def _stopped(slurm: SlurmCluster, job: str, task: int) -> bool:
    """Stop what runs as this task of a job; False while there is nothing. It cannot have joined Ray yet, whose head
    takes seconds."""
    wanted: dict[str, Any] = {"SLURM_JOB_ID": job, "SLURM_PROCID": str(task)}
    for process in slurm.processes():
        try:
            if process.environ().items() >= wanted.items() and "submitit.core._submit" in process.cmdline():
                os.kill(process.pid, signal.SIGSTOP)
                return True
        except psutil.NoSuchProcess:
            continue
    return False
