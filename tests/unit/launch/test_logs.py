"""Logs: the last lines of every file, and files that grow, appear, are truncated and replaced while followed."""

from __future__ import annotations

import argparse
import io
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from launch import run_folder
from launch.commands import logs
from launch.commands.logs import print_logs
from launch.slurm.submit import SubmittedJob
from pipeline.recipe.file import load_recipe
from pipeline.recipe.schema import Recipe
from pipeline.recipe.stages import stages_of
from pipeline.run.files import atomic_write_json, atomic_write_text
from tests.support.commands import wait_until
from tests.support.scripted_event import Script

DEMO = Path(__file__).parents[3] / "recipes" / "fashion_mnist.yaml"
DEADLINE_S = 30
WORKER, OTHER, RESTARTS = "logs/worker-0.log", "logs/worker-1.log", "logs/restarts.log"


class Run:
    """A run directory of the demo's recipe with one sparsity."""

    def __init__(self) -> None:
        self.folder = Path("runs") / "mine"
        self.recipe: Recipe = load_recipe(DEMO, ["sparsity.keep_fractions=[0.1]"])
        run_folder.write_run_folder(self.folder, self.recipe, {})

    def log(self, name: str, text: str | bytes) -> None:
        """Append to a log."""
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        with path.open("ab") as stream:
            stream.write(text.encode() if isinstance(text, str) else text)

    def finish(self, *names: str) -> None:
        """These stages, or all of them, are done."""
        for stage in stages_of(self.recipe):
            if stage.name in names or not names:
                (self.folder / stage.name / "evaluate").mkdir(parents=True, exist_ok=True)
                for file in ("result.json", *(f"evaluate/{name}.json" for name in stage.evaluations)):
                    atomic_write_json(self.folder / stage.name / file, {})

    def submit(self, *jobs: tuple[str, str]) -> None:
        """(id, group) of every job, oldest first."""
        rows = [SubmittedJob(number, group, [], 0.0).row() for number, group in jobs]
        atomic_write_json(self.folder / "jobs.json", {"jobs": rows})


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)
    return Run()


def shown(run: Run, lines: int = 20) -> str:
    stream = io.StringIO()
    print_logs(run.folder, False, lines, stream, threading.Event())
    return stream.getvalue()


def test_each_log_under_its_name_workers_in_their_order(run: Run) -> None:
    run.log(RESTARTS, "attempt a failed\n")
    for rank in (10, 2, 0):
        run.log(f"logs/worker-{rank}.log", f"rank {rank} of 16\n")
    run.log("logs/worker-3.log", "")
    run.log("logs/failures.jsonl", "{}\n")
    assert shown(run).splitlines() == [
        "==> runs/mine/logs/worker-0.log <==",
        "rank 0 of 16",
        "",
        "==> runs/mine/logs/worker-2.log <==",
        "rank 2 of 16",
        "",
        "==> runs/mine/logs/worker-10.log <==",
        "rank 10 of 16",
        "",
        "==> runs/mine/logs/restarts.log <==",
        "attempt a failed",
    ]


@pytest.mark.parametrize("lines", [1, 2, 3, 4, 5, 1000])
@pytest.mark.parametrize("end", ["", "not ended"])
@pytest.mark.parametrize("block", [1, 7, logs.BLOCK])
def test_the_last_lines_of_a_file(run: Run, lines: int, end: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "BLOCK", block)
    written = ["first", "", "a longer line in the middle\rof the file", "last"]
    run.log(WORKER, "\n".join([*written, end]))
    whole = [line.replace("\r", "\\r") for line in (written[-lines:] if lines < 4 else written)]
    assert shown(run, lines).split("\n")[1:] == [*whole, *([end] if end else []), ""]


def test_a_long_file_is_read_from_its_end(run: Run) -> None:
    run.log(WORKER, "".join(f"line {number}\n" for number in range(50_000)))
    assert shown(run, 2).splitlines()[1:] == ["line 49998", "line 49999"]
    assert shown(run, 40_000).splitlines()[1] == "line 10000"


def test_bytes_that_are_no_text(run: Run) -> None:
    run.log(WORKER, b"\xff\xfe caf\xc3\xa9\n")
    assert shown(run).splitlines()[1] == "\ufffd\ufffd caf\u00e9"


