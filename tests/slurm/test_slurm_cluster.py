"""The tests' SLURM behaves as the tests of launching assume. No code of the pipeline runs here."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import submitit

from tests.support.commands import wait_until
from tests.support.slurm_cluster import CPUS, FEATURE, GPUS, SlurmCluster

STEP = """#!/bin/bash
# Writes down how it starts and which signals it gets. When it is warned, its first task has the job requeued.
# It ends when asked to.
note() { echo "$1 $SLURM_PROCID ${SLURM_RESTART_COUNT:-0} $SLURMD_NODENAME $$" >>"$EVENTS"; }
trap 'note USR2; [[ $SLURM_PROCID != 0 ]] || scontrol requeue "$SLURM_JOB_ID"' USR2
trap 'note TERM; exit' TERM
note START
while :; do sleep 0.1; done
"""


class Noted:
    """A job of one step whose tasks write down what happens to them: kind, task, restart, node, process."""

    def __init__(self, slurm: SlurmCluster, place: Path, *arguments: str) -> None:
        self._file = place / "events"
        self._file.touch()
        step, job = place / "step.sh", place / "job.sh"
        step.write_text(STEP)
        step.chmod(0o755)
        job.write_text(f"#!/bin/bash\nexport EVENTS={self._file}\nsrun {step}\n")
        self.id = slurm.submit(f"--output={place}/output", "--time=30", *arguments, str(job))

    def all(self, kind: str | None = None, restart: int | None = None) -> list[list[str]]:
        """Its events so far, of one kind, of one start."""
        events = [line.split() for line in self._file.read_text().splitlines()]
        return [event for event in events if kind in (None, event[0]) and (restart is None or int(event[2]) == restart)]

    def wait_started(self, tasks: int, restart: int = 0, deadline_s: float = 60) -> None:
        wait_until(lambda: len(self.all("START", restart)) == tasks, deadline_s, f"start {restart} of {tasks} tasks")


def accounted(slurm: SlurmCluster, job: str, field: str) -> list[str]:
    """One field of the job in sacct, for each of its starts."""
    return slurm.client(
        "sacct", "-X", "--duplicates", "--noheader", "--parsable2", f"--jobs={job}", f"--format={field}"
    ).split("\n")[:-1]


def test_srun_runs_on_two_nodes(slurm: SlurmCluster) -> None:
    hosts = slurm.client("srun", "--nodes=2", "bash", "-c", "echo $SLURMD_NODENAME")
    assert len(set(hosts.split()) & set(slurm.nodes)) == 2


@pytest.mark.parametrize(("command", "state", "code"), [("true", "COMPLETED", "0:0"), ("exit 3", "FAILED", "3:0")])
def test_a_job_is_accounted_for(slurm: SlurmCluster, command: str, state: str, code: str) -> None:
    job = slurm.submit("--output=/dev/null", f"--wrap={command}")
    assert slurm.wait_for_state(job, {"COMPLETED", "FAILED"}) == state
    wait_until(lambda: accounted(slurm, job, "State") == [state], 20, "the job's end in accounting")
    assert accounted(slurm, job, "ExitCode") == [code]


@pytest.mark.parametrize(("command", "subject"), [("true", "Ended"), ("false", "Failed")])
def test_a_job_mails(slurm: SlurmCluster, command: str, subject: str) -> None:
    job = slurm.submit("--mail-user=me@here", "--mail-type=END,FAIL", "--output=/dev/null", f"--wrap={command}")
    wait_until(lambda: any(f"Job_id={job} " in mail for mail in slurm.mails()), 30, "a mail")
    mail = next(mail for mail in slurm.mails() if f"Job_id={job} " in mail)
    assert f"Name=wrap {subject}," in mail
    assert mail.endswith("me@here")


@pytest.mark.parametrize("wish", ["--account=none", "--qos=none"])
def test_whom_accounting_does_not_know_is_rejected(slurm: SlurmCluster, wish: str) -> None:
    with pytest.raises(RuntimeError, match="Invalid"):
        slurm.client("sbatch", "--output=/dev/null", wish, "--wrap=true")


def test_a_requeued_job_starts_again_within_seconds(slurm: SlurmCluster, tmp_path: Path) -> None:
    job = Noted(slurm, tmp_path)
    job.wait_started(tasks=1)
    slurm.client("scontrol", "requeue", job.id)
    job.wait_started(tasks=1, restart=1, deadline_s=30)


def test_a_warned_job_is_requeued_before_its_end(slurm: SlurmCluster, tmp_path: Path) -> None:
    job = Noted(slurm, tmp_path, "--nodes=4", f"--cpus-per-task={CPUS}", "--signal=USR2@60")
    job.wait_started(tasks=4)
    urgent = slurm.submit("--output=/dev/null", "--partition=high", "--wrap=true")
    slurm.wait_for_state(urgent, "COMPLETED")
    job.wait_started(tasks=4, restart=1)
    first = {event[1]: event[0] for event in reversed(job.all(restart=0)) if event[0] != "START"}
    assert first == dict.fromkeys("0123", "USR2")
    assert accounted(slurm, job.id, "State")[0] == "REQUEUED"


@pytest.mark.parametrize(
    "wish",
    [f"--gpus-per-node={GPUS}", f"--gres=gpu:{FEATURE}:2", f"--constraint={FEATURE}", "--nodes=4", "--mem=8000M"],
)
def test_what_can_run_is_accepted(slurm: SlurmCluster, wish: str) -> None:
    slurm.client("sbatch", "--test-only", wish, "--wrap=true")


@pytest.mark.parametrize(
    "wish",
    [
        f"--gpus-per-node={GPUS + 1}",
        "--gres=gpu:h100:1",
        "--constraint=h100",
        "--nodes=5",
        "--mem=8001M",
        "--partition=none",
    ],
)
def test_what_can_never_run_is_rejected(slurm: SlurmCluster, wish: str) -> None:
    with pytest.raises(RuntimeError, match="allocation failure"):
        slurm.client("sbatch", "--test-only", wish, "--wrap=true")


def test_a_job_sees_the_gpus_that_it_asked_for(slurm: SlurmCluster) -> None:
    assert slurm.client("srun", "--gpus-per-node=2", "printenv", "CUDA_VISIBLE_DEVICES") == "0,1\n"


def test_submitit_gets_results_and_states_of_two_tasks(slurm: SlurmCluster, tmp_path: Path) -> None:
    executor = submitit.AutoExecutor(tmp_path, cluster="slurm")
    executor.update_parameters(nodes=2, tasks_per_node=1, timeout_min=20, slurm_partition="low")
    job = executor.submit(os.getenv, "SLURMD_NODENAME")
    assert len(set(job.results()) & set(slurm.nodes)) == 2
    slurm.wait_for_state(job.job_id, "COMPLETED")
    wait_until(lambda: job.watcher.get_state(job.job_id, mode="force") == "COMPLETED", 20, "submitit sees the end")
    assert job.state == "COMPLETED"
