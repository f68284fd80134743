"""Masks against brute-force implementations of their definitions."""

from __future__ import annotations

import itertools
import math
from decimal import Decimal
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.models.pruning.allocation import layer_masks
from pipeline.models.pruning.topk import kept_count, topk_mask, topk_masks

TENTH = Decimal("0.1")


# --- how many, and which ---------------------------------------------------------------------------------------------


@given(st.integers(1, 10**7), st.decimals("0.0001", "1", places=4))
def test_kept_count_is_exact(n: int, keep_fraction: Decimal) -> None:
    ten_thousandths = int(keep_fraction * 10_000)
    pruned = ((10_000 - ten_thousandths) * n) // 10_000
    assert kept_count(n, keep_fraction) == n - pruned
    assert 1 <= kept_count(n, keep_fraction) <= n


@pytest.mark.parametrize(
    ("n", "keep_fraction", "kept"),
    [(1000, "0.1", 100), (1000, "0.9", 900), (9408, "0.01", 95), (1, "0.01", 1), (7, "1", 7), (1000, "0.10", 100)],
)
def test_kept_count_examples(n: int, keep_fraction: str, kept: int) -> None:
    assert kept_count(n, Decimal(keep_fraction)) == kept


@pytest.mark.parametrize("keep_fraction", ["0", "-0.1", "1.01"])
def test_kept_count_refuses_an_invalid_fraction(keep_fraction: str) -> None:
    with pytest.raises(ValueError, match=r"must lie in \(0, 1\]"):
        kept_count(10, Decimal(keep_fraction))


def brute_force_mask(score: Tensor, kept: int) -> Tensor:
    """The definition: sort logical indices by descending |score|, then by ascending index, and keep the first."""
    indices = list(itertools.product(*(range(size) for size in score.shape)))
    ranked = sorted(range(len(indices)), key=lambda i: (-abs(score[indices[i]].item()), i))
    mask = torch.zeros(score.shape, dtype=torch.bool)
    for i in ranked[:kept]:
        mask[indices[i]] = True
    return mask


@st.composite
def scores_in_any_layout(draw: st.DrawFn) -> Tensor:
    shape = draw(st.one_of(st.tuples(*[st.integers(1, 4)] * 4), st.tuples(*[st.integers(1, 8)] * 2)))
    # Few distinct values, so that there are ties, including -0.0 and 0.0.
    values = st.one_of(st.sampled_from([-2.0, -1.0, -0.0, 0.0, 1.0, 2.0]), st.floats(-3, 3, width=32))
    count = math.prod(shape)
    score = torch.tensor(draw(st.lists(values, min_size=count, max_size=count)), dtype=torch.float32).view(shape)
    layout = draw(st.sampled_from(["contiguous", "channels_last", "transposed", "sliced"]))
    if layout == "channels_last" and len(shape) == 4:
        return score.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return score.transpose(0, 1)
    if layout == "sliced":
        return torch.stack([score, score + 1], dim=-1)[..., 0]
    return score


@given(scores_in_any_layout(), st.data())
def test_topk_mask_is_the_brute_force_one(score: Tensor, data: st.DataObject) -> None:
    kept = data.draw(st.integers(0, score.numel()))
    mask = topk_mask(score, kept)
    assert mask.dtype == torch.bool
    assert mask.shape == score.shape
    assert torch.equal(mask, brute_force_mask(score, kept))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kept", [1, 1000, 99_999, 100_000])
def test_topk_mask_is_the_same_on_a_gpu(kept: int) -> None:
    score = torch.randn(100, 1000).round(decimals=2)
    assert torch.equal(topk_mask(score.cuda(), kept).cpu(), topk_mask(score, kept))


class _Waits(TorchDispatchMode):
    """Counts operations for which a GPU is waited for: each moves a number, or finds out a size."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.name()
        self.count += name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal")
        return function(*args, **(kwargs or {}))


def test_a_gpu_is_waited_for_once_whatever_the_number_of_layers() -> None:
    """The one transfer is of all counts, as a list, which on a CPU is no operation."""
    scores = [torch.randn(4, 5, generator=torch.Generator().manual_seed(n)) for n in range(9)]
    with _Waits() as waits:
        masks = topk_masks(scores, [3] * 9)
    assert waits.count == 0
    for score, mask in zip(scores, masks, strict=True):
        assert torch.equal(mask, brute_force_mask(score, 3))


def test_the_layer_that_cannot_be_ranked_is_named() -> None:
    scores = {"first": torch.ones(4), "second": torch.tensor([1.0, math.nan])}
    with pytest.raises(ValueError, match=r"^second: scores contain NaN"):
        layer_masks(scores, {"first": 2, "second": 1})


def test_topk_mask_of_infinities_keeps_them_first() -> None:
    score = torch.tensor([1.0, -math.inf, 2.0, math.inf])
    assert topk_mask(score, 3).tolist() == [False, True, True, True]


@pytest.mark.parametrize("kept", [1, 3])
def test_topk_mask_refuses_nan(kept: int) -> None:
    with pytest.raises(ValueError, match="NaN"):
        topk_mask(torch.tensor([1.0, math.nan, math.inf]), kept)


@pytest.mark.parametrize("kept", [-1, 4])
def test_topk_mask_refuses_an_impossible_count(kept: int) -> None:
    with pytest.raises(ValueError, match=f"cannot keep {kept} of 3"):
        topk_mask(torch.ones(3), kept)
