"""What wandb gets of a stage: config, how it ended, and nothing private."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.distributed import Group
from pipeline.evaluation.result import EvaluationResult
from pipeline.recipe.stages import Stage, stages_of
from pipeline.run.files import atomic_write_json
from pipeline.run.stop import StopRequested
from pipeline.run.tracking.metrics import Tracker
from pipeline.training.context import RunContext
from pipeline.training.hardware import hardware_of
from pipeline.training.non_finite import NonFinite
from pipeline.training.stage import run_stages
from pipeline.training.stage_tracking import log_finished_parts, stage_tracker, summary_of
from tests.support.small_recipe import small_recipe
from tests.support.wandb_files import recorded
from tests.unit.report.test_report import evaluation

pytestmark = pytest.mark.usefixtures("no_wandb_account")
SECRET = "hunter2-hunter2-hunter2"
HOST = "private-node"


def make_run(folder: Path, **sections: Any) -> RunContext:
    """A run directory as the command line makes it, on data that is not read here."""
    slurm = {"setup": [f"export WANDB_API_KEY={SECRET}"], "nodes": 2}
    recipe = small_recipe(folder / "data", tracking={"wandb": "offline"}, slurm=slurm, **sections)
    run = folder / "demo"
    run.mkdir()
    atomic_write_json(
        run / "provenance.json",
        {
            "command": ["launch", "run", f"--token={SECRET}"],
            "host": HOST,
            "commit": "c" * 40,
            "python": "3.11.1",
            "data_sha256": {"data.train_file": "d" * 64},
            "versions": {"torch": "2.11.0"},
        },
    )
    return RunContext(recipe, run, "token", Group(0, 1, torch.device("cpu")))


def stage_of(context: RunContext, name: str) -> Stage:
    stage = next(stage for stage in stages_of(context.recipe) if stage.name == name)
    context.folder(stage).mkdir(parents=True, exist_ok=True)
    return stage


def test_the_config_is_the_recipe_its_origin_and_the_hardware(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_TEST_SECRET", SECRET)
    context = make_run(tmp_path)
    with stage_tracker(context, stage_of(context, "keep-0.1/finetune")):
        pass
    (run,) = recorded(tmp_path / "demo" / "keep-0.1" / "finetune")
    config = run.config
    recipe: dict[str, Any] = context.recipe.model_dump(mode="json", exclude={"slurm"})
    assert {key: config[key] for key in recipe} == recipe
    assert config["stage"] == {
        "name": "keep-0.1/finetune",
        "phase": "finetune",
        "method": "HYDRA",
        "keep_fraction": 0.1,
        "sparsity": 0.9,
        "parent": "keep-0.1/prune",
    }
    assert config["origin"] == {
        "commit": "c" * 40,
        "python": "3.11.1",
        "data_sha256": {"data.train_file": "d" * 64},
        "versions": {"torch": "2.11.0"},
    }
    hardware = config["hardware"]
    assert (hardware["nodes"], hardware["workers"], hardware["gpus"], hardware["gpu"]) == (1, 1, 0, None)
    assert hardware["processor"]
    assert hardware["processors_per_node"] >= 1
    assert set(config) - set(recipe) <= {"stage", "origin", "hardware", "_wandb"}
    assert run.host == ""
    data = b"".join(path.read_bytes() for path in (tmp_path / "demo").rglob("*.wandb"))
    for text in (SECRET, HOST, "HYDRA_TEST_SECRET"):
        assert text.encode() not in data
    elsewhere = data.replace(str(tmp_path / "data").encode(), b"")  # where the recipe says that data are
    assert str(tmp_path).encode() not in elsewhere
    assert platform.node().encode() not in elsewhere


def test_summaries_are_named_so_that_a_panel_finds_them(tmp_path: Path) -> None:
    context = make_run(tmp_path)
    rng = np.random.default_rng(0)
    facts = evaluation(rng.random(100) < 0.9, rng.random(100) < 0.5, "sha")
    stage = stage_of(context, "keep-0.1/finetune")
    with stage_tracker(context, stage) as tracker:
        assert tracker is not None
        tracker.summary(summary_of(stage, "pgd", EvaluationResult.parse(facts)))
        tracker.summary(summary_of(stage, "autoattack", EvaluationResult.parse(facts | {"attack": "autoattack"})))
    (run,) = recorded(tmp_path / "demo" / "keep-0.1" / "finetune")
    summary = run.summary
    assert (summary["method"], summary["phase"]) == ("HYDRA", "finetune")
    assert (summary["sparsity"], summary["keep_fraction"]) == (0.9, 0.1)
    for kind in ("clean", "robust"):
        accuracy = facts[f"{kind}_accuracy"]
        assert summary[f"{kind}_accuracy"] == accuracy["value"]
        assert summary[f"{kind}_interval/low"] == accuracy["low"]
        assert summary[f"{kind}_interval/high"] == accuracy["high"]
        assert summary[f"test_autoattack/{kind}_accuracy/value"] == accuracy["value"]


def test_each_start_says_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The start before this one trained, finished `test`, and was preempted in AutoAttack."""
    context = make_run(tmp_path, evaluation={"attacks": [{"name": "autoattack"}]})
    stage = stage_of(context, "pretrain")
    folder = context.folder(stage)
    rng = np.random.default_rng(0)
    facts = evaluation(rng.random(100) < 0.9, rng.random(100) < 0.5, "m")
    (folder / "evaluate").mkdir()
    atomic_write_json(folder / "result.json", {"steps": 40, "model_sha256": "m", "mask_sha256": None})
    atomic_write_json(folder / "evaluate" / f"{stage.evaluations[0]}.json", facts)
    sent: list[str] = []
    monkeypatch.setattr(Tracker, "produces", lambda self, artifact, files, metadata: sent.append(artifact))
    monkeypatch.setattr("pipeline.training.stage.check_worker", lambda context: None)
    monkeypatch.setattr("pipeline.training.stage.check_honesty", lambda context, stage: None)
    result = EvaluationResult.parse(facts)
    monkeypatch.setattr(
        "pipeline.training.stage.evaluate_stage", lambda context, stage, labels: iter([(labels[0], result)])
    )
    run_stages(context, [stage])
    assert sent == ["demo-pretrain"]
    (run,) = recorded(folder)
    assert run.summary["robust_accuracy"] == facts["robust_accuracy"]["value"]
    assert run.summary[f"test_{stage.evaluations[1]}/robust_accuracy/value"] == facts["robust_accuracy"]["value"]


