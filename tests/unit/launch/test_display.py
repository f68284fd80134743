"""The display sees a run directory change step by step; nothing here waits for a clock."""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from launch import display
from launch.display import follow
from pipeline.run.tracking.metrics import truncate_rows
from tests.support.scripted_event import Script

PLAN = {"stage": "", "phase": "prune", "total_steps": 700, "steps_per_epoch": 235, "batch_per_step": 128}
ROBUST = {"value": 0.612, "low": 0.6024, "high": 0.6215}
EVALUATION = {
    **{"attack": "pgd", "title": "PGD-20", "settings": {}, "chunk": 250, "images": 10000},
    **{"model_sha256": "m", "data_sha256": "d"},
    **{"clean_correct": 8500, "clean_accuracy": {"value": 0.85, "low": 0.84, "high": 0.86}},
    **{"robust_correct": 6120, "robust_accuracy": ROBUST},
}
Action = Callable[[], object]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


RESULT = {"steps": 700, "model_sha256": "m"}
APGD = {**EVALUATION, "images": 500, "title": "APGD", "clean_correct": 425, "robust_correct": 306}


def train_row(step: int, loss: float = 0.91, robust: float | None = 0.612) -> str:
    row = {"kind": "train", "step": step, "epoch": 1.0, "lr": 0.1, "loss": loss, "clean_accuracy": None}
    row |= {"robust_accuracy": robust, "images": 2560, "timing": {"images_per_s": 2310.4, "seconds": 1.1}}
    return json.dumps(row) + "\n"


def validation_row(step: int) -> str:
    row = {"kind": "validation", "step": step, "epoch": 1.0, "clean_accuracy": 0.85, "robust_accuracy": 0.62}
    return json.dumps({**row, "images": 2000, "timing": {"seconds": 2.0}}) + "\n"


class Writer:
    """Writes a stage's files; each method returns the action that does it."""

    def __init__(self, run: Path, name: str) -> None:
        self.folder = run / name

    def json(self, name: str, value: dict[str, Any]) -> Action:
        def write() -> None:
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / name).write_text(json.dumps(value))

        return write

    def rows(self, text: str) -> Action:
        def write() -> None:
            with (self.folder / "metrics.jsonl").open("a") as stream:
                stream.write(text)

        return write

    def cut(self, step: int) -> Action:
        return lambda: truncate_rows(self.folder / "metrics.jsonl", step)

    def remove(self, name: str) -> Action:
        return lambda: os.unlink(self.folder / name)


def shown(run: Path, names: list[str], *actions: Action, stream: io.StringIO | None = None, every: float = 0.0) -> str:
    stream = stream or io.StringIO()
    evaluations = {name: ["pgd", "apgd"] for name in names}
    follow(run, evaluations, Script(*actions), stream, interval_s=0.01, line_every_s=every)
    return stream.getvalue()


PRUNE = "keep-0.1/prune"


def test_plain_lines_of_a_whole_stage(tmp_path: Path) -> None:
    stage = Writer(tmp_path, PRUNE)
    text = shown(
        tmp_path,
        [PRUNE],
        stage.json("stage.json", PLAN),
        stage.rows(train_row(230)),
        stage.rows(validation_row(235) + train_row(690, robust=None)),
        stage.json("result.json", RESULT),
        stage.json("evaluate/progress.json", {"attack": "honesty checks", "done": 0, "total": 100}),
        stage.json("evaluate/progress.json", {"attack": "pgd", "done": 2500, "total": 10000}),
        stage.json("evaluate/pgd.json", EVALUATION),
        stage.json("evaluate/progress.json", {"attack": "apgd", "done": 50, "total": 200}),
        stage.json("evaluate/apgd.json", APGD),
    )
    assert text.splitlines() == [
        f"{PRUNE}  700 steps of 128 images",
        f"{PRUNE}  step 230/700 (32 %)  loss 0.91  robust 61.2 %  2,310 images/s  0:00:26 of training left",
        f"{PRUNE}  step 235  held-out images: clean 85.0 %, robust 62.0 %",
        f"{PRUNE}  step 690/700 (98 %)  loss 0.91  2,310 images/s  0:00:01 of training left",
        f"{PRUNE}  finished after 700 steps; now evaluated: pgd, apgd",
        f"{PRUNE}  honesty checks: 0/100 test images",
        f"{PRUNE}  pgd: 2,500/10,000 test images",
        f"{PRUNE}  clean 85.00 % [84.00, 86.00], robust 61.20 % [60.24, 62.15] on 10,000 test images: PGD-20",
        f"{PRUNE}  apgd: 50/200 test images",
        f"{PRUNE}  clean 85.00 % [84.00, 86.00], robust 61.20 % [60.24, 62.15] on 500 test images: APGD",
    ]


