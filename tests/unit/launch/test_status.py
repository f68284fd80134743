"""Status: what run directories, leases and squeue say, in one table per run, whatever of it is missing or damaged."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from launch import run_folder
from launch.commands import status
from launch.commands.status import status_text
from launch.slurm import queue
from launch.slurm.control_files import ControlFiles, StartLog
from launch.slurm.submit import SubmittedJob
from pipeline.recipe.file import load_recipe
from pipeline.recipe.schema import Recipe
from pipeline.recipe.stages import Stage, stages_of
from pipeline.run.failures import Failure, record_failure
from pipeline.run.files import atomic_write_json
from pipeline.run.lease import HEARTBEAT_S, STALE_AFTER_S, Leases
from pipeline.run.tracking.metrics import Tracker

DEMO = Path(__file__).parents[3] / "recipes" / "fashion_mnist.yaml"
PER_EPOCH = 148  # 19,000 images in steps of 128
EVALUATION = {
    **{"attack": "pgd", "title": "PGD-20", "settings": {}, "chunk": 250, "images": 10000},
    **{"model_sha256": "m", "data_sha256": "d"},
    **{"clean_correct": 8500, "clean_accuracy": {"value": 0.85, "low": 0.8429, "high": 0.8569}},
    **{"robust_correct": 7004, "robust_accuracy": {"value": 0.7004, "low": 0.6913, "high": 0.7093}},
}
DENSE, PRUNE, FINETUNE, MAGNITUDE = "pretrain", "keep-0.1/prune", "keep-0.1/finetune", "keep-0.1/magnitude"


class Run:
    """A run directory of the demo's recipe with one sparsity, written by those who write it in a real run."""

    def __init__(self, place: Path, name: str = "mine", *overrides: str) -> None:
        self.folder = place / "runs" / name
        self.recipe: Recipe = load_recipe(DEMO, ["sparsity.keep_fractions=[0.1]", *overrides])
        run_folder.write_run_folder(self.folder, self.recipe, {})
        self.stages: dict[str, Stage] = {stage.name: stage for stage in stages_of(self.recipe)}
        (self.folder / "logs").mkdir()

    def begin(self, name: str, step: int = 0, speed: float = 1480.0, held_out: float | None = None) -> None:
        """A stage that has trained up to `step`, with a validation there if `held_out` is given."""
        folder, stage = self.folder / name, self.stages[name]
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write_json(folder / "stage.json", {**stage.describe(PER_EPOCH), "batch_per_step": 128})
        facts = {"run_name": "mine", "stage": name, "config": {}, "batch_per_step": 128, "project": "none"}
        facts["log_every_steps"] = 25
        with Tracker(folder, wandb_mode="disabled", **facts) as tracker:
            if step:
                row = {"step": step, "epoch": step / PER_EPOCH, "loss": 1.0, "robust_accuracy": 0.5, "images": 3200}
                tracker.log({"kind": "train", **row, "timing": {"images_per_s": speed, "seconds": 2.0}})
            if held_out is not None:
                row = {"step": step, "epoch": 1.0, "clean_accuracy": 0.9, "robust_accuracy": held_out, "images": 1000}
                tracker.log({"kind": "validation", **row, "timing": {"seconds": 1.0}})

    def train(self, name: str) -> None:
        """A stage that is trained."""
        total = self.stages[name].optimisation.epochs * PER_EPOCH
        self.begin(name, total, held_out=0.71)
        atomic_write_json(self.folder / name / "result.json", {"stage": name, "steps": total, "model_sha256": "m"})

    def finish(self, *names: str) -> None:
        for name in names:
            self.train(name)
            for file in self.stages[name].evaluations:
                self.evaluate(name, file, EVALUATION)

    def evaluate(self, name: str, file: str, facts: dict[str, Any]) -> None:
        (self.folder / name / "evaluate").mkdir(exist_ok=True)
        atomic_write_json(self.folder / name / "evaluate" / f"{file}.json", facts)

    def submit(self, *jobs: tuple[str, str]) -> None:
        """(id, group) of every job, oldest first."""
        rows = [SubmittedJob(number, group, [], time.time()).row() for number, group in jobs]
        atomic_write_json(self.folder / "jobs.json", {"jobs": rows})

    def start(self, group: str, job: str, restart: int = 0) -> ControlFiles:
        control = ControlFiles.of(self.folder, job, str(restart))
        control.create()
        StartLog.of(self.folder).add(group, job, str(restart), 1, [])
        return control

    @contextmanager
    def held(self, *names: str) -> Iterator[None]:
        """This process holds the leases of these stages."""
        leases = Leases([self.folder / name for name in names])
        try:
            yield
        finally:
            leases.release()

    def held_elsewhere(self, name: str, silent_s: float) -> None:
        lease = {"token": "other", "host": "elsewhere", "pid": 1, "started_ticks": 1}
        atomic_write_json(self.folder / name / "lease.json", {**lease, "heartbeat": time.time() - silent_s})