@pytest.mark.parametrize(
    ("error", "title", "level"),
    [
        (StopRequested("pretrain stopped on request, with a checkpoint of step 7"), "Run stopped", "WARN"),
        (NonFinite("pretrain: the loss of step 7 is not finite"), "Loss, gradient or weight is not finite", "ERROR"),
        (OSError("disk full"), "Stage failed", "ERROR"),
    ],
)
def test_people_are_told_how_a_stage_ended(tmp_path: Path, error: Exception, title: str, level: str) -> None:
    context = make_run(tmp_path)
    with pytest.raises(type(error)), stage_tracker(context, stage_of(context, "pretrain")):
        raise error
    (run,) = recorded(tmp_path / "demo" / "pretrain")
    ((alert_title, text, alert_level),) = run.alerts
    assert (alert_title, alert_level) == (title, level)
    assert text.startswith("demo: ")
    assert str(error) in text
    assert run.exit_code == 1
    assert "method" not in run.summary


def test_the_last_stage_says_that_the_run_is_done(tmp_path: Path) -> None:
    context = make_run(tmp_path, sparsity={"baselines": []})
    stages = [stage_of(context, stage.name) for stage in stages_of(context.recipe)]
    alerts = []
    for stage in stages:
        folder = context.folder(stage)
        with stage_tracker(context, stage) as tracker:
            facts = {"steps": 40, "model_sha256": "m", "mask_sha256": None}
            (folder / "evaluate").mkdir()
            atomic_write_json(folder / "result.json", facts)
            log_finished_parts(context, stage, tracker)
            for name in stage.evaluations:
                atomic_write_json(folder / "evaluate" / f"{name}.json", {})
        alerts.append(recorded(folder)[0].alerts)
    assert alerts == [[], [], [("Run done", "demo: all 3 stages are done", "INFO")]]


def test_a_tuned_network_says_what_was_chosen_and_what_it_comes_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = make_run(tmp_path, sparsity={"tune": {"finetune_lr": [0.01, 0.03]}, "baselines": []})
    stage = stage_of(context, "keep-0.1/finetune")
    sources: list[str] = []
    produced: dict[str, Any] = {}
    monkeypatch.setattr(Tracker, "uses", lambda self, artifact: sources.append(artifact))
    monkeypatch.setattr(Tracker, "produces", lambda self, artifact, files, metadata: produced.update(metadata))
    tuned = [
        {"stage": trial.stage, "finetune_lr": trial.finetune_lr, "prune_lr": trial.prune_lr}
        | {"held_out_robust_accuracy": trial.finetune_lr * 10, "chosen": trial.finetune_lr == 0.03}
        for trial in stage.trials
    ]
    atomic_write_json(context.folder(stage) / "result.json", {"steps": 40, "model_sha256": "m", "tuned": tuned})
    with stage_tracker(context, stage) as tracker:
        log_finished_parts(context, stage, tracker)
    assert sources == ["demo-keep-0.1-trial-1-finetune", "demo-keep-0.1-trial-2-finetune"]
    assert produced["parent"] == "keep-0.1/trial-2/finetune"
    (run,) = recorded(context.folder(stage))
    facts = {key: run.summary[f"tuned/{key}"] for key in ("trials", "finetune_lr", "prune_lr")}
    assert facts == {"trials": 2, "finetune_lr": 0.03, "prune_lr": 0.05}
    assert run.summary["tuned/held_out_robust_accuracy"] == pytest.approx(0.3)


def test_only_the_first_worker_tracks_and_disabled_is_disabled(tmp_path: Path) -> None:
    context = make_run(tmp_path)
    quiet = context.recipe.model_copy(
        update={"tracking": context.recipe.tracking.model_copy(update={"wandb": "disabled"})}
    )
    stage = stage_of(context, "pretrain")
    with stage_tracker(
        RunContext(quiet, context.run_folder, "token", Group(1, 2, torch.device("cpu"))), stage
    ) as tracker:
        assert tracker is None
    with stage_tracker(RunContext(quiet, context.run_folder, "token", context.group), stage) as tracker:
        assert tracker is not None
        tracker.alert("title", "text", "INFO")
        keep = {"kind": "train", "step": 1}
        tracker.log(keep)
    assert [entry.name for entry in context.folder(stage).iterdir()] == ["metrics.jsonl"]


def test_hardware_tells_models_apart_and_names_no_host() -> None:
    class Three(Group):
        def gather(self, value: Any) -> list[Any]:
            return [("a", "Xeon", 8, "H100"), ("a", "Xeon", 8, "H100"), ("b", "Epyc", 16, "A100")]

    assert hardware_of(Three(0, 3, torch.device("cpu")), 4) == {
        "nodes": 2,
        "workers": 3,
        "threads_per_worker": 4,
        "processor": "Epyc, Xeon",
        "processors_per_node": 16,
        "gpu": "A100, H100",
        "gpus": 3,
    }
