"""Runs that meet on one node stay apart, and whoever races for one run, it has one writer and one result."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from launch.slurm import living, read_jobs, submit
from pipeline.files import read_json, read_rows
from pipeline.recipe import Recipe
from tests.calm import new_run
from tests.commands import ROOT, Command, wait_until
from tests.fault.final_state import unlike
from tests.launch.faults import Victim
from tests.launch.struck import job_of
from tests.launch.throttle import FOLDER
from tests.slurm_cluster import SlurmCluster
from tests.small_recipe import small_recipe

pytestmark = pytest.mark.timeout(900)
SLOW = "tests.launch.throttle:slow"
JOIN = "import sys, ray; ray.init(address=sys.argv[1], log_to_driver=False); print('joined')"


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


def python(code: str, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=90, check=False, **options)


def submitted(folder: Path) -> None:
    """By two at once, as by somebody impatient; its jobs are there once."""
    with ThreadPoolExecutor(2) as pool:
        new = list(pool.map(lambda _: submit(folder, observer=SLOW), range(2)))
    assert sorted(len(jobs) for jobs in new) == [0, 3]
    assert [job.group for job in read_jobs(folder)] == ["pretrain", "keep-0.1", "report"]


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
    _strangers_are_refused(victims)
    # SLURM takes the job away and queues it again, while somebody resumes the run by hand.
    slurm.client("scontrol", "requeue", victims[1].job)
    by_hand = Command(tmp_path, "resume", "raced", "--on", "local")
    (tmp_path / "full-speed").touch()
    for folder in (calm, raced):
        wait_until(lambda folder=folder: not living(read_jobs(folder)), 400, "the end of all jobs")
    resumed = by_hand.finish(400)
    assert resumed.code == 0 or "is being written by pid" in resumed.err, resumed.err
    rows = [row["step"] for row in read_rows(raced / "pretrain" / "metrics.jsonl") if row["kind"] == "train"]
    assert rows == list(range(1, 81))
    assert unlike(recipe, calm, raced) == []


def _strangers_are_refused(victims: list[Victim]) -> None:
    """With the token of another run of the same user; and other users can neither read tokens nor reach sockets."""
    one, other = (victim.run_folder for victim in victims)
    tokens = [next(folder.glob("control/*/token")) for folder in (one, other)]
    address = read_json(next(one.glob("control/*/cluster-0.json")))["address"]
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(tokens[1])}
    tried = python(JOIN, address, env=environment)
    assert "joined" not in tried.stdout
    assert "InvalidAuthToken" in tried.stderr or "Authentication" in tried.stderr, tried.stderr[-1500:]
    assert tokens[0].read_text() != tokens[1].read_text()
    assert {stat.S_IMODE(token.stat().st_mode) for token in tokens} == {0o600}
    heads = victims[0].processes(lambda process: "--temp-dir" in process.cmdline())
    folders = {Path(command[command.index("--temp-dir") + 1]).parent for command in (head.cmdline() for head in heads)}
    assert len(folders) == 2
    assert {stat.S_IMODE(folder.stat().st_mode) for folder in folders} == {0o700}  # Ray opens the one inside to all