class Squeue:
    """A program `squeue` on PATH that gives a set answer and records its arguments."""

    def __init__(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.place = place / "bin"
        self.place.mkdir()
        self.answers("")
        monkeypatch.setenv("PATH", f"{self.place}:{os.environ['PATH']}")

    def answers(self, *lines: str, code: int = 0) -> None:
        """Lines on standard output, or with a code on standard error."""
        (self.place / "answer").write_text("".join(f"{line}\n" for line in lines))
        stream = ">&2" if code else ""
        self.does(f'echo "$@" >> "{self.place}/calls"; cat "{self.place}/answer" {stream}; exit {code}')

    def does(self, command: str) -> None:
        program = self.place / "squeue"
        program.write_text(f"#!/bin/sh\n{command}\n")
        program.chmod(0o755)

    @property
    def calls(self) -> list[str]:
        path = self.place / "calls"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def squeue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Squeue:
    return Squeue(tmp_path, monkeypatch)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)
    return Run(Path())


def states(text: str) -> dict[str, str]:
    """First and second word of every line of the table."""
    return {line.split()[0]: line.split()[1] for line in text.splitlines() if line.startswith(("pretrain ", "keep-"))}


def row(text: str, stage: str) -> list[str]:
    return next(line for line in text.splitlines() if line.startswith(f"{stage} ")).split()


def test_a_finished_run(run: Run) -> None:
    run.finish(DENSE, PRUNE, FINETUNE, MAGNITUDE)
    assert status_text([run.folder]).splitlines() == [
        "runs/mine: finished, 4 of 4 stages finished",
        "stage               state     progress    %  images/s           robust %  time left",
        "pretrain            finished   740/740  100         -  70.0 [69.1, 70.9]          -",
        "keep-0.1/prune      finished   296/296  100         -      71.0 held-out          -",
        "keep-0.1/finetune   finished   444/444  100         -  70.0 [69.1, 70.9]          -",
        "keep-0.1/magnitude  finished   740/740  100         -  70.0 [69.1, 70.9]          -",
    ]


def test_a_run_of_this_machine_trains_one_stage_and_the_others_wait(run: Run) -> None:
    run.finish(DENSE)
    run.begin(PRUNE, step=148, held_out=0.625)
    (run.folder / "logs" / "restarts.log").write_text("attempt 0a1b2c3d failed: worker died\nattempt of a line\n")
    with run.held(PRUNE, FINETUNE, MAGNITUDE):
        text = status_text([run.folder])
    # 148 + 444 + 740 steps of 128 images are left, at 1,480 images/s.
    assert text.splitlines() == [
        "runs/mine: running, 1 of 4 stages finished, about 0:01:55 of training left, "
        "1 failed attempt (logs/restarts.log)",
        "stage               state     progress    %  images/s           robust %  time left",
        "pretrain            finished   740/740  100         -  70.0 [69.1, 70.9]          -",
        "keep-0.1/prune      training   148/296   50     1,480      62.5 held-out    0:00:13",
        "keep-0.1/finetune   waiting      0/444    0         -                  -          -",
        "keep-0.1/magnitude  waiting      0/740    0         -                  -          -",
    ]


def test_trials_have_rows_and_the_stage_that_chooses_trains_nothing(tmp_path: Path) -> None:
    run = Run(tmp_path, "tuned", "sparsity.tune={finetune_lr: [0.01, 0.1]}", "sparsity.baselines=[]")
    first, second = (f"keep-0.1/trial-{number}/finetune" for number in (1, 2))
    run.finish(DENSE, PRUNE, first)
    with run.held(second, FINETUNE):
        run.begin(second, step=222, held_out=0.5)
        text = status_text([run.folder])
        assert "running, 3 of 5 stages finished, about 0:00:19 of training left" in text, (
            "222 steps of the second trial"
        )
        assert row(text, first)[1:] == ["finished", "444/444", "100", "-", "71.0", "held-out", "-"]
        assert row(text, second)[1:6] == ["training", "222/444", "50", "1,480", "50.0"]
        assert row(text, FINETUNE)[1:] == ["waiting", *5 * ["-"]]
    run.finish(second, FINETUNE)
    assert "finished, 5 of 5 stages finished" in status_text([run.folder])


