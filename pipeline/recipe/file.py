"""Recipes as files: YAML in, `key=value` overrides, YAML out, and the hash of the values that determine a result."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any, ClassVar

from ruamel.yaml import YAML
from ruamel.yaml.constructor import ConstructorError, SafeConstructor
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.representer import SafeRepresenter
from ruamel.yaml.resolver import Resolver, VersionedResolver

from pipeline.recipe.errors import shown
from pipeline.recipe.fields import LONGEST
from pipeline.recipe.flat_objective import from_flat, to_flat
from pipeline.recipe.schema import Recipe, RecipeError, parse_recipe
from pipeline.regular_file import read_regular

NOT_DECIDING = ("workers", "checkpoint", "tracking", "slurm")
"""Sections that may change when a run is resumed."""


class _WrittenInt(int):
    """An integer whose `str` is the text of the file, so that a text key keeps 0123 as written."""

    written: str

    def __str__(self) -> str:
        return self.written


class _WrittenFloat(float):
    """A float whose `str` is the text of the file."""

    written: str

    def __str__(self) -> str:
        return self.written


LONGEST_TEXT = 50_000
"""Characters of a recipe file, or of an override; shipped recipes have 2,000."""
MAX_VALUES = 20_000
"""Keys and values of a recipe once its aliases are copies."""
MAX_DEPTH = 50
"""Sections within sections."""

_MERGE = "tag:yaml.org,2002:merge"
_TYPES = ("null", "bool", "str", "seq", "map")
_RULES = {
    first: [(tag, pattern) for tag, pattern in rules if not tag.endswith((":timestamp", ":value"))]
    for first, rules in Resolver.yaml_implicit_resolvers.items()
}
"""First character of a plain scalar -> (tag, pattern) to try. Dates stay text."""


class _Resolver(VersionedResolver):
    """YAML 1.2, whatever version a %YAML directive asks for."""

    @property
    def processing_version(self) -> tuple[int, int]:
        return 1, 2

    @property
    def versioned_resolver(self) -> dict[Any, Any]:
        return _RULES


class _Constructor(SafeConstructor):
    """Builds JSON's types and nothing else. Errors: ConstructorError for other tags and for duplicate keys."""

    yaml_constructors: ClassVar = {
        tag: construct
        for tag, construct in SafeConstructor.yaml_constructors.items()
        if tag is None or tag.rpartition(":")[2] in _TYPES
    }

    def construct_document(self, node: Node) -> Any:
        """Refuses, before anything is built, a document that aliases make large."""
        if _Sizes().of(node) > MAX_VALUES:
            raise ConstructorError(None, None, f"with its aliases it has more than {MAX_VALUES:,} values", None)
        return super().construct_document(node)

    def construct_written_int(self, node: Any) -> _WrittenInt:
        _refuse_long_number(node)
        number = _WrittenInt(self.construct_yaml_int(node))
        number.written = node.value
        return number

    def construct_written_float(self, node: Any) -> _WrittenFloat:
        _refuse_long_number(node)
        number = _WrittenFloat(self.construct_yaml_float(node))
        number.written = node.value
        return number

    def flatten_mapping(self, node: MappingNode) -> None:
        """Make every key a string, refuse duplicates, then apply the << merges."""
        seen: set[str] = set()
        for key, _ in node.value if getattr(node, "merge", None) is None else ():  # before merging
            if not isinstance(key, ScalarNode):
                raise ConstructorError(None, None, "a key must be a scalar", key.start_mark)
            if key.value in seen:
                raise ConstructorError(None, None, f"duplicate key {key.value!r}", key.start_mark)
            seen.add(key.value)
            if key.tag != _MERGE:
                key.tag = self.resolver.DEFAULT_SCALAR_TAG
        super().flatten_mapping(node)


def _refuse_long_number(node: ScalarNode) -> None:
    if len(node.value) > LONGEST:
        raise ConstructorError(None, None, f"a number of {len(node.value):,} characters", node.start_mark)


class _Sizes:
    """Number of nodes below a node if every alias were a copy; merged mappings count too."""

    def __init__(self) -> None:
        self._known: dict[int, int] = {}

    def of(self, node: Node, depth: int = 0) -> int:
        """Errors: ConstructorError for a node that contains itself, or is nested too deep."""
        if depth > MAX_DEPTH:
            reason = "an alias inside its own anchor, or nested too deep"
            raise ConstructorError(None, None, reason, node.start_mark)
        if id(node) not in self._known:
            inner = node.value if isinstance(node, SequenceNode) else []
            if isinstance(node, MappingNode):
                inner = [one for pair in node.value for one in pair]
            self._known[id(node)] = 1 + sum(self.of(one, depth + 1) for one in inner)
        return self._known[id(node)]


_Constructor.add_constructor("tag:yaml.org,2002:int", _Constructor.construct_written_int)
_Constructor.add_constructor("tag:yaml.org,2002:float", _Constructor.construct_written_float)


class _Representer(SafeRepresenter):
    def represent_float(self, data: float) -> Any:
        """1e-05 as 1.0e-05, which YAML 1.1 reads as a number too."""
        node = super().represent_float(data)
        if "." not in node.value:
            node.value = node.value.replace("e", ".0e")
        return node

    def represent_str(self, data: str) -> Any:
        """2:4 in quotes: in YAML 1.1 it is the number 124, in base 60."""
        style = "'" if data.replace(":", "").isdecimal() and ":" in data else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style)


_Representer.add_representer(float, _Representer.represent_float)
_Representer.add_representer(str, _Representer.represent_str)


