"""Runs on one node do not interfere, and a run that several processes start has one writer and one result."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from launch.slurm.submit import active_jobs, read_jobs, submit_run
from pipeline.recipe.schema import Recipe
from pipeline.run.files import read_json, read_rows
from tests.fault.final_state import unlike
from tests.slurm.faults import Victim
from tests.slurm.struck import job_of
from tests.slurm.throttle import FOLDER
from tests.support.commands import Command, wait_until
from tests.support.slurm_cluster import SlurmCluster
from tests.support.small_recipe import small_recipe
from tests.support.undisturbed_run import new_run

pytestmark = pytest.mark.timeout(900)
SLOW = "tests.slurm.throttle:slow"
ASK = "import sys; from ray._raylet import GcsClient; GcsClient(address=sys.argv[1]).internal_kv_keys(b'', None, 30)"
"""What every driver and worker does first; ray.init tries it for 20 s and longer."""


def one_node_recipe(data: Path) -> Recipe:
    short = {"epochs": 1, "lr": 0.05}
    return small_recipe(
        data,
        phases={"pretrain": {"epochs": 4, "lr": 0.05}, "prune": short, "finetune": short},
        sparsity={"baselines": []},
        checkpoint={"every_steps": 9, "keep": 2},
        tracking={"log_every_steps": 1},
        slurm={"nodes": 1, "cpus_per_task": 1, "time": 30, "signal_s": 30, "options": {"nodelist": "n1"}},
    )


def asked(address: str, token: Path | None) -> subprocess.CompletedProcess[str]:
    """Ask a cluster's head something, with a token or without any."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    if token is not None:
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    command = [sys.executable, "-c", ASK, address]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=90, check=False)


def as_another_user(folder: Path, *command: str) -> str:
    """Error output of a command of another user, run inside the folder, so that no folder above protects it."""
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=False, user=65534, group=65534, extra_groups=[]
    )
    return done.stderr


def submitted(folder: Path) -> None:
    """By two processes at once; each job is submitted once."""
    with ThreadPoolExecutor(2) as pool:
        new = list(pool.map(lambda _: submit_run(folder, observer=SLOW), range(2)))
    assert sorted(len(jobs) for jobs in new) == [0, 3]
    assert [job.job_name for job in read_jobs(folder)] == ["pretrain", "keep-0.1", "report"]


def test_two_runs_on_one_node_do_not_meet_and_a_requeue_races_a_resume(
    slurm: SlurmCluster, fashion_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    recipe = one_node_recipe(fashion_data)
    calm, raced = (new_run(tmp_path / "runs" / name, recipe) for name in ("calm", "raced"))
    for folder in (calm, raced):
        submitted(folder)
    victims = [Victim(slurm, folder, job_of(folder, "pretrain"), "pretrain") for folder in (calm, raced)]
    for victim in victims:
        victim.wait_for_step(3)
    assert slurm.job_nodes(victims[0].job) == slurm.job_nodes(victims[1].job) == ["n1"]
    _other_users_are_refused(victims)
    # SLURM requeues the job while a user resumes the run.
    slurm.client("scontrol", "requeue", victims[1].job)
    by_hand = Command(tmp_path, "resume", "raced", "--on", "local")
    (tmp_path / "full-speed").touch()
    for folder in (calm, raced):
        wait_until(lambda folder=folder: not active_jobs(read_jobs(folder)), 400, "the end of all jobs")
    resumed = by_hand.finish(400)
    assert resumed.code == 0 or "is being written by pid" in resumed.err, resumed.err
    rows = [row["step"] for row in read_rows(raced / "pretrain" / "metrics.jsonl") if row["kind"] == "train"]
    assert rows == list(range(1, 81))
    assert unlike(recipe, calm, raced) == []


def _other_users_are_refused(victims: list[Victim]) -> None:
    """With the token of another run of the same user; and other users can neither read tokens nor reach sockets."""
    one, other = (victim.run_folder for victim in victims)
    tokens = [next(folder.glob("control/*/token")) for folder in (one, other)]
    address = read_json(next(one.glob("control/*/cluster-0.json")))["address"]
    answers = [asked(address, token) for token in (*tokens, None)]
    assert [answer.returncode for answer in answers] == [0, 1, 1], answers
    assert all("AuthenticationError" in answer.stderr for answer in answers[1:]), answers
    assert tokens[0].read_text() != tokens[1].read_text()
    assert {stat.S_IMODE(token.stat().st_mode) for token in tokens} == {0o600}
    heads = victims[0].processes(lambda process: "--temp-dir" in process.cmdline())
    folders = {Path(command[command.index("--temp-dir") + 1]).parent for command in (head.cmdline() for head in heads)}
    assert len(folders) == 2
    assert {stat.S_IMODE(folder.stat().st_mode) for folder in folders} == {0o700}  # Ray opens the one inside to all
    if os.getuid() == 0:  # only root can become another user
        for token in tokens:
            assert as_another_user(token.parent.parent, "ls", ".") == ""
            assert "Permission denied" in as_another_user(token.parent, "cat", "token")
        for folder in folders:
            assert "Permission denied" in as_another_user(folder, "ls", ".")
            assert "Permission denied" in as_another_user(folder, "cat", "ray/ray_current_cluster")