def test_a_run_that_has_just_begun_knows_no_times(run: Run) -> None:
    with run.held(*run.stages):
        text = status_text([run.folder])
        assert text.splitlines()[0] == "runs/mine: running, 0 of 4 stages finished"
        assert row(text, DENSE) == [DENSE, "training", *["-"] * 5]
        run.begin(DENSE)
        assert row(status_text([run.folder]), DENSE) == [DENSE, "training", "0/740", "0", "-", "-", "-"]


def test_under_attack(run: Run) -> None:
    run.train(DENSE)
    with run.held(*run.stages):
        assert row(status_text([run.folder]), DENSE)[:4] == [DENSE, "evaluating", "-", "-"]
        run.evaluate(DENSE, "progress", {"attack": "pgd", "done": 2500, "total": 10000})
        text = status_text([run.folder])
    assert row(text, DENSE) == [DENSE, "evaluating", "2500/10000", "25", "-", "71.0", "held-out", "-"]
    assert "about 0:02:08 of training left" in text  # of the other three stages, at the speed of this one
    assert states(status_text([run.folder]))[DENSE] == "stopped"


@pytest.mark.parametrize(("silent_s", "state"), [(HEARTBEAT_S, "training"), (STALE_AFTER_S + 10, "stopped")])
def test_the_heartbeat_of_another_host(run: Run, silent_s: float, state: str) -> None:
    run.begin(DENSE, step=37)
    run.held_elsewhere(DENSE, silent_s)
    text = status_text([run.folder])
    assert states(text)[DENSE] == state
    assert ("continue with: python -m launch resume runs/mine" in text) == (state == "stopped")
    assert row(text, DENSE)[2:4] == ["37/740", "5"]


def test_a_run_that_never_started_waits(run: Run) -> None:
    text = status_text([run.folder])
    assert text.splitlines()[0] == "runs/mine: not running, 0 of 4 stages finished"
    assert set(states(text).values()) == {"waiting"}
    assert text.endswith("\n  continue with: python -m launch resume runs/mine")


def test_the_error_of_a_failed_stage_until_it_is_begun_again(run: Run) -> None:
    run.begin(DENSE, step=25)
    record_failure(run.folder, Failure("a1", 0, DENSE, 30, "RuntimeError: out of memory\nand more"))
    text = status_text([run.folder])
    assert text.splitlines()[0].startswith("runs/mine: failed, ")
    assert states(text) == {DENSE: "failed", PRUNE: "waiting", FINETUNE: "waiting", MAGNITUDE: "waiting"}
    assert "\n  pretrain: failed at step 30: RuntimeError: out of memory and more\n" in text
    with run.held(*run.stages):
        text = status_text([run.folder])
    assert states(text)[DENSE] == "training"
    assert "out of memory" not in text
    later = time.time() + 1
    os.utime(run.folder / DENSE / "stage.json", (later, later))
    text = status_text([run.folder])
    assert states(text)[DENSE] == "stopped"
    assert "out of memory" not in text


def test_a_failure_before_the_first_stage_is_that_of_the_next_one(run: Run) -> None:
    run.finish(DENSE)
    record_failure(run.folder, Failure("a1", 0, None, None, "Unhealthy: no device"))
    assert states(status_text([run.folder])) == {
        DENSE: "finished",
        PRUNE: "failed",
        FINETUNE: "waiting",
        MAGNITUDE: "waiting",
    }


JOBS = [("120", "pretrain"), ("123_0", "keep-0.1"), ("123_1", "keep-0.1-magnitude"), ("125", "report")]


