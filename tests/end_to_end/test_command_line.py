"""The command line as users see it: help, errors, interruption, and a run that another process is writing."""

from __future__ import annotations

import json
import signal
import sys
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from ruamel.yaml import YAML

from launch.__main__ import main
from pipeline.data.manifest import read_manifest
from pipeline.models.export import read_metadata
from pipeline.recipe.file import dump_yaml, load_recipe
from pipeline.run.files import read_json
from pipeline.run.layout import progress_marks
from pipeline.run.lease import read_holder
from tests.support.commands import Command, Finished, launch, listening_addresses, wait_until
from tests.support.small_recipe import small_values

RUN_S = 400
"""Deadline of one run; it takes a tenth of that on an idle machine."""
STEPS = {"pretrain": 160, "keep-0.1/prune": 160, "keep-0.1/finetune": 40}
"""An epoch has 20. Those that are interrupted are long: how soon a signal arrives, a busy machine decides."""


def write_recipe(place: Path, data: Path) -> str:
    """Two workers, 20 steps an epoch, a checkpoint every 5 steps, no baseline."""
    values = small_values(data)
    values["data"] |= {"validation_images": 100, "train_images": 320}
    values["batch"] = {"batch_per_step": 16, "micro_batch": 8}
    values["model"]["arch"] = "cnn_small"
    values["sparsity"] = {"keep_fractions": [0.1], "baselines": []}
    for phase in ("pretrain", "prune"):
        values["phases"][phase] = {**values["phases"][phase], "epochs": 8}
    values["workers"] |= {"count": 2}
    values["checkpoint"] = {"every_steps": 5}
    values["evaluation"] |= {"chunk": 100}
    (place / "small.yaml").write_text(dump_yaml(values))
    return "small.yaml"


@dataclass(frozen=True)
class Story:
    """One run's life: started, started again meanwhile, interrupted, resumed, terminated, resumed, run once more.

    All in a folder that is not the project's, so that Ray's workers find it only because it is installed. Its path has
    a space. The first start is by the installed command, the second by a Python whose path has a space too.
    """

    place: Path
    family: list[int]
    """Process ids of the first start."""
    listens_at: set[str]
    """Addresses at which any of them listens."""
    holder_pid: int
    started_again: Finished
    interrupted: Finished
    step_when_interrupted: int
    terminated: Finished
    resumed: Finished
    run_again: Finished
    files_unchanged: bool

    @property
    def run(self) -> Path:
        return self.place / "runs" / "life"


def _modified(folder: Path) -> dict[Path, int]:
    return {
        path: path.stat().st_mtime_ns for path in folder.rglob("*") if "step-" in str(path) or path.suffix == ".json"
    }


