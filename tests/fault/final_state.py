"""What a finished run left, for comparing two runs bit for bit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from pipeline.recipe.schema import Recipe
from pipeline.recipe.stages import stages_of
from pipeline.run import checkpoint
from pipeline.run.files import read_json


def _rows(stage: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "timing"} for row in rows]


def final_state(folder: Path, stages: Sequence[str]) -> dict[str, Any]:
    """Everything of a run that must repeat: weights, scores, momenta, metrics, verdicts."""
    state: dict[str, Any] = {}
    for name in stages:
        stage = folder / name
        snapshot = checkpoint.read_newest_checkpoint(stage)
        assert snapshot is not None
        assert snapshot.progress.finished
        for part in (load_file(stage / "model.safetensors"), snapshot.model, snapshot.train_state):
            state |= {f"{name}: {key}": tensor for key, tensor in part.items()}
        state[f"{name}: metrics"] = _rows(stage)
        state[f"{name}: result"] = read_json(stage / "result.json")
        if (stage / "evaluate").exists():
            for evaluation in (stage / "evaluate").glob("*.json"):
                state[f"{name}: {evaluation.stem} verdicts"] = read_json(evaluation)
    assert any("score/" in key for key in state)
    return state


def differences(one: dict[str, Any], two: dict[str, Any]) -> list[str]:
    """What two runs do not have in common, bit for bit."""

    def same(a: Any, b: Any) -> bool:
        return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b

    everything = one.keys() | two.keys()
    return sorted(key for key in everything if key not in one or key not in two or not same(one[key], two[key]))


def unlike(recipe: Recipe, one: Path, other: Path) -> list[str]:
    """What two finished runs of a recipe do not have in common, bit for bit, over all its stages."""
    stages = [stage.name for stage in stages_of(recipe)]
    return differences(final_state(one, stages), final_state(other, stages))
