"""Recipes as files: YAML in, `key=value` overrides, YAML out, and the hash of what decides a result."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import yaml

from pipeline.recipe.schema import Recipe, RecipeError, parse_recipe

NOT_DECIDING = ("workers", "checkpoint", "tracking", "slurm")
"""Sections that may change when a run is resumed."""


class _Reader(yaml.SafeLoader):
    """SafeLoader that refuses a key written twice, of which YAML's own would silently drop the first, and that leaves
    12:00:00 a text, which YAML 1.1 takes for a number to the base of 60."""

    def resolve(self, kind: type[yaml.Node], value: Any, implicit: Any) -> str:
        tag = super().resolve(kind, value, implicit)
        return "tag:yaml.org,2002:str" if tag.endswith((":int", ":float")) and ":" in value else tag

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                line = key.start_mark.line + 1
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} is there twice, line {line}")
            if isinstance(key, yaml.ScalarNode):
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _parse_yaml(text: str, origin: str) -> Any:
    try:
        return yaml.load(text, _Reader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{origin}: not YAML: {' '.join(str(error).split())}") from None


def apply_overrides(values: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """Return `values` with every 'a.b=value' applied; values are read as YAML. Errors: RecipeError."""
    result = json.loads(json.dumps(values, default=str))  # a copy in which YAML's aliases are no longer one object
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise RecipeError(f"override {override!r}: expected key=value, for example phases.prune.epochs=3")
        value = _parse_yaml(text, f"override {override!r}")
        node = result
        *parents, leaf = key.split(".")
        for part in parents:
            child = node.setdefault(part, {})
            if child is None:
                child = node[part] = {}
            if not isinstance(child, dict):
                raise RecipeError(f"override {override!r}: {part} = {child!r} is a value and has no keys inside")
            node = child
        node[leaf] = value
    return result


def load_recipe(path: str | Path, overrides: list[str] | None = None, cluster: str | Path | None = None) -> Recipe:
    """Read, override and check a recipe file. `cluster` holds defaults for its slurm section. Errors: RecipeError."""
    values = _read_mapping(Path(path), "a recipe is a mapping of sections", "the recipes shipped are in recipes/")
    if cluster is not None:
        profile = _read_mapping(Path(cluster), "a cluster profile is a mapping of slurm keys", "see docs/slurm.md")
        own = values.get("slurm") or {}
        if not isinstance(own, dict):
            raise RecipeError(f"{path}: slurm = {own!r}: expected keys and values, for example slurm: {{nodes: 2}}")
        values["slurm"] = {**profile, **own}
    return parse_recipe(apply_overrides(values, overrides or []), str(path))


def _read_mapping(path: Path, expected: str, hint: str) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read ({error}); {hint}") from None
    values = _parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: {expected}, got {type(values).__name__}")
    return values


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML: every key written out, readable by `load_recipe`."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


def deciding_values(recipe: Recipe) -> dict[str, Any]:
    """The plain values that decide a run's result.

    Workers, checkpoint cadence, tracking, ZeRO stage, compilation and where data files are copied to do not.
    """
    values = {k: v for k, v in recipe.model_dump(mode="json").items() if k not in NOT_DECIDING}
    del values["engine"]["zero_stage"], values["engine"]["mode"]
    del values["data"]["stage_to"]
    return values


def recipe_hash(recipe: Recipe) -> str:
    """SHA-256 of what decides the result."""
    return hashlib.sha256(json.dumps(deciding_values(recipe), sort_keys=True).encode()).hexdigest()