def test_newest_jobs_of_what_is_unfinished(run: Run) -> None:
    jobs = [("120", "pretrain"), ("123_0", "keep-0.1"), ("123_1", "keep-0.1-magnitude"), ("125", "report")]
    run.submit(("110", "pretrain"), *jobs)
    for name in ("110_0", "120_0", "120_1", "12_0", "1230_0"):
        run.log(f"jobs/{name}_log.err", f"said by {name}\n")
    run.log("jobs/120_0_log.out", "printed by 120_0\n")
    run.log("jobs/120_submission.sh", "#!/bin/sh\n")
    run.log("jobs/120_0_result.pkl", b"\x80")

    def names() -> list[str]:
        return [Path(line.split()[1]).name for line in shown(run).splitlines() if line.startswith("==> ")]

    assert names() == ["120_0_log.err", "120_0_log.out", "120_1_log.err"]
    run.finish("pretrain")
    assert names() == ["120_0_log.err", "120_0_log.out", "120_1_log.err"], "there is nothing newer yet"
    run.log("jobs/123_0_0_log.err", "prunes\n")
    run.log("jobs/123_1_0_log.err", "finetunes\n")
    assert names() == ["123_0_0_log.err", "123_1_0_log.err"]
    run.submit(*jobs, ("130", "keep-0.1"))
    run.log("jobs/130_0_log.err", "prunes again\n")
    assert names() == ["130_0_log.err", "123_1_0_log.err"]
    run.finish()
    run.log("jobs/125_0_log.out", "a table\n")
    assert names() == ["125_0_log.out"]


def test_nothing_to_show_names_the_fix(run: Run) -> None:
    with pytest.raises(ValueError, match="runs/mine has no logs; python -m launch resume runs/mine starts it"):
        shown(run)
    run.log(WORKER, "")
    with pytest.raises(ValueError, match="runs/mine has no logs"):
        shown(run)
    run.finish()
    for follow in (False, True):
        with pytest.raises(ValueError, match="runs/mine has no logs; it is finished"):
            print_logs(run.folder, follow, 20, io.StringIO(), threading.Event())


@pytest.mark.parametrize("lines", [0, -1])
def test_impossible_numbers_of_lines(run: Run, lines: int) -> None:
    with pytest.raises(ValueError, match=f"--lines {lines}: expected 1 or more"):
        shown(run, lines)


def test_a_log_that_cannot_be_read_is_named(run: Run) -> None:
    (run.folder / "logs" / "worker-0.log").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"worker-0\.log cannot be read: "):
        shown(run)


def followed(run: Run, *actions: Callable[[], object], lines: int = 20) -> list[str]:
    """The output while these actions happen, one between two polls."""
    stream = io.StringIO()
    print_logs(run.folder, True, lines, stream, Script(*actions))
    return stream.getvalue().splitlines()


def test_followed_files_take_turns(run: Run) -> None:
    run.log(WORKER, "old\nnewest\n")
    run.log(OTHER, "other\n")
    assert followed(
        run,
        lambda: run.log(WORKER, "step 1\n"),
        lambda: run.log(WORKER, "step 2\nstep 3\n"),
        lambda: [run.log(OTHER, "other 1\n"), run.log(WORKER, "step 4\n")],
        lambda: run.log(OTHER, "other 2\n"),
        lines=1,
    ) == [
        *("==> runs/mine/logs/worker-0.log <==", "newest", ""),
        *("==> runs/mine/logs/worker-1.log <==", "other", ""),
        *("==> runs/mine/logs/worker-0.log <==", "step 1", "step 2", "step 3", "step 4", ""),
        *("==> runs/mine/logs/worker-1.log <==", "other 1", "other 2"),
    ]


def test_a_line_is_shown_when_it_is_whole_or_at_the_end(run: Run) -> None:
    run.log(WORKER, "begun, ")
    run.log(OTHER, "here\n")
    assert followed(
        run,
        lambda: run.log(WORKER, b"caf\xc3"),
        lambda: run.log(WORKER, b"\xa9"),
        lambda: run.log(OTHER, "between\n"),
        lambda: run.log(WORKER, " ended\nlast words without "),
    ) == [
        *("==> runs/mine/logs/worker-1.log <==", "here", "between", ""),
        *("==> runs/mine/logs/worker-0.log <==", "begun, caf\u00e9 ended", "last words without "),
    ]


def test_new_files_are_shown_from_their_beginning(run: Run) -> None:
    run.log(WORKER, "here\nstill here\n")
    assert followed(
        run,
        lambda: run.log(OTHER, "one\ntwo\n"),
        lambda: [run.submit(("7", "pretrain")), run.log("jobs/7_0_log.err", "queued again\nruns\n")],
        lines=1,
    ) == [
        *("==> runs/mine/logs/worker-0.log <==", "still here", ""),
        *("==> runs/mine/logs/worker-1.log <==", "one", "two", ""),
        *("==> runs/mine/jobs/7_0_log.err <==", "queued again", "runs"),
    ]


