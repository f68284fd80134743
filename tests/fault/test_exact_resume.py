"""Whatever is killed, the final weights, scores and metrics equal an undisturbed run's, bit for bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from launch import run_folder
from pipeline import checkpoint
from pipeline.recipe import Recipe
from tests.fault.cuts import set_cut
from tests.fault.final_state import differences, final_state
from tests.small_recipe import ROOT, small_recipe

DEADLINE_S = 420
STAGES = ["pretrain", "keep-0.1/prune", "keep-0.1/finetune"]
STEPS = 40  # of every stage; an epoch has 20


def _recipe(data: Path, seed: int = 0) -> Recipe:
    """Checkpoints every 9 steps, so that cuts fall between them; two workers, ZeRO 1."""
    return small_recipe(
        data,
        seed=seed,
        sparsity={"magnitude_baseline": "none"},
        data={"augmentation": "pad_crop_flip"},
        workers={"count": 2},
        checkpoint={"every_steps": 9, "keep": 2},
    )


def _new_run(folder: Path, recipe: Recipe) -> Path:
    run_folder.write(folder, recipe, run_folder.check_data(recipe))
    return folder


def _start(folder: Path, *, observed: bool) -> int:
    """Run or resume in a process of its own; returns its exit code once it and all that it started have ended."""
    module = ["tests.fault.run_observed", str(folder)] if observed else ["launch", "resume", str(folder)]
    environment = {**os.environ, "HYDRA_TEST_RUN": str(folder)}
    process = subprocess.Popen([sys.executable, "-m", *module], cwd=ROOT, env=environment)
    family: set[psutil.Process] = set()
    watched = psutil.Process(process.pid)
    deadline = DEADLINE_S
    while True:
        try:
            process.wait(timeout=1)
            break
        except subprocess.TimeoutExpired:
            family |= set(watched.children(recursive=True))
            deadline -= 1
            if deadline < 0:
                process.kill()
                pytest.fail(f"{folder} did not end within {DEADLINE_S} s")
    # Ray's agents look for their raylet now and then, and end when it is gone.
    _, alive = psutil.wait_procs(list(family), timeout=180)
    assert not alive, f"left behind: {[p.cmdline() for p in alive]}"
    return process.returncode


@pytest.fixture(scope="module")
def undisturbed(fashion_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = _new_run(tmp_path_factory.mktemp("runs") / "undisturbed", _recipe(fashion_data))
    assert _start(folder, observed=False) == 0
    return final_state(folder, STAGES)


@pytest.mark.timeout(900)
def test_killed_worker_is_replaced(fashion_data: Path, tmp_path: Path, undisturbed: dict[str, Any]) -> None:
    """SIGKILL of one of two workers in the middle of an epoch of the prune phase: the run goes on by itself."""
    folder = _new_run(tmp_path / "worker", _recipe(fashion_data))
    set_cut(folder, "step", "keep-0.1/prune", 13, "worker")
    assert _start(folder, observed=True) == 0
    assert (folder / "cut-done-0.json").exists(), "nobody was killed"
    assert " failed: " in (folder / "logs" / "restarts.log").read_text()
    assert differences(undisturbed, final_state(folder, STAGES)) == []


CUTS: list[tuple[str, str, int | None]] = [
    ("forward", "pretrain", 0),  # in the first step
    ("step", "pretrain", 13),  # mid-epoch
    ("step", "keep-0.1/prune", 20),  # at an epoch's end, before anything of it is recorded
    ("before_manifest", "keep-0.1/prune", 9),  # during a checkpoint
    ("stage_finished", "keep-0.1/prune", None),  # between two phases
]
"""(event, stage, step); at least 20 steps follow each."""


@pytest.mark.timeout(1800)
def test_killed_run_resumes_exactly(fashion_data: Path, tmp_path: Path, undisturbed: dict[str, Any]) -> None:
    """One run is killed as a whole (SIGKILL of the driver and a worker) at five places, and resumed after each."""
    folder = _new_run(tmp_path / "run", _recipe(fashion_data))
    in_order = [CUTS[0], CUTS[1], CUTS[3], CUTS[2], CUTS[4]]
    for number, (event, stage, step) in enumerate(in_order):
        set_cut(folder, event, stage, step, "run")
        assert _start(folder, observed=True) == -signal.SIGKILL, (event, stage, step)
        assert (folder / f"cut-done-{number}.json").exists()
        if event == "before_manifest":
            unfinished = checkpoint.folder_of(folder / stage, 9)
            assert unfinished.exists()
            assert not (unfinished / "MANIFEST.json").exists()
    assert _start(folder, observed=False) == 0
    assert differences(undisturbed, final_state(folder, STAGES)) == []


@pytest.mark.timeout(900)
def test_another_seed_differs(fashion_data: Path, tmp_path: Path, undisturbed: dict[str, Any]) -> None:
    """The comparison can fail: with another seed every trained tensor and all metrics differ."""
    folder = _new_run(tmp_path / "seed", _recipe(fashion_data, seed=1))
    assert _start(folder, observed=False) == 0
    different = set(differences(undisturbed, final_state(folder, STAGES)))
    must = {key for key in undisturbed if "weight/" in key or "score/" in key or key.endswith(("metrics", "result"))}
    assert must <= different
