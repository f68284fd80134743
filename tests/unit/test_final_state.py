"""What compares a disturbed run with an undisturbed one sees every difference there can be."""

from __future__ import annotations

from typing import Any

import torch

from tests.fault.final_state import differences


def state() -> dict[str, Any]:
    return {
        "prune: score/conv": torch.linspace(-1, 1, 12).reshape(3, 4),
        "prune: metrics": [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}],
        "prune: result": {"steps": 2},
    }


def test_one_bit_and_whatever_is_missing_are_seen() -> None:
    one = state()
    assert differences(one, state()) == []
    for key in one:
        assert differences(one, {name: value for name, value in one.items() if name != key}) == [key]
        assert differences({name: value for name, value in one.items() if name != key}, one) == [key]
    other = state()
    other["prune: score/conv"].view(torch.int32)[2, 1] ^= 1
    assert differences(one, other) == ["prune: score/conv"]
    other["prune: metrics"][1]["loss"] += 2.0**-54
    assert differences(one, other) == ["prune: metrics", "prune: score/conv"]