def test_jobs_of_a_cluster(run: Run, squeue: Squeue) -> None:
    run.submit(("119", "pretrain"), *JOBS)
    squeue.answers("120 RUNNING None", "123_0 PENDING Dependency", "123_1 PENDING Dependency", "125 PENDING Dependency")
    for restart in range(3):
        run.start("pretrain", "120", restart)
    run.begin(DENSE, step=370)
    run.held_elsewhere(DENSE, HEARTBEAT_S)
    assert status_text([run.folder]).splitlines() == [
        "runs/mine: running, 0 of 4 stages finished, about 0:02:40 of training left, one stage after the other",
        "stage               state     progress   %  images/s  robust %  time left    job  SLURM    restarts",
        "pretrain            training   370/740  50     1,480         -    0:00:32    120  RUNNING         2",
        "keep-0.1/prune      waiting      0/296   0         -         -          -  123_0  PENDING         -",
        "keep-0.1/finetune   waiting      0/444   0         -         -          -  123_0  PENDING         -",
        "keep-0.1/magnitude  waiting      0/740   0         -         -          -  123_1  PENDING         -",
        "  PENDING, Dependency: 123_0 (keep-0.1), 123_1 (keep-0.1-magnitude), 125 (report)",
    ]
    assert squeue.calls == ["-h -r -t all -o %i %T %r -j 120,123_0,123_1,125"]


def test_squeue_is_asked_once_for_all_runs_and_only_for_what_is_unfinished(run: Run, squeue: Squeue) -> None:
    other, local, done = Run(Path(), "other"), Run(Path(), "local"), Run(Path(), "done")
    run.submit(*JOBS)
    run.finish(DENSE)
    other.submit(("7", "pretrain"))
    done.submit(*((str(900 + int(number[:3])), group) for number, group in JOBS))
    done.finish(*done.stages)
    done.start("report", "1025").end(0, "")
    text = status_text([run.folder, other.folder, local.folder, done.folder])
    assert [call.split()[-1] for call in squeue.calls] == ["123_0,123_1,125,7"]
    assert text.count("stages finished") == 4
    status_text([local.folder, done.folder])
    assert len(squeue.calls) == 1


def test_parallel_jobs_train_at_the_same_time(run: Run, squeue: Squeue) -> None:
    run.submit(*JOBS)
    run.finish(DENSE)
    with run.held(PRUNE, FINETUNE), run.held(MAGNITUDE):
        assert states(status_text([run.folder])) == {
            DENSE: "finished",
            PRUNE: "training",
            FINETUNE: "waiting",
            MAGNITUDE: "training",
        }
    with run.held(PRUNE, FINETUNE, MAGNITUDE):  # one process for all, as a resume on this machine is
        assert list(states(status_text([run.folder])).values()) == ["finished", "training", "waiting", "waiting"]


@pytest.mark.parametrize(
    ("answer", "state", "headline"),
    [
        ("120 PENDING BeginTime", "waiting", "waiting for SLURM"),
        ("120 RUNNING None", "waiting", "waiting for SLURM"),
        ("120 REQUEUE_HOLD job requeued in held state", "waiting", "waiting for SLURM"),
        ("120 TIMEOUT TimeLimit", "failed", "failed"),
        ("120 CANCELLED None", "stopped", "not running"),
        ("", "stopped", "not running"),
    ],
)
def test_a_stage_without_a_lease(run: Run, squeue: Squeue, answer: str, state: str, headline: str) -> None:
    run.submit(("120", "pretrain"))
    run.begin(DENSE, step=25)
    squeue.answers(answer)
    text = status_text([run.folder])
    assert text.splitlines()[0].startswith(f"runs/mine: {headline}, ")
    assert row(text, DENSE)[1] == state
    assert row(text, DENSE)[-2] == (answer.split()[1] if answer else "-")
    assert ("python -m launch resume" in text) == (state != "waiting")
    reason = answer.partition(" ")[2].partition(" ")[2]
    assert (f"{reason}: 120 (pretrain)" in text) == (reason not in ("", "None"))