def test_a_stage_that_chooses_says_what(tmp_path: Path) -> None:
    """The rows that it has are of the trial, which was shown when it trained."""
    name = "keep-0.1/magnitude"
    stage = Writer(tmp_path, name)
    stage.folder.mkdir(parents=True)
    tuned = [
        {
            "stage": f"keep-0.1/trial-{n}/magnitude",
            "finetune_lr": lr,
            "held_out_robust_accuracy": 0.61 + lr,
            "chosen": n > 1,
        }
        for n, lr in ((1, 0.01), (2, 0.03))
    ]
    text = shown(
        tmp_path,
        [name],
        stage.rows(train_row(690) + validation_row(700)),
        stage.json("stage.json", {**PLAN, "trials": 2}),
        stage.json("result.json", {**RESULT, "tuned": tuned}),
    )
    assert text.splitlines() == [
        f"{name}  chooses from 2 trials",
        f"{name}  chosen: finetune lr 0.03 (64.0 % robust on the held-out images); now evaluated: pgd, apgd",
    ]


def test_a_stage_that_takes_weights_says_whose(tmp_path: Path) -> None:
    stage = Writer(tmp_path, "pretrain")
    stage.folder.mkdir(parents=True)
    text = shown(
        tmp_path,
        ["pretrain"],
        stage.json("stage.json", {**PLAN, "total_steps": 0, "weights": "models/robust.pt"}),
        stage.json("result.json", {**RESULT, "steps": 0}),
    )
    assert text.splitlines() == [
        "pretrain  takes the weights of models/robust.pt",
        "pretrain  finished; now evaluated: pgd, apgd",
    ]


def test_a_chunk_that_takes_minutes_has_one_line(tmp_path: Path) -> None:
    stage = Writer(tmp_path, "pretrain")
    stage.json("result.json", {"steps": 9})()
    progress = [
        stage.json("evaluate/progress.json", {"attack": "pgd", "done": n, "total": 152}) for n in (76, 76, 76, 152)
    ]
    text = shown(tmp_path, ["pretrain"], *progress)
    assert text.splitlines()[1:] == [f"pretrain  pgd: {n}/152 test images" for n in (76, 152)]


