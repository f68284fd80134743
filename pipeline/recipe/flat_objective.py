"""The flat form of objectives, from the time when all techniques shared one set of keys. No torch here.

Runs of that time have it in their recipe.yaml: all keys, those of other techniques at their defaults. And hashes of
recipes are of this form, so that a run keeps the hash that its files name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pipeline.recipe.objective import TECHNIQUES

DEFAULTS: dict[str, Any] = {
    "steps": 1,
    "step_size": None,
    "eps_warmup": 0.0,
    "beta": 6.0,
    "replays": 4,
    "overfitting_guard": 0.5,
    "noise_magnitude": 2.0,
    "sigma": None,
    "noise_samples": 1,
    "eps_ramp": 0.6,
    "kappa_start": 1.0,
    "kappa_end": 0.5,
    "crown_start": 1.0,
    "crown_end": 0.0,
    "robust_samples": 1,
    "robust_probability": 0.8,
    "robust_weight_start": 0.1,
    "robust_weight_end": 50.0,
}
"""Key -> default, of every key that the form had besides the name. A key that a technique gets later is not in it."""
MARKS = ("steps", "step_size", "beta", "noise_magnitude", "sigma", "noise_samples")
"""Keys that the form always had, and no technique has together."""


def from_flat(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe's plain values, its flat objectives without the keys of other techniques that are at their default.

    A key that is not stays, for the check to refuse. Objectives in any other form are as they were.
    """
    return _with_objectives(recipe, _own_keys)


def to_flat(recipe: dict[str, Any]) -> dict[str, Any]:
    """A checked recipe's plain values, with every objective in the flat form."""
    return _with_objectives(recipe, lambda objective: DEFAULTS | objective)


def _own_keys(objective: dict[str, Any]) -> dict[str, Any]:
    technique = TECHNIQUES.get(str(objective.get("name")))
    if technique is None or not all(key in objective for key in MARKS):
        return objective
    return {
        key: value
        for key, value in objective.items()
        if key in technique.model_fields or key not in DEFAULTS or value != DEFAULTS[key]
    }


def _with_objectives(recipe: dict[str, Any], change: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    """The recipe's own objective changed, and those of single phases; nothing that is not a section."""

    def changed(section: Any) -> Any:
        objective = section.get("objective") if isinstance(section, dict) else None
        return {**section, "objective": change(objective)} if isinstance(objective, dict) else section

    recipe, phases = changed(recipe), recipe.get("phases")
    if isinstance(phases, dict):
        recipe = {**recipe, "phases": {name: changed(phase) for name, phase in phases.items()}}
    return recipe
