"""Every file of a run, damaged in every way, read by every command: no traceback, no hang, no wrong number, and nothing
outside the run is changed."""

from __future__ import annotations

import functools
import io
import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import pipeline
from launch import run_folder
from launch.__main__ import main
from launch.commands import evaluate, status
from launch.run_folder import check_same_data, write_run_folder
from launch.slurm.control_files import ControlFiles, StartLog
from pipeline.evaluation.measures.base import summarise
from pipeline.models import build_network
from pipeline.models.export import write_model
from pipeline.models.pruning.topk import masks_sha256
from pipeline.models.state import effective_state, layer_counts
from pipeline.recipe.file import parse_yaml
from pipeline.recipe.schema import Recipe
from pipeline.recipe.stages import stages_of
from pipeline.report.build import build_report
from pipeline.run import checkpoint, files
from pipeline.run.checkpoint import Snapshot, write_checkpoint
from pipeline.run.failures import Failure, append_to_log, record_failure
from pipeline.run.files import atomic_write_json, sha256_of
from pipeline.run.layout import StageFolder, is_done
from pipeline.run.lease import Leases
from pipeline.run.progress import Progress
from pipeline.run.tracking.metrics import truncate_rows
from tests.support.small_recipe import small_recipe

HANG_S = 30
IMAGES = 40
KEPT = 0.1
STAGES = {"pretrain": (30, 20), "keep-0.1/finetune": (28, 17)}
"""Stage -> images right, clean and under attack."""


def write_verdicts(path: Path, facts: dict[str, Any], clean: int, robust: int) -> None:
    ids = np.arange(IMAGES)
    verdicts = {"sample_id": ids, "clean_correct": ids < clean, "robust_correct": ids < robust}
    atomic_write_json(path, facts | summarise(verdicts))
    pq.write_table(pa.table(verdicts), path.with_suffix(".parquet"))


def write_stage(folder: Path, recipe: Recipe, seed: int, clean: int, robust: int) -> None:
    """A finished stage with every file that a run, and `launch evaluate`, leave there."""
    (folder / "evaluate").mkdir(parents=True)
    network = build_network(recipe.model, seed=seed, image_size=28)
    tensors, counts, mask = effective_state(network), layer_counts(network), None
    if "keep" in folder.parent.name:
        for one in counts:
            flat = tensors[one["name"]].view(-1)
            one["kept"] = max(1, int(KEPT * one["total"]))
            flat[one["kept"] :] = 0.0
            flat[: one["kept"]] = 1.0
        mask = masks_sha256({one["name"]: tensors[one["name"]] != 0 for one in counts})
    write_model(folder / "model.safetensors", tensors, recipe.model, {"image_size": 28, "keep_fraction": None})
    model = sha256_of(folder / "model.safetensors")
    plan = {"total_steps": 40, "steps_per_epoch": 20, "batch_per_step": 64}
    atomic_write_json(folder / "stage.json", plan)
    result = {"stage": folder.name, "steps": 40, "selected_step": 40, "model_sha256": model, "mask_sha256": mask}
    atomic_write_json(folder / "result.json", result | {"layers": counts})
    row = {"step": 40, "epoch": 2.0, "clean_accuracy": 0.75, "robust_accuracy": 0.5, "images": 64}
    train = {"kind": "train", **row, "loss": 1.0, "lr": 0.1, "timing": {"seconds": 1.0, "images_per_s": 64.0}}
    validation = {"kind": "validation", **row, "timing": {"seconds": 1.0}}
    (folder / "metrics.jsonl").write_text(json.dumps(train) + "\n" + json.dumps(validation) + "\n")
    facts = {"attack": "pgd", "title": "PGD-2", "settings": {"norm": "linf", "eps": "1/10"}, "chunk": 200}
    facts |= {"model_sha256": model, "data_sha256": "d"}
    write_verdicts(folder / "evaluate" / "pgd.json", facts, clean, robust)
    write_verdicts(
        folder / "evaluate" / "square-1.json", facts | {"attack": "square", "title": "Square"}, clean, robust
    )
    check = {"name": "slope", "verdict": "pass", "figure": "0.1", "meaning": "falls"}
    atomic_write_json(folder / "honesty.json", facts | {"images": IMAGES, "checks": [check]})
    atomic_write_json(folder / "evaluate" / "progress.json", {"attack": "pgd", "done": 20, "total": IMAGES})
    lease = {"token": "t", "host": "elsewhere", "pid": 1, "started_ticks": 1, "heartbeat": 1.0}
    atomic_write_json(folder / "lease.json", lease)
    (folder / ".lease.lock").touch()
    state = {"weight/a": next(iter(tensors.values()))}
    write_checkpoint(folder, Snapshot(state, dict(state), Progress(40, 20, 40)))


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with reports, logs and jobs, made by the product's own writers where they are quick."""
    recipe = small_recipe(Path("/no/data"), sparsity={"keep_fractions": [KEPT], "baselines": []}, seed=3)
    folder = tmp_path_factory.mktemp("pristine") / "mine"
    write_run_folder(folder, recipe, {})
    for seed, (stage, counts) in enumerate(STAGES.items()):
        write_stage(folder / stage, recipe, seed, *counts)
    prune = folder / "keep-0.1" / "prune"
    shutil.copytree(folder / "keep-0.1" / "finetune", prune, ignore=shutil.ignore_patterns("evaluate", "honesty.json"))
    (folder / "logs").mkdir()
    record_failure(folder, Failure("a", 0, "pretrain", 3, "RuntimeError: an error"))
    append_to_log(folder, "restarts.log", "attempt a failed: an error\n")
    append_to_log(folder, "worker-0.log", "a line\n")
    jobs = [{"id": "7", "group": "pretrain", "stages": ["pretrain"], "submitted": 1.0}]
    atomic_write_json(folder / "jobs.json", {"jobs": jobs})
    (folder / ".jobs.lock").touch()
    control = ControlFiles.of(folder, "7", "0")
    control.create()
    control.end(1, "it ended")
    StartLog.of(folder).add("pretrain", "7", "0", 1, [])
    (folder / "jobs").mkdir()
    (folder / "jobs" / "7_0_log.out").write_text("a line of the job\n")
    (folder / "report").mkdir()
    for name in ("report.html", "robust_accuracy.csv", "robust_accuracy.png"):
        (folder / "report" / name).write_text("old")
    return folder


