"""Turns pydantic's errors into messages that name key, value and fix. Imports no torch."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

LONGEST_VALUE = 100
"""Characters of a value that a message repeats."""


def shown(value: Any) -> str:
    """A value as messages have it: shortened, and without line breaks and control characters."""
    text = str(value) if isinstance(value, (int, float, Fraction)) else repr(value)  # numbers as in the file
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 3]}..."


def sections_in(annotation: Any) -> list[type[BaseModel]]:
    """Section classes that a key may hold: one for `Section | None` or a tuple of sections, all members of a union."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for part in get_args(annotation) for section in sections_in(part)]


def _name_of(section: type[BaseModel]) -> str:
    """The tag of a member of a union."""
    return section.model_fields["name"].default


@dataclass(frozen=True)
class _Place:
    """The place in a recipe that an error refers to."""

    key: str
    """Dotted; without the tags that pydantic appends to the key of a union."""
    sections: list[type[BaseModel]]
    """Classes allowed there: none for a plain value, all members of a union unless the error is in one of them."""
    union: list[type[BaseModel]]
    """All members of the union that the section belongs to; empty outside unions."""
    examples: list[Any]
    """Examples that the key's field gives."""


def _place(root: type[BaseModel], location: tuple[Any, ...]) -> _Place:
    keys, sections, union, examples = [], [root], [], []
    for part in location:
        if len(sections) > 1:
            union, sections = sections, [section for section in sections if _name_of(section) == part]
            continue
        keys.append(str(part))
        if isinstance(part, int):  # index into a list of sections
            continue
        field = sections[0].model_fields.get(str(part)) if sections else None
        sections, union = sections_in(field.annotation) if field is not None else [], []
        examples = (field.examples or []) if field is not None else []
    return _Place(".".join(keys) or "recipe", sections, union, examples)


def _unknown_key(holder: _Place, key: str) -> str:
    """Message for a key that the section at `holder` does not have."""
    keys = list(holder.sections[0].model_fields)
    near = difflib.get_close_matches(key, keys, n=1)
    if not holder.union:
        return f"unknown key; did you mean {near[0]!r}?" if near else f"unknown key; known keys: {', '.join(keys)}"
    name, own = _name_of(holder.sections[0]), [one for one in keys if one != "name"]
    owner = f"{name}, which has {', '.join(own) or 'none'}"
    owners = [_name_of(section) for section in holder.union if key in section.model_fields]
    if owners:
        whole = f"{holder.key}={{name: {name}{', ...' if own else ''}}}"
        return f"a key of {', '.join(owners)}, not of {owner}; remove it, or override the section as a whole: {whole}"
    return f"unknown key; did you mean {near[0]!r}?" if near else f"unknown key of {owner}"


def _problem(item: ErrorDetails, root: type[BaseModel]) -> str:
    place, value = _place(root, item["loc"]), item["input"]
    match item["type"]:
        case "extra_forbidden":
            why = _unknown_key(_place(root, item["loc"][:-1]), str(item["loc"][-1]))
            return f"{place.key} = {shown(value)}: {why}"
        case "missing":
            return f"{place.key}: missing; add it{f', for example {place.examples[0]}' if place.examples else ''}"
        case "model_type":
            keys = ", ".join(place.sections[0].model_fields)
            return f"{place.key} = {shown(value)}: expected a section with the keys {keys}"
        case "union_tag_invalid" | "union_tag_not_found":
            names = ", ".join(_name_of(section) for section in place.sections)
            if not isinstance(value, dict):
                return f"{place.key} = {shown(value)}: expected a section whose name is one of {names}"
            if "name" not in value:
                return f"{place.key}.name: missing; add it, one of {names}"
            return f"{place.key}.name = {shown(value['name'])}: expected one of {names}"
        case "tuple_type":
            return f"{place.key} = {value!r}: expected a list; write [{value}]"
    message = item["msg"].removeprefix("Value error, ")
    if isinstance(value, dict):
        return f"{place.key}: {message}"
    return f"{place.key} = {shown(value)}: {message}"


def explain(error: ValidationError, root: type[BaseModel], origin: str) -> str:
    """One line per problem: key, value and fix."""
    return "\n".join(f"{origin}: {_problem(item, root)}" for item in error.errors(include_url=False))