def test_why_a_job_has_ended(run: Run, squeue: Squeue) -> None:
    run.finish(DENSE)
    run.submit(*JOBS)
    run.start("keep-0.1", "124", 9).end(1, "not this one")
    run.start("keep-0.1", "124", 10).end(1, "Ray ended on node 3, 3 times in a row")
    ControlFiles.of(run.folder, "125", "0").create()
    ControlFiles.of(run.folder, "125", "0").end(2, "the report could not be written")
    text = status_text([run.folder])
    assert states(text)[PRUNE] == "failed"
    assert "\n  keep-0.1: Ray ended on node 3, 3 times in a row\n" in text
    assert "\n  report: the report could not be written\n" in text
    assert "not this one" not in text
    assert row(text, FINETUNE)[-1] == "1"
    # Resubmitted: the old job's message is not shown, until the new job ends as well.
    run.submit(*JOBS, ("130_0", "keep-0.1"))
    squeue.answers("130_0 PENDING Resources")
    text = status_text([run.folder])
    assert states(text)[PRUNE] == "waiting"
    assert "Ray ended" not in text
    run.start("keep-0.1", "131").end(2, "wrong data")
    squeue.answers()
    assert "\n  keep-0.1: wrong data\n" in status_text([run.folder])


def test_a_start_that_gave_up_before_it_was_counted(run: Run, squeue: Squeue) -> None:
    run.submit(("120", "pretrain"))
    run.start("pretrain", "120", 0)
    last = ControlFiles.of(run.folder, "120", "1")
    last.create()
    last.end(1, "was started 8 times without a new checkpoint")
    assert "\n  pretrain: was started 8 times" in status_text([run.folder])


