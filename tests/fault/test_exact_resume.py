"""After any kill, the final weights, scores and metrics equal an undisturbed run's, bit for bit."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from pipeline.recipe.schema import Recipe
from pipeline.run import checkpoint
from pipeline.training.perturbation_memory import VALUES
from tests.fault.cuts import Cut, done_cuts, set_cuts
from tests.fault.final_state import differences, final_state
from tests.fault.without_ray import start
from tests.support.commands import ROOT
from tests.support.small_recipe import two_worker_recipe
from tests.support.undisturbed_run import new_run

DEADLINE_S = 420
STAGES = ["pretrain", "keep-0.1/prune", "keep-0.1/finetune"]
CUT = "tests.fault.cuts:cut"
STEPS = 40  # of every stage; an epoch has 20


def _start_on_ray(folder: Path) -> int:
    """Run or resume with `CUT`; returns the command's exit code once it and all that it started have ended."""
    process = subprocess.Popen([sys.executable, "-m", "tests.fault.run_observed", str(folder), CUT], cwd=ROOT)
    descendants: set[psutil.Process] = set()
    watched = psutil.Process(process.pid)
    deadline = DEADLINE_S
    while True:
        try:
            process.wait(timeout=1)
            break
        except subprocess.TimeoutExpired:
            descendants |= set(watched.children(recursive=True))
            deadline -= 1
            if deadline < 0:
                process.kill()
                pytest.fail(f"{folder} did not end within {DEADLINE_S} s")
    # Ray's agents poll their raylet, and end when it is gone.
    _, alive = psutil.wait_procs(list(descendants), timeout=180)
    assert not alive, f"left behind: {[p.cmdline() for p in alive]}"
    return process.returncode


STARTS: list[tuple[str, list[Cut]]] = [
    ("without-ray", [("forward", "pretrain", 0, "run")]),  # in the first step
    ("without-ray", [("step", "pretrain", 13, "run")]),  # mid-epoch
    ("without-ray", [("before_manifest", "keep-0.1/prune", 9, "run")]),  # during a checkpoint
    (
        "ray",
        [
            ("step", "keep-0.1/prune", 11, "worker"),  # mid-epoch: the run recovers by itself
            ("step", "keep-0.1/prune", 13, "raylet"),  # so it does from these, on another Ray cluster
            ("step", "keep-0.1/prune", 15, "gcs_server"),
            ("step", "keep-0.1/prune", 20, "command"),  # at an epoch's end, before anything of it is recorded
        ],
    ),
    ("without-ray", [("stage_finished", "keep-0.1/prune", None, "run")]),  # between two phases
]
"""What happens to each start of the run; at least 20 steps follow each cut. Ray, which takes seconds to start, is there
where it has a part in what comes next; a run may change between the two."""


@pytest.mark.timeout(1800)
def test_killed_workers_and_runs_go_on_exactly(
    fashion_data: Path, tmp_path: Path, undisturbed: Callable[[Recipe], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL of a worker, of a raylet and of a GCS, which are replaced, and of the whole run, which is resumed."""
    recipe = two_worker_recipe(fashion_data)
    folder = new_run(tmp_path / "run", recipe)
    set_cuts(folder, [cut for _, cuts in STARTS for cut in cuts])
    monkeypatch.setenv("HYDRA_TEST_RUN", str(folder))
    for number, (where, cuts) in enumerate(STARTS):
        ended = _start_on_ray(folder) if where == "ray" else start(folder, recipe, CUT)
        assert ended == -signal.SIGKILL, cuts
        assert done_cuts(folder) == sum(len(cuts) for _, cuts in STARTS[: number + 1])
        if cuts[0][0] == "before_manifest":
            unfinished = checkpoint.folder_of(folder / cuts[0][1], 9)
            assert unfinished.exists()
            assert not (unfinished / "MANIFEST.json").exists()
    restarts = (folder / "logs" / "restarts.log").read_text()
    assert " failed: " in restarts
    assert restarts.count("Ray's processes ended") == 2
    assert start(folder, recipe, CUT) == 0
    assert differences(*(final_state(run, STAGES) for run in (undisturbed(recipe), folder))) == []


def test_remembered_perturbations_outlive_a_kill(
    fashion_data: Path, tmp_path: Path, undisturbed: Callable[[Recipe], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL of two workers within the second epoch of FGSM-PGI; checkpoints are within epochs."""
    recipe = two_worker_recipe(fashion_data)
    values = recipe.model_dump(mode="json")
    values["phases"]["pretrain"]["objective"] = {"name": "fgsm_pgi", "step_size": "1/10", "overfitting_guard": None}
    recipe = Recipe.model_validate(values)
    folder = new_run(tmp_path / "run", recipe)
    set_cuts(folder, [("step", "pretrain", 31, "run")])
    monkeypatch.setenv("HYDRA_TEST_RUN", str(folder))
    assert start(folder, recipe, CUT) == -signal.SIGKILL
    assert max(checkpoint.committed_steps(folder / "pretrain")) in (18, 27)  # a thread writes them
    assert start(folder, recipe, CUT) == 0
    states = [final_state(run, STAGES) for run in (undisturbed(recipe), folder)]
    assert f"pretrain: {VALUES}" in states[0]
    assert differences(*states) == []