STAGE_FILES = (
    *("stage.json", "metrics.jsonl", "model.safetensors", "result.json", "honesty.json", "lease.json", ".lease.lock"),
    *("evaluate/pgd.json", "evaluate/pgd.parquet", "evaluate/square-1.json", "evaluate/square-1.parquet"),
    *("evaluate/progress.json", "step-0000000040/MANIFEST.json", "step-0000000040/progress.json"),
    *("step-0000000040/model.safetensors", "LATEST"),
)
FILES = (
    *("recipe.yaml", "provenance.json", "jobs.json", ".jobs.lock", "control/starts.jsonl", "control/7-0/ended.json"),
    *("logs/failures.jsonl", "logs/restarts.log", "logs/worker-0.log", "jobs/7_0_log.out"),
    *("report/report.html", "report/robust_accuracy.csv"),
    *(f"keep-0.1/finetune/{name}" for name in STAGE_FILES),
)
FOLDERS = ("report", "logs", "control", "jobs", "keep-0.1", "keep-0.1/finetune", "keep-0.1/finetune/evaluate")


def text(content: str) -> Callable[[Path, Path], None]:
    return lambda path, _: [path.unlink(), path.write_text(content)][0]


def cut(path: Path, _: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def random_bytes(path: Path, _: Path) -> None:
    path.write_bytes(np.random.default_rng(0).bytes(max(path.stat().st_size, 64)))


def folder_instead(path: Path, _: Path) -> None:
    path.unlink()
    path.mkdir()


def fifo(path: Path, _: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def link(path: Path, outside: Path) -> None:
    """A link to what looks just like it, elsewhere."""
    shutil.move(path, outside / path.name)
    path.symlink_to(outside / path.name)


DAMAGES: dict[str, Callable[[Path, Path], None]] = {
    "emptied": text(""),
    "cut": cut,
    "random": random_bytes,
    "a list": text('[1, "x", null]\n'),
    "a number": text("7\n"),
    "deeply nested": text("[" * 100_000 + "\n"),
    "nested too deep": text('{"a": ' * 200 + "1" + "}" * 200 + "\n"),
    "5,000 digits": text('{"total_steps": ' + "9" * 5000 + "}\n"),
    "wrong types": text(
        json.dumps({key: {"a": [1]} for key in ("attack", "done", "pid", "images", "layers", "jobs", "code", "kind")})
        + "\n"
    ),
    "not readable": lambda path, _: path.chmod(0),
    "a folder": folder_instead,
    "a FIFO": fifo,
    "a link": link,
}


JSON_DAMAGES = ("a list", "a number", "deeply nested", "nested too deep", "5,000 digits", "wrong types")
CASES = [
    (name, damage)
    for name in FILES
    for damage in DAMAGES
    if damage not in JSON_DAMAGES or name.endswith((".json", ".jsonl", ".yaml"))
]


PARSED = functools.cache(parse_yaml)
"""Reading YAML takes most of the time."""


def stop(*_: object) -> None:
    """Ends `evaluate` once its arguments are checked."""
    raise ValueError("the arguments are checked")


def resume_checks(folder: Path) -> int:
    """What a resume reads and writes before and while workers train, without Ray."""
    check_same_data(folder)
    recipe = run_folder.load_run_recipe(folder)
    folders = [folder / stage.name for stage in stages_of(recipe)]
    [is_done(folder, stage) for stage in stages_of(recipe)]
    leases = Leases(folders)
    try:
        files.make_folder(folder / "logs")
        for stage in folders:
            files.make_folder(stage)
            checkpoint.read_newest_checkpoint(stage)
            truncate_rows(StageFolder(stage).metrics, 40)
            files.open_to_append(StageFolder(stage).metrics).close()
            atomic_write_json(StageFolder(stage).plan, {"total_steps": 40})
        append_to_log(folder, "worker-0.log", "another line\n")
    finally:
        leases.release()
    return 0


def command(name: str, folder: Path) -> int:
    if name == "load":
        pipeline.load(folder, keep_fraction=KEPT)
        return 0
    return resume_checks(folder) if name == "resume" else main([name, str(folder)])


COMMANDS = ("status", "logs", "report", "evaluate", "load", "resume")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pictures, no data files, no SLURM; `evaluate` ends once its arguments and networks are checked."""
    monkeypatch.setattr("pipeline.report.build.draw_accuracy", lambda *_: None)
    monkeypatch.setattr("pipeline.report.build.draw_layers", lambda *_: None)
    monkeypatch.setattr("pipeline.report.chart_style.Chart.svg", lambda _: "")
    monkeypatch.setattr("pipeline.report.page.legend_key", lambda *_, **__: "")
    monkeypatch.setattr(run_folder, "open_data_files", lambda _: {})
    monkeypatch.setattr(run_folder, "check_agreement", lambda *_: None)
    monkeypatch.setattr("pipeline.recipe.file.parse_yaml", PARSED)
    monkeypatch.setattr(evaluate, "_open_images", stop)
    monkeypatch.setattr(status, "ask_squeue", lambda _: ({}, ""))


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    def expired(*_: object) -> None:
        raise AssertionError(f"no answer within {HANG_S} s")

    before = signal.signal(signal.SIGALRM, expired)
    signal.alarm(HANG_S * len(COMMANDS))
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def refuse_opening(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may read everything, so that a file without permissions refuses it only here."""
    if os.geteuid() != 0:
        return
    os_open, io_open, same = os.open, io.open, os.fspath(path)

    def opened(original: Any) -> Any:
        def refuse(file: Any, *arguments: Any, **options: Any) -> Any:
            if not isinstance(file, int) and os.fspath(file) == same:
                raise PermissionError(13, "Permission denied", same)
            return original(file, *arguments, **options)

        return refuse

    monkeypatch.setattr(os, "open", opened(os_open))
    monkeypatch.setattr(io, "open", opened(io_open))
    monkeypatch.setattr("builtins.open", opened(io_open))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def numbers(output: str) -> set[str]:
    """Accuracies and counts in the output of `report` and `status`."""
    return set(re.findall(r"\d+\.\d+(?= \[)|\d+\.\d\d\b|\[\d+\.\d+, \d+\.\d+\]", output))


@pytest.fixture(scope="module")
def true_numbers(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Of the undamaged run; what a report shows when something is missing is among them."""
    run = Path(shutil.copytree(pristine, tmp_path_factory.mktemp("true") / "mine"))
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(status, "ask_squeue", lambda _: ({}, ""))
        return numbers(build_report([run]) + status.status_text([run]))


def check(run: Path, outside: Path, capsys: pytest.CaptureFixture[str], true: set[str]) -> None:
    before = contents(outside)
    for name in COMMANDS:
        capsys.readouterr()
        try:
            code = command(name, run)
        except (ValueError, OSError):  # what `main` words, and no bug's
            code = 2
        out, err = capsys.readouterr()
        assert code in (0, 1, 2), name
        assert "Traceback" not in err, name
        if code != 0 and name not in ("load", "resume"):
            assert err.startswith("error: "), (name, err)
        if name in ("report", "status"):
            assert numbers(out) <= true, name
        assert contents(outside) == before, f"{name} changed what is outside the run"


@pytest.mark.parametrize(("name", "damage"), CASES)
@pytest.mark.usefixtures("quick")
def test_a_damaged_file(
    name: str,
    damage: str,
    pristine: Path,
    tmp_path: Path,
    true_numbers: set[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, outside = Path(shutil.copytree(pristine, tmp_path / "runs" / "mine")), tmp_path / "outside"
    outside.mkdir()
    DAMAGES[damage](run / name, outside)
    if damage == "not readable":
        refuse_opening(run / name, monkeypatch)
    check(run, outside, capsys, true_numbers)


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.usefixtures("quick")
def test_a_folder_that_is_a_link(
    name: str, pristine: Path, tmp_path: Path, true_numbers: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run, outside = Path(shutil.copytree(pristine, tmp_path / "runs" / "mine")), tmp_path / "outside"
    outside.mkdir()
    link(run / name, outside)
    check(run, outside, capsys, true_numbers)


@pytest.mark.usefixtures("quick")
def test_the_undamaged_run_is_accepted_by_every_command(
    pristine: Path, tmp_path: Path, true_numbers: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(pristine, tmp_path / "mine"))
    assert {"75.00", "50.00", "70.00", "42.50"} <= true_numbers
    assert [command(name, run) for name in ("status", "logs", "report", "load", "resume")] == [0] * 5
    capsys.readouterr()
    assert command("evaluate", run) == 2
    assert capsys.readouterr().err == "error: the arguments are checked\n"