def test_time_left_has_the_evaluations_that_were_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both take 50 s of the clock after the first stage: every look at it is 10 s later."""
    seconds = count(0, 10)
    monkeypatch.setattr(display.time, "monotonic", lambda: next(seconds))
    dense, prune = Writer(tmp_path, "pretrain"), Writer(tmp_path, PRUNE)
    dense.json("stage.json", PLAN)()
    text = shown(
        tmp_path,
        ["pretrain", PRUNE],
        dense.rows(train_row(230)),
        dense.json("result.json", RESULT),
        dense.json("evaluate/pgd.json", EVALUATION),
        dense.json("evaluate/apgd.json", EVALUATION),
        prune.json("stage.json", PLAN),
        prune.rows(train_row(230)),
    )
    before, after = (line for line in text.splitlines() if "loss" in line)
    assert before.endswith("0:00:26 of training left")
    assert re.search(r"0:00:46 left$", after)


def test_a_resumed_stage_says_where_it_starts(tmp_path: Path) -> None:
    stage = Writer(tmp_path, PRUNE)
    stage.json("stage.json", PLAN)()
    for step in (9, 18):
        stage.json(f"step-{step:010}/MANIFEST.json", {})()
    assert shown(tmp_path, [PRUNE], lambda: None) == f"{PRUNE}  700 steps of 128 images, from step 18\n"


def test_rows_and_result_of_one_moment_are_all_shown(tmp_path: Path) -> None:
    stage = Writer(tmp_path, PRUNE)
    stage.json("stage.json", PLAN)()
    text = shown(
        tmp_path,
        [PRUNE],
        lambda: [
            stage.rows(train_row(700))(),
            stage.json("result.json", RESULT)(),
            stage.json("evaluate/pgd.json", EVALUATION)(),
        ],
    )
    assert [line.split("  ")[1].split()[0] for line in text.splitlines()] == ["700", "step", "finished", "clean"]


def test_lines_are_limited_but_news_is_not(tmp_path: Path) -> None:
    stage = Writer(tmp_path, PRUNE)
    stage.json("stage.json", PLAN)()
    rows = [stage.rows(train_row(step)) for step in range(10, 110, 10)]
    text = shown(tmp_path, [PRUNE], *rows, stage.rows(validation_row(110)), every=1e9)
    assert text.count("loss") == 1
    assert "step 10/700" in text
    assert "held-out" in text


def test_what_was_there_before_is_not_news(tmp_path: Path) -> None:
    for name, files in (("pretrain", ["result.json", "evaluate/pgd.json"]), (PRUNE, [])):
        stage = Writer(tmp_path, name)
        stage.json("stage.json", PLAN)()
        stage.rows(train_row(20) + validation_row(20))()
        for file in files:
            stage.json(file, EVALUATION)()
    text = shown(tmp_path, ["pretrain", PRUNE, "keep-0.1/finetune"], lambda: None)
    assert text.splitlines() == ["pretrain  already finished", f"{PRUNE}  700 steps of 128 images"]


def test_a_finished_stage_may_still_be_evaluated(tmp_path: Path) -> None:
    stage = Writer(tmp_path, "pretrain")
    stage.json("result.json", {"steps": 9})()
    text = shown(tmp_path, ["pretrain"], stage.json("evaluate/pgd.json", EVALUATION))
    assert text.splitlines()[0] == "pretrain  already finished"
    assert "robust 61.20 %" in text.splitlines()[1]
    assert len(text.splitlines()) == 2


def test_torn_lines_wait_for_their_end_and_damaged_ones_are_passed_over(tmp_path: Path) -> None:
    stage = Writer(tmp_path, PRUNE)
    stage.json("stage.json", PLAN)()
    row = train_row(40)
    text = shown(
        tmp_path,
        [PRUNE],
        stage.rows("\0\0 no row\n[1]\n"),
        stage.rows(row[:30]),
        stage.rows(row[30:]),
    )
    assert [line for line in text.splitlines() if "loss" in line] == [
        f"{PRUNE}  step 40/700 (5 %)  loss 0.91  robust 61.2 %  2,310 images/s  0:00:37 of training left"
    ]


@pytest.mark.parametrize("regrown", [True, False])
def test_rows_cut_on_resume(tmp_path: Path, regrown: bool) -> None:
    stage = Writer(tmp_path, PRUNE)
    stage.json("stage.json", PLAN)()

    def resume() -> None:
        stage.cut(20)()
        if regrown:  # as long as before by the next update
            stage.rows(train_row(40))()

    text = shown(tmp_path, [PRUNE], stage.rows(train_row(20) + train_row(40)), resume, stage.rows(train_row(60)))
    lines = text.splitlines()
    assert f"{PRUNE}  resumed, at step {40 if regrown else 20}" in lines
    assert [line.split("/")[1].split()[-1] for line in lines if "loss" in line] == (
        ["40", "40", "60"] if regrown else ["40", "20", "60"]
    )


def test_files_that_are_being_written_are_not_errors(tmp_path: Path) -> None:
    folder = tmp_path / PRUNE
    (folder / "evaluate").mkdir(parents=True)
    stage = Writer(tmp_path, PRUNE)
    text = shown(
        tmp_path,
        [PRUNE, "pretrain"],
        lambda: (folder / "stage.json").write_text('{"total'),
        stage.json("stage.json", PLAN),
        lambda: (folder / "result.json").write_text(""),
        stage.json("result.json", RESULT),
        lambda: (folder / "evaluate" / "progress.json").write_text("{"),
        stage.remove("evaluate/progress.json"),
    )
    assert text.splitlines() == [
        f"{PRUNE}  700 steps of 128 images",
        f"{PRUNE}  finished after 700 steps; now evaluated: pgd, apgd",
    ]


def test_a_terminal_has_bars_and_results_above_them(tmp_path: Path) -> None:
    stage, other = Writer(tmp_path, PRUNE), Writer(tmp_path, "keep-0.01/prune")
    text = shown(
        tmp_path,
        [PRUNE, "keep-0.01/prune"],
        stage.json("stage.json", PLAN),
        stage.rows(train_row(350)),
        other.json("stage.json", PLAN),
        other.rows(train_row(70)),
        stage.json("result.json", RESULT),
        stage.json("evaluate/progress.json", {"attack": "pgd", "done": 2500, "total": 10000}),
        stage.json("evaluate/pgd.json", EVALUATION),
        stream=Terminal(),
    )
    # What a terminal draws, cursor movements apart.
    frames = [re.sub(r"\x1b\[\w", "", frame) for frame in re.split(r"[\r\n]", text)]
    assert any(
        f"{PRUNE}  50%|" in frame
        and "350/700, loss 0.91, robust 61.2 %, 2,310 images/s, 0:00:19 of training left" in frame
        for frame in frames
    )
    assert any("keep-0.01/prune  10%|" in frame for frame in frames)
    assert any(f"{PRUNE} pgd  25%|" in frame for frame in frames)
    assert any(frame.strip().startswith(f"{PRUNE}  clean 85.00 %") for frame in frames)
    assert next(frame for frame in reversed(frames) if frame).isspace(), "a bar is left on the screen"