@pytest.fixture(scope="module")
def story(fashion_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Story:
    place = tmp_path_factory.mktemp("life") / "a life"
    place.mkdir()
    (place / "an environment").symlink_to(sys.prefix)
    python = place / "an environment" / Path(sys.executable).relative_to(sys.prefix)
    start = ("run", write_recipe(place, fashion_data), "--name", "life")
    run = place / "runs" / "life"
    first = Command(place, *start, module=None)
    try:
        wait_until(lambda: (run / "pretrain" / "lease.json").exists(), RUN_S, "the lease of the first start")
        holder = read_holder(run / "pretrain")
        started_again = launch(place, *start, deadline_s=RUN_S)
        wait_until(lambda: progress_marks(run, ["pretrain"])[0] > 0, RUN_S, "the first checkpoint")
        family = first.process_tree()
        listens_at = {address for process in family for address in listening_addresses(process)}
        first.signal(signal.SIGINT)
        interrupted = first.finish(RUN_S)
        step = progress_marks(run, ["pretrain"])[0]
    finally:
        first.kill()
    second = Command(place, "resume", "life", python=str(python))
    try:
        wait_until(
            lambda: progress_marks(run, ["keep-0.1/prune"])[0] > 0, RUN_S, "the first checkpoint of the next phase"
        )
        second.signal(signal.SIGTERM)
        terminated = second.finish(RUN_S)
    finally:
        second.kill()
    resumed = launch(place, "resume", "life", deadline_s=RUN_S)
    before = _modified(run)
    run_again = launch(place, *start)
    assert holder is not None
    return Story(
        place=place,
        family=[process.pid for process in family],
        listens_at=listens_at,
        holder_pid=holder.pid,
        started_again=started_again,
        interrupted=interrupted,
        step_when_interrupted=step,
        terminated=terminated,
        resumed=resumed,
        run_again=run_again,
        files_unchanged=_modified(run) == before,
    )


in_story = pytest.mark.timeout(4 * RUN_S)
"""The first of them waits for the story."""


@in_story
def test_a_second_start_is_refused_and_names_the_running_process(story: Story) -> None:
    assert story.holder_pid in story.family
    assert story.started_again.code == 2
    assert f"is being written by pid {story.holder_pid}" in story.started_again.err
    assert "Traceback" not in story.started_again.err


@in_story
def test_no_process_of_a_run_can_be_reached_from_another_machine(story: Story) -> None:
    """Nor by who finds an address of this one; what listens on loopback are Ray, which wants the token, and gloo."""
    assert {address for address in story.listens_at if not ip_address(address).is_loopback} == set()
    assert story.listens_at, "Ray listens"


@in_story
@pytest.mark.parametrize("which", ["interrupted", "terminated"])
def test_an_interrupted_run_says_how_to_go_on(story: Story, which: str) -> None:
    """That it left no process of Ray, nor anything in shared memory, is checked where it is waited for."""
    finished: Finished = getattr(story, which)
    assert finished.code == 1, finished.err
    assert "python -m launch resume" in finished.err
    assert "Traceback" not in finished.err
    assert 0 < story.step_when_interrupted < STEPS["pretrain"]


@in_story
def test_resuming_completes_the_run(story: Story) -> None:
    assert story.resumed.code == 0, story.resumed.err
    assert "pretrain  already finished" in story.resumed.err
    for stage, number in STEPS.items():
        assert read_json(story.run / stage / "result.json")["steps"] == number
        assert not (story.run / stage / "lease.json").exists()
        rows = [json.loads(line) for line in (story.run / stage / "metrics.jsonl").read_text().splitlines()]
        steps = [row["step"] for row in rows if row["kind"] == "train"]
        assert steps == sorted(set(steps))
        assert steps[-1] == number
    start_lines = [
        line for line in (story.run / "logs" / "worker-0.log").read_text().splitlines() if "starting at step" in line
    ]
    assert f"pretrain: starting at step {story.step_when_interrupted} of {STEPS['pretrain']}" in start_lines[1]


@in_story
def test_a_finished_run_is_left_as_it_is(story: Story) -> None:
    assert story.run_again.code == 0
    assert "already finished" in story.run_again.out
    assert story.files_unchanged


@in_story
def test_evaluate_gives_the_runs_own_verdicts(story: Story) -> None:
    """One image in five, at the recipe's strength: the same counts as in the run, exactly."""
    model = story.run / "keep-0.1" / "finetune" / "model.safetensors"
    done = launch(story.place, "evaluate", str(model), "--images", "100", "--attack", "pgd", deadline_s=RUN_S)
    assert done.code == 0, done.err
    printed: dict[str, Any] = json.loads(done.out)
    (kept,) = model.parent.glob("evaluate/pgd-*.json")
    assert {"file": str(model), **read_json(kept)} == printed
    table = pq.read_table(model.parent / "evaluate" / "pgd.parquet").take(np.arange(0, 500, 5))
    assert np.array_equal(table["sample_id"].to_numpy(), np.arange(0, 500, 5))
    assert printed["images"] == 100
    for kind in ("clean", "robust"):
        correct = int(table[f"{kind}_correct"].to_numpy().sum())
        assert printed[f"{kind}_correct"] == correct
        assert printed[f"{kind}_accuracy"]["value"] == correct / 100


@in_story
def test_the_exported_network_says_how_to_use_it(story: Story) -> None:
    facts = read_metadata(story.run / "keep-0.1" / "finetune" / "model.safetensors")
    manifest = read_manifest(load_recipe(story.run / "recipe.yaml").data.test_file)
    assert facts["class_names"] == manifest.class_names
    assert facts["threat_model"] == {"norm": "linf", "eps": "1/10"}
    assert facts["preprocessing"]["max_resolution"] == manifest.max_resolution


@in_story
def test_evaluate_refuses_more_images_than_there_are(story: Story) -> None:
    done = launch(story.place, "evaluate", "life", "--images", "501", deadline_s=RUN_S)
    assert done.code == 2
    assert "from 1 to 500" in done.err


@pytest.mark.parametrize(
    "command", ["", "run", "resume", "report", "evaluate", "data", "data write", "data verify", "data info"]
)
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command.split(), "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: python -m launch {command}".rstrip())


def test_a_command_is_needed(tmp_path: Path) -> None:
    done = launch(tmp_path)
    assert done.code == 2
    assert "COMMAND" in done.err


def test_missing_data_names_the_command_that_writes_it(tmp_path: Path, fashion_data: Path) -> None:
    recipe = write_recipe(tmp_path, fashion_data)
    done = launch(tmp_path, "run", recipe, f"data.train_file={tmp_path}/nowhere/train.beton")
    assert done.code == 2
    assert f"data.train_file = {tmp_path}/nowhere/train.beton does not exist" in done.err
    assert f"python -m launch data write fashion_mnist --out {tmp_path}/nowhere" in done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize("command", ["resume", "report", "evaluate"])
def test_an_unknown_run_is_refused_and_the_known_ones_are_listed(tmp_path: Path, command: str) -> None:
    (tmp_path / "runs" / "known").mkdir(parents=True)
    (tmp_path / "runs" / "known" / "recipe.yaml").touch()
    done = launch(tmp_path, command, "unknown")
    assert done.code == 2
    assert "unknown: no such run; runs here: known" in done.err


def test_overrides_may_follow_options_and_nonsense_is_refused(tmp_path: Path, fashion_data: Path) -> None:
    recipe = write_recipe(tmp_path, fashion_data)
    shown = launch(tmp_path, "run", recipe, "--dry-run", "seed=5", "--name", "x", "workers.count=1")
    assert shown.code == 0, shown.err
    values = YAML(typ="safe", pure=True).load(shown.out)
    assert (values["seed"], values["workers"]["count"]) == (5, 1)
    assert not (tmp_path / "runs").exists()
    wrong = launch(tmp_path, "run", recipe, "objective.stepz=2")
    assert wrong.code == 2
    assert "objective.stepz = 2: unknown key; did you mean 'steps'?" in wrong.err