@pytest.mark.parametrize("how", ["truncated", "truncated and grown", "replaced", "replaced alike", "away for a while"])
def test_files_that_are_truncated_or_replaced(run: Run, how: str) -> None:
    before = "the first start\nsaid more than this\n"
    run.log(WORKER, before)
    path = run.folder / WORKER
    actions = {
        "truncated": [lambda: path.write_text(""), lambda: path.write_text("new\n")],
        "truncated and grown": [lambda: path.write_text("new\n" + "x" * 100 + "\n")],
        "replaced": [lambda: atomic_write_text(path, "new\n")],
        "replaced alike": [lambda: atomic_write_text(path, before + "new\n")],
        "away for a while": [path.unlink, lambda: None, lambda: path.write_text("new\n")],
    }
    text = followed(run, *actions[how], lambda: run.log(WORKER, "continues\n"))
    assert text[:2] == ["==> runs/mine/logs/worker-0.log <==", "the first start"]
    again = text.index("==> runs/mine/logs/worker-0.log <== (replaced)")
    expected = {"truncated and grown": ["new", "x" * 100], "replaced alike": [*before.splitlines(), "new"]}
    assert text[again + 1 :] == [*expected.get(how, ["new"]), "continues"]


def test_the_end_of_a_run_ends_it_once_nothing_new_came(run: Run) -> None:
    run.log(WORKER, "begins\n")
    messages: list[str] = []

    def say(text: str) -> None:
        messages.append(text)
        run.log(WORKER, f"{text}\n")

    text = followed(
        run,
        lambda: say("trains"),
        lambda: None,
        lambda: [run.finish(), say("is finished")],
        lambda: say("leaves"),
        lambda: None,
        lambda: say("is never asked for"),
    )
    assert messages == ["trains", "is finished", "leaves"]
    assert text[1:] == ["begins", *messages]


def test_a_finished_run_is_shown_and_left(run: Run) -> None:
    run.log(WORKER, "all done")
    run.finish()
    polls: list[float] = []
    stop = Script(*[lambda: polls.append(0.0)] * 5)
    stream = io.StringIO()
    print_logs(run.folder, True, 20, stream, stop)
    assert stream.getvalue().splitlines()[1:] == ["all done"]
    assert len(polls) <= 1


class Stream(io.StringIO):
    """A stream that wakes those who wait for its text."""

    def wait_for(self, text: str) -> None:
        wait_until(lambda: text in self.getvalue(), DEADLINE_S, f"{text!r} is shown")


def test_following_a_living_run(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "POLL_S", 0.01)
    stream, stop = Stream(), threading.Event()
    thread = threading.Thread(target=print_logs, args=(run.folder, True, 5, stream, stop))
    thread.start()
    try:
        stream.wait_for("waiting for the first log of runs/mine\n")
        run.submit(("7", "pretrain"))
        run.log("jobs/7_0_log.err", "the job begins\n")
        stream.wait_for("==> runs/mine/jobs/7_0_log.err <==\nthe job begins\n")
        run.log(WORKER, "a worker begins\nand has not")
        stream.wait_for("==> runs/mine/logs/worker-0.log <==\na worker begins\n")
        assert "and has not" not in stream.getvalue()
        run.log(WORKER, " ended\n")
        stream.wait_for("and has not ended\n")
        run.finish()
        thread.join(DEADLINE_S)
        assert not thread.is_alive(), "the end of the run was not noticed"
    finally:
        stop.set()
        thread.join(DEADLINE_S)


def test_following_ends_when_it_is_asked_to(run: Run) -> None:
    run.log(WORKER, "begins\nwaits for its newline")
    stream, stop = Stream(), threading.Event()
    thread = threading.Thread(target=print_logs, args=(run.folder, True, 5, stream, stop))
    thread.start()
    stream.wait_for("begins\n")
    assert thread.is_alive()
    stop.set()
    thread.join(DEADLINE_S)
    assert not thread.is_alive()
    assert stream.getvalue().endswith("waits for its newline\n")


@pytest.mark.parametrize("follow", [True, False])
def test_the_command(
    run: Run, follow: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run.log(WORKER, "one\ntwo\nthree\n")
    parser = argparse.ArgumentParser()
    logs.add_parser(parser.add_subparsers())
    arguments = parser.parse_args(["logs", "mine", "-n", "2", *(["-f"] if follow else [])])

    class Interrupted(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            raise KeyboardInterrupt

    monkeypatch.setattr(threading, "Event", Interrupted)
    assert arguments.handler(arguments) == 0
    assert capsys.readouterr().out == "==> runs/mine/logs/worker-0.log <==\ntwo\nthree\n"
