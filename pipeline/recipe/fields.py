"""Building blocks of recipe sections: a strict base model and exact numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    PlainSerializer,
    field_validator,
)


class Section(BaseModel):
    """A recipe section: immutable; unknown keys, NaN and infinity are errors."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        protected_namespaces=(),
        allow_inf_nan=False,
        coerce_numbers_to_str=True,  # as written in the file: `name: 0123`
    )

    @field_validator("*", mode="before")
    @classmethod
    def _not_bool(cls, value: Any) -> Any:
        if isinstance(value, bool):  # a subclass of int: `epochs: true` would be one epoch
            raise ValueError("no key of a recipe takes true or false")
        return value


def parse_fraction(value: Any) -> Fraction:
    """'4/255', '0.1' or 0.1 -> the exact number as written. Errors: ValueError."""
    try:
        return Fraction(str(value).replace(" ", ""))
    except (ValueError, ZeroDivisionError):
        raise ValueError("expected a number or a fraction such as 4/255") from None


def _parse_share(value: Any, example: str, fits: Callable[[Decimal], bool], rule: str) -> Decimal:
    """The exact number as written. Errors: ValueError, with `rule` if `fits` rejects it or it is not finite."""
    try:
        number = Decimal(str(value))
    except InvalidOperation:
        raise ValueError(f"expected a decimal such as {example}") from None
    if not number.is_finite() or not fits(number):
        raise ValueError(rule)
    return number


def _parse_keep_fraction(value: Any) -> Decimal:
    rule = "a keep_fraction is kept / all connections: it must lie in (0, 1]; write 0.1 for 90 % pruned"
    return _parse_share(value, "0.1", lambda number: 0 < number <= 1, rule)


def _parse_extra_fraction(value: Any) -> Decimal:
    rule = "an extra_fraction is extra / all images of a step: it must lie in (0, 1), or be null"
    return _parse_share(value, "0.5", lambda number: 0 < number < 1, rule)


def canonical_decimal(number: Decimal) -> str:
    """The one spelling of a decimal: 0.10 and 1E-1 are both '0.1'. Used in folder names."""
    return format(number.normalize(), "f")


Pixels = Annotated[Fraction, BeforeValidator(parse_fraction), PlainSerializer(str)]
"""A distance in [0, 1] pixel units, exact: written '4/255' or 0.1."""

KeepFraction = Annotated[Decimal, BeforeValidator(_parse_keep_fraction), PlainSerializer(canonical_decimal)]
"""Kept / all connections, exact as written."""

ExtraFraction = Annotated[Decimal, BeforeValidator(_parse_extra_fraction), PlainSerializer(canonical_decimal)]
"""Extra / all images of a micro-batch, exact as written."""


DECIDED_ELSEWHERE = {
    "train_batch_size": "batch.batch_per_step decides it",
    "train_micro_batch_size_per_gpu": "batch.micro_batch decides it",
    "gradient_accumulation_steps": "batch and workers.count decide it",
    "elasticity": "batch and workers.count decide it",
    "optimizer": "phases.* decide it",
    "scheduler": "phases.*.schedule decides it",
    "fp16": "engine.precision decides it",
    "bf16": "engine.precision decides it",
    "torch_autocast": "engine.precision decides it",
    "amp": "engine.precision decides it",
    "data_types": "engine.precision decides it",
    "zero_allow_untested_optimizer": "the engine sets it",
    "gradient_clipping": "gradients are not clipped here",
}
"""Keys that are refused in a `deepspeed:` section -> why."""


def _check_deepspeed(options: dict[str, Any]) -> dict[str, Any]:
    for key, why in DECIDED_ELSEWHERE.items():
        if key in options:
            raise ValueError(f"{key} = {options[key]!r}: {why}; remove this key")
    zero = options.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise ValueError(f"zero_optimization = {zero!r}: expected a section; engine.zero_stage turns ZeRO on")
    return json.loads(json.dumps(options))  # drops the number types of recipe.file


DeepSpeedOptions = Annotated[dict[str, Any], AfterValidator(_check_deepspeed)]
"""Options passed to DeepSpeed unchanged."""