def parse_yaml(text: str, origin: str) -> Any:
    """The value of a YAML 1.2 document in JSON's types; aliases become copies.

    Numbers keep their text as `str`. Errors: RecipeError, beginning with `origin`.
    """
    if len(text) > LONGEST_TEXT:
        raise RecipeError(f"{origin}: more than {LONGEST_TEXT:,} characters; is it a recipe?")
    reader = YAML(typ="safe", pure=True)
    reader.Resolver, reader.Constructor = _Resolver, _Constructor
    try:
        return _deep_copy(reader.load(text))
    except RecursionError:
        raise RecipeError(f"{origin}: not YAML: an alias inside its own anchor, or nested too deep") from None
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = "" if mark is None else f", line {mark.line + 1}"
        reason = " ".join(filter(None, [error.context, error.problem]))
        raise RecipeError(f"{origin}: not YAML: {reason}{line}") from None
    except Exception as error:
        # Malformed tags and directives surface as errors of int() and as failed assertions of the reader.
        raise RecipeError(f"{origin}: not YAML: {' '.join(str(error).split())}") from None


def _deep_copy(value: Any) -> Any:
    """A deep copy in which aliases are separate objects."""
    if isinstance(value, dict):
        return {key: _deep_copy(inner) for key, inner in value.items()}
    return [_deep_copy(inner) for inner in value] if isinstance(value, list) else value


def dump_yaml(value: Any) -> str:
    """Plain values as YAML in block style, keys in insertion order."""
    writer, stream = YAML(typ="safe", pure=True), io.StringIO()
    writer.Representer = _Representer
    writer.default_flow_style = writer.allow_unicode = False
    writer.width = LONGEST_TEXT  # a fold within double quotes may add a space to the text
    writer.representer.sort_base_mapping_type_on_output = False
    writer.dump(value, stream)
    return stream.getvalue()


def apply_overrides(values: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """Return `values` with every 'a.b=value' applied; values are read as YAML. Errors: RecipeError."""
    result = _deep_copy(values)
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise RecipeError(f"override {shown(override)}: expected key=value, for example phases.prune.epochs=3")
        value = parse_yaml(text, f"override {shown(override)}")
        node = result
        *parents, leaf = key.split(".")
        for part in parents:
            child = node.setdefault(part, {})
            if child is None:
                child = node[part] = {}
            if not isinstance(child, dict):
                raise RecipeError(f"override {shown(override)}: {part} = {shown(child)} is a value, not a section")
            node = child
        node[leaf] = value
    return result


def load_recipe(path: str | Path, overrides: list[str] | None = None, cluster: str | Path | None = None) -> Recipe:
    """Read, override and validate a recipe file. `cluster`: a file of slurm defaults. Errors: RecipeError."""
    values = _read_mapping(Path(path), "a recipe is a mapping of sections", "shipped recipes are in recipes/")
    values = from_flat(values)
    if cluster is not None:
        profile = _read_mapping(Path(cluster), "a cluster profile is a mapping of slurm keys", "see docs/slurm.md")
        section = values.get("slurm") or {}
        if not isinstance(section, dict):
            raise RecipeError(
                f"{path}: slurm = {shown(section)}: expected keys and values, for example slurm: {{nodes: 2}}"
            )
        values["slurm"] = {**profile, **section}
    return parse_recipe(apply_overrides(values, overrides or []), str(path))


def load_resolved_recipe(path: Path) -> Recipe:
    """Read the recipe.yaml of a run, maybe of an older version: keys without effect that it accepted are no error.

    Errors: RecipeError.
    """
    values = _read_mapping(path, "a recipe is a mapping of sections", "restore it")
    return parse_recipe(from_flat(values, of_a_run=True), str(path), of_a_run=True)


def _read_mapping(path: Path, expected: str, hint: str) -> dict[str, Any]:
    try:
        text = read_regular(path, 4 * LONGEST_TEXT).decode("utf-8")  # at most 4 bytes a character
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror or error}); {hint}") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: cannot be read ({error}); {hint}") from None
    values = parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: {expected}, got {type(values).__name__}")
    return values


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML: every key written out, readable by `load_recipe`."""
    return dump_yaml(recipe.model_dump(mode="json"))


def deciding_values(recipe: Recipe) -> dict[str, Any]:
    """The plain values that determine a run's result, see `_deciding`."""
    return _deciding(recipe.model_dump(mode="json"))


def _deciding(values: dict[str, Any]) -> dict[str, Any]:
    """Without workers, checkpoint cadence, tracking, slurm, ZeRO stage, compilation and where data files are copied."""
    values = {key: value for key, value in values.items() if key not in NOT_DECIDING}
    for section, keys in (("engine", ("zero_stage", "mode")), ("data", ("stage_to",))):
        if isinstance(inner := values.get(section), dict):
            values[section] = {key: value for key, value in inner.items() if key not in keys}
    return values


def recipe_hash(recipe: Recipe) -> str:
    """SHA-256 of the values that determine the result; stable across recipe formats (see `recipe.flat_objective`)."""
    return _hash(deciding_values(recipe))


def file_hash(path: Path) -> str:
    """`recipe_hash` of the keys that a run's recipe.yaml has itself: an older version resolved it, and knew no others.

    Errors: RecipeError.
    """
    return _hash(_deciding(_read_mapping(path, "a recipe is a mapping of sections", "restore it")))


def _hash(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(to_flat(values), sort_keys=True).encode()).hexdigest()
