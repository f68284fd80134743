"""Objectives for tests over several techniques, from one set of values of which each technique takes its own."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter

from pipeline.recipe.objective import TECHNIQUES, Objective

VALUES: dict[str, Any] = {"steps": 3, "step_size": "1/20", "sigma": "1/4", "noise_samples": 2}


def own_values(name: str, values: dict[str, Any]) -> dict[str, Any]:
    """The entries of `values` whose keys the technique has."""
    return {key: value for key, value in values.items() if key in TECHNIQUES[name].model_fields}


def objective_of(name: str, **values: Any) -> Objective:
    """The recipe's objective section. Errors: pydantic's ValidationError for a key of another technique."""
    return TypeAdapter(Objective).validate_python({"name": name, **values})


def usual_objective(name: str, **values: Any) -> Objective:
    """`objective_of` with the technique's own `VALUES`, updated with `values`."""
    return objective_of(name, **{**own_values(name, VALUES), **values})