@pytest.mark.parametrize("trouble", ["refuses", "hangs", "is missing", "cannot be started"])
def test_squeue_that_does_not_answer_is_a_note(
    run: Run, squeue: Squeue, trouble: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.submit(("120", "pretrain"))
    run.begin(DENSE, step=25)
    expected = {
        "refuses": "squeue ended with 1, slurm_load_jobs error: Unable to contact slurm controller",
        "hangs": "squeue did not answer in 0.2 s",
        "is missing": "squeue is not on this machine",
        "cannot be started": "No such file or directory",
    }
    if trouble == "refuses":
        squeue.answers("slurm_load_jobs error: Unable to contact slurm controller", code=1)
    elif trouble == "hangs":
        monkeypatch.setattr(queue, "SQUEUE_S", 0.2)
        squeue.does("exec sleep 600")
    elif trouble == "is missing":
        monkeypatch.setenv("PATH", "")
    else:
        (squeue.place / "squeue").write_text("#!/no/such/shell\n")
        monkeypatch.setenv("PATH", str(squeue.place))
    text = status_text([run.folder])
    assert row(text, DENSE)[-3:] == ["120", "-", "-"]
    note = " ".join(text.partition("\n\n")[2].split())
    assert note.startswith("job states are unknown: ")
    assert expected[trouble] in note
    assert "python -m launch resume" not in text  # it may well be in the queue


def test_a_job_that_slurm_has_forgotten(run: Run, squeue: Squeue) -> None:
    run.submit(("120", "pretrain"))
    squeue.answers("slurm_load_jobs error: Invalid job id specified", code=1)
    text = status_text([run.folder])
    assert row(text, DENSE)[-2] == "-"
    assert "not known" not in text
    assert "python -m launch resume" in text


@pytest.mark.parametrize("content", ['{"total', "[]", '{"a": 1}', '{"robust_accuracy": 3, "jobs": [4]}', "\0\0"])
@pytest.mark.parametrize(
    "name",
    ["pretrain/stage.json", "pretrain/evaluate/pgd.json", "keep-0.1/prune/lease.json", "jobs.json"],
)
def test_a_damaged_file_is_named_and_hides_nothing_else(run: Run, squeue: Squeue, name: str, content: str) -> None:
    other = Run(Path(), "other")
    for each in (run, other):
        each.finish(DENSE)
        each.begin(PRUNE, step=74)
    (run.folder / name).write_text(content)
    text = status_text([run.folder, other.folder])
    assert f"\n  runs/mine/{name} is damaged: " in text
    assert text.count(" is damaged: ") == 1
    assert states(text)[DENSE] == "finished"
    assert row(text.partition("\n\n")[0], PRUNE)[:4] == [PRUNE, "stopped", "74/296", "25"]
    assert text.partition("\n\n")[2].startswith("runs/other: not running, 1 of 4 stages finished")


def test_damage_in_what_jobs_left(run: Run, squeue: Squeue) -> None:
    run.submit(("120", "pretrain"))
    run.start("pretrain", "120", 0)
    run.start("pretrain", "120", 1)
    (run.folder / "control" / "120-1" / "ended.json").write_text('{"code": "x"}')
    with StartLog.of(run.folder).path.open("a") as stream:
        stream.write('{"group": "pretrain"}\n\0\0\n{"group": "pretr')
    (run.folder / "logs" / "failures.jsonl").write_text('[1]\n{"time": null, "stage": "pretrain"}\n')
    text = status_text([run.folder])
    assert "runs/mine/control/120-1/ended.json is damaged: " in text
    assert row(text, DENSE)[-1] == "1"


def test_damaged_rows_are_passed_over(run: Run) -> None:
    run.begin(DENSE, step=25)
    with (run.folder / DENSE / "metrics.jsonl").open("a") as stream:
        stream.write('[]\n{"kind": "train", "step": 50, "timing": null}\n\0\n{"kind": "train", "step": 7')
    assert row(status_text([run.folder]), DENSE)[2] == "25/740"


def test_a_run_without_a_readable_recipe_does_not_hide_the_others(run: Run) -> None:
    broken = Run(Path(), "broken")
    (broken.folder / "recipe.yaml").write_text("name: [")
    first, second = status_text([broken.folder, run.folder]).split("\n\n")
    assert first.startswith("runs/broken cannot be shown: runs/broken/recipe.yaml: not YAML")
    assert second.startswith("runs/mine: not running")


def test_everything_at_its_widest_fits(tmp_path: Path, squeue: Squeue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = Run(Path(), "wide", "sparsity.keep_fractions=[0.001]", "phases.pretrain.epochs=900")
    run.finish(DENSE)
    folder = run.folder / "keep-0.001"
    for name in ("keep-0.001/prune", "keep-0.001/magnitude"):
        run.begin(name, step=100, speed=123456.0)
    for plan in folder.glob("*/stage.json"):
        atomic_write_json(plan, json.loads(plan.read_text()) | {"total_steps": 112590})
    run.submit(("1234567_0", "keep-0.001"), ("1234567_12", "keep-0.001-magnitude"))
    for restart in range(13):
        run.start("keep-0.001", "1234569", restart)
    squeue.answers("1234567_0 OUT_OF_MEMORY OutOfMemory", f"1234567_12 COMPLETING {'words and ' * 30}")
    record_failure(run.folder, Failure("a1", 0, "keep-0.001/prune", 30, "no memory " * 200))
    lines = status_text([run.folder]).splitlines()
    assert max(map(len, lines)) <= 120
    assert row("\n".join(lines), "keep-0.001/prune")[-3:] == ["1234567_0", "OUT_OF_MEMORY", "12"]
    assert len(lines) < 25  # a long error is shortened


def test_long_times_are_days(run: Run) -> None:
    run.begin(DENSE, step=1, speed=0.25)
    with run.held(DENSE):
        assert "  4 d 9 h" in status_text([run.folder])


def test_nothing_to_show_names_the_way_to_a_run(run: Run) -> None:
    with pytest.raises(ValueError, match=r"there is no run in runs/; start one: python -m launch run RECIPE"):
        status_text([])


def test_the_command_shows_all_runs_or_those_it_is_given(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    Run(Path(), "second")
    (Path("runs") / "no_run").mkdir()
    parser = argparse.ArgumentParser()
    status.add_parser(parser.add_subparsers())
    for names, expected in (([], ["mine", "second"]), (["second"], ["second"]), (["runs/mine"], ["mine"])):
        arguments = parser.parse_args(["status", *names])
        assert arguments.handler(arguments) == 0
        headlines = [line for line in capsys.readouterr().out.splitlines() if "stages finished" in line]
        assert [line.partition(":")[0] for line in headlines] == [f"runs/{name}" for name in expected]
    unknown = parser.parse_args(["status", "third"])
    with pytest.raises(ValueError, match="third: no such run; runs here: mine, second"):
        unknown.handler(unknown)


def test_a_strangers_failure_does_not_control_the_terminal(
    run: Run, squeue: Squeue, capsys: pytest.CaptureFixture[str]
) -> None:
    record_failure(run.folder, Failure("a", 0, DENSE, 3, "\x1b]0;title\x07\x1b[2J boom \u202e"))
    run.begin(PRUNE)
    assert status._status(argparse.Namespace(runs=["mine"])) == 0
    out = capsys.readouterr().out
    assert "\\x1b]0;title\\x07\\x1b[2J boom \\u202e" in out
    assert not {"\x1b", "\x07", "\u202e"} & set(out)
