"""The earlier, flat form of objectives, in which all techniques shared one set of keys. Imports no torch.

The recipe.yaml of older runs has all of these keys, those of other techniques at their defaults. Recipe hashes are
computed from this form, so that the hashes recorded in older runs stay valid.
"""

from __future__ import annotations

import functools
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
"""Key -> default, for every key of the flat form except the name. Keys added to techniques later do not belong here."""
ADDED: dict[str, Any] = {"label_smoothing": 0.0}
"""Keys that techniques got later -> default, at which the hash leaves them out, so that older hashes stay valid."""
ADDED_TO_PHASES: dict[str, Any] = {"ema_epochs": None}
"""The same of phases."""
ADDED_TO_SECTIONS: dict[str, dict[str, Any]] = {
    "sparsity": {"tune": None, "structure": "unstructured", "round_to": 1},
    "model": {"weights_head": "file"},
}
"""The same of sections of the recipe."""
ADDED_TO_METHODS: dict[str, Any] = {"structure": None}
"""The same of `sparsity.baselines`."""
SIGNATURE = ("steps", "step_size", "beta", "noise_magnitude", "sigma", "noise_samples")
"""Keys that every flat objective has and no single technique has together: they identify the form."""


def from_flat(recipe: dict[str, Any], of_a_run: bool = False) -> dict[str, Any]:
    """A recipe's plain values; flat objectives lose the keys of other techniques that are at their default.

    Any other value stays, for validation to refuse; but not in the recipe of a run, in which it never had an effect.
    Objectives that are not flat are left unchanged.
    """
    return _with_objectives(recipe, functools.partial(_own_keys, of_a_run))


def to_flat(recipe: dict[str, Any]) -> dict[str, Any]:
    """A valid recipe's plain values, with every objective in the flat form, and without later keys at their default."""
    recipe = _with_objectives(recipe, lambda objective: DEFAULTS | _without(ADDED, objective))
    sections = {name: _without(added, recipe[name]) for name, added in ADDED_TO_SECTIONS.items() if name in recipe}
    sparsity = sections.get("sparsity")
    if isinstance(sparsity, dict) and isinstance(baselines := sparsity.get("baselines"), list):
        methods = [_without(ADDED_TO_METHODS, method) for method in baselines]
        sections["sparsity"] = sparsity | {"baselines": methods}
    phases = recipe.get("phases")
    if isinstance(phases, dict):
        sections["phases"] = {name: _without(ADDED_TO_PHASES, phase) for name, phase in phases.items()}
    return recipe | sections


def _without(added: dict[str, Any], section: Any) -> Any:
    """A section without the added keys that have their default; anything else is left alone."""
    if not isinstance(section, dict):
        return section
    return {key: value for key, value in section.items() if key not in added or value != added[key]}


def _own_keys(of_a_run: bool, objective: dict[str, Any]) -> dict[str, Any]:
    technique = TECHNIQUES.get(str(objective.get("name")))
    if technique is None or not all(key in objective for key in SIGNATURE):
        return objective
    return {
        key: value
        for key, value in objective.items()
        if key in technique.model_fields or key not in DEFAULTS or (value != DEFAULTS[key] and not of_a_run)
    }


def _with_objectives(recipe: dict[str, Any], change: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    """Apply `change` to the recipe's own objective and to those of phases; anything but a section is left alone."""

    def with_change(section: Any) -> Any:
        objective = section.get("objective") if isinstance(section, dict) else None
        return {**section, "objective": change(objective)} if isinstance(objective, dict) else section

    recipe, phases = with_change(recipe), recipe.get("phases")
    if isinstance(phases, dict):
        recipe = {**recipe, "phases": {name: with_change(phase) for name, phase in phases.items()}}
    return recipe
