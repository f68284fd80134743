"""Building blocks of recipe sections: a strict base model, and numbers that are exact as written and bounded.

Every number of a recipe is read here, so that arithmetic on it is cheap and it keeps its value: one that would fill
memory (1e999999999), become zero as a float (1e-999999999) or lose digits is an error.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, field_validator


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


def section_of_name(value: Any) -> Any:
    """A section's plain values; its name alone stands for {name: ...}."""
    return {"name": value} if isinstance(value, str) else value


def name_if_default(section: Section) -> Any:
    """The section's plain values, or its name alone if its other keys have their defaults, as in recipes from before it
    had keys."""
    values = section.model_dump(mode="json")
    return values if section.model_dump(exclude={"name"}, exclude_defaults=True) else values["name"]


DIGITS = 28
"""Significant digits that decimal arithmetic keeps."""
EXPONENT = 30
"""Numbers are 0, or of an order of magnitude from -30 to 30, as float32 can hold them."""
LONGEST = 100
"""Characters of a number."""
LARGEST_COUNT = 10**9
LARGEST_SEED = 2**64 - 1
LONGEST_PATH, LONGEST_PART = 4000, 255
"""Bytes of a path and of one of its parts, by Linux's limits; the longer one leaves room for names of our own."""


def exact_decimal(value: Any) -> Decimal | None:
    """The exact number as written; None if it is no finite number. Errors: ValueError if it is out of bounds."""
    text = str(value).strip()
    if len(text) > LONGEST:
        raise ValueError(f"it has {len(text):,} characters; a number has at most {DIGITS} digits")
    try:
        number = Decimal(int(value) if isinstance(value, int) else text)  # of 0x1F, text is kept as written
    except InvalidOperation:
        return None
    if not number.is_finite():
        return None
    digits = "".join(map(str, number.as_tuple().digits)).strip("0")
    if len(digits) > DIGITS:
        raise ValueError(f"it has {len(digits)} significant digits, and {DIGITS} are kept; round it")
    if digits and abs(number.adjusted()) > EXPONENT:
        raise ValueError(f"a number is 0 or between 1e-{EXPONENT} and 1e{EXPONENT}")
    return number


def parse_fraction(value: Any) -> Fraction:
    """'4/255', '0.1' or 0.1 -> the exact number as written. Errors: ValueError."""
    match [exact_decimal(part) for part in str(value).replace(" ", "").split("/")]:
        case [Decimal() as number]:
            return Fraction(number)
        case [Decimal() as numerator, Decimal() as denominator] if denominator:
            return Fraction(numerator) / Fraction(denominator)
    raise ValueError("expected a number or a fraction such as 4/255")


def _parse_share(value: Any, example: str, fits: Callable[[Decimal], bool], rule: str) -> Decimal:
    """The exact number as written. Errors: ValueError, with `rule` if `fits` rejects it."""
    number = exact_decimal(value)
    if number is None:
        raise ValueError(f"expected a decimal such as {example}")
    if not fits(number):
        raise ValueError(rule)
    return number


def _parse_keep_fraction(value: Any) -> Decimal:
    rule = "a keep_fraction is kept / all connections: it must lie in (0, 1]; write 0.1 for 90 % pruned"
    return _parse_share(value, "0.1", lambda number: 0 < number <= 1, rule)


def _parse_extra_fraction(value: Any) -> Decimal:
    rule = "an extra_fraction is extra / all images of a step: it must lie in (0, 1), or be null"
    return _parse_share(value, "0.5", lambda number: 0 < number < 1, rule)


def _check_real(value: Any) -> Any:
    """`value`, for pydantic to convert. Errors: ValueError for a number that is out of bounds."""
    if isinstance(value, (int, float, str)):
        exact_decimal(value)
    return value


def _read_whole(value: Any) -> Any:
    """The exact integer for a number without fractional part, otherwise `value`, for pydantic to refuse."""
    number = exact_decimal(value) if isinstance(value, (int, float, str)) else None
    return value if number is None or number % 1 else int(number)


def _check_seed(seed: int) -> int:
    if seed > LARGEST_SEED:
        raise ValueError(f"PyTorch takes no seed above {LARGEST_SEED}")
    return seed


def _check_path(path: str) -> str:
    if not path or "\0" in path:
        raise ValueError("expected the path of a file or folder")
    encoded = path.encode(errors="surrogateescape")
    if len(encoded) > LONGEST_PATH or any(len(part) > LONGEST_PART for part in encoded.split(b"/")):
        raise ValueError(f"a path has at most {LONGEST_PATH:,} bytes, and each part of it {LONGEST_PART}")
    return path


def divisors(number: int) -> list[int]:
    """The positive divisors of `number`, ascending."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def canonical_decimal(number: Decimal) -> str:
    """The one spelling of a decimal: 0.10 and 1E-1 are both '0.1'. Used in folder names."""
    return format(number.normalize(), "f")


Real = Annotated[float, BeforeValidator(_check_real)]
"""A number whose value as a float is, but for rounding, the one that is written."""

_Whole = Annotated[int, BeforeValidator(_read_whole)]

Count = Annotated[_Whole, Field(le=LARGEST_COUNT)]
"""A number of things, in bounds that no experiment reaches."""

Seed = Annotated[_Whole, Field(ge=0), AfterValidator(_check_seed)]

FilePath = Annotated[str, AfterValidator(_check_path)]
"""A path that file systems can have; it need not exist."""

Pixels = Annotated[Fraction, BeforeValidator(parse_fraction), PlainSerializer(str)]
"""A distance in [0, 1] pixel units, exact: written '4/255' or 0.1."""

KeepFraction = Annotated[Decimal, BeforeValidator(_parse_keep_fraction), PlainSerializer(canonical_decimal)]
"""Kept / all connections, exact as written."""

ExtraFraction = Annotated[Decimal, BeforeValidator(_parse_extra_fraction), PlainSerializer(canonical_decimal)]
"""Extra / all images of a micro-batch, exact as written."""
