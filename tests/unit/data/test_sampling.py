"""Sample order and crops: pure functions of (ids, seed, epoch), equal for every world size, resumable at every step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torchvision.transforms import RandomResizedCrop

from pipeline import rng
from pipeline.data.loading import sampling


def pvalue(result: Any) -> float:
    return result.pvalue


def whole_crops(ids, _epoch):
    return sampling.whole_image_crops(np.full(len(ids), 8), np.full(len(ids), 8))


def plan(train_ids, seed=3, start=0, stop=7, batch=8, micro=2, rank=0, world=1, crops=whole_crops, extra=(), share=0):
    return list(
        sampling.training_plan(
            train_ids, crops, seed=seed, start_step=start, stop_step=stop,
            batch_per_step=batch, micro_batch=micro, rank=rank, world=world,
            extra_ids=np.array(extra, np.int64), extra_per_step=share,
        )
    )  # fmt: skip


def same(left, right):
    return len(left) == len(right) and all(
        np.array_equal(a, b) for x, y in zip(left, right, strict=True) for a, b in zip(x, y, strict=True)
    )


@given(num_samples=st.integers(1, 400), data=st.data())
def test_held_out_images_and_training_images_partition_the_file(num_samples, data):
    validation_images = data.draw(st.integers(0, num_samples - 1))
    train, validation = sampling.held_out(num_samples, validation_images)
    assert len(validation) == validation_images
    assert train.dtype == validation.dtype == np.int64
    assert np.array_equal(np.sort(np.concatenate([train, validation])), np.arange(num_samples))
    assert (np.diff(train) > 0).all()
    assert (np.diff(validation) > 0).all()


def test_held_out_images_are_spread_over_the_file_and_stay_the_same():
    train, validation = sampling.held_out(60_000, 2_000)
    again_train, again_validation = sampling.held_out(60_000, 2_000)
    assert np.array_equal(train, again_train)
    assert np.array_equal(validation, again_validation)
    assert pvalue(stats.kstest(validation / 60_000, "uniform")) > 0.01
    fewer = sampling.held_out(60_000, 500)[1]
    assert set(fewer) <= set(validation)


@pytest.mark.parametrize("validation_images", [10, 11, -1])
def test_holding_out_everything_is_refused(validation_images):
    with pytest.raises(ValueError, match=rf"validation_images {validation_images} .* 10 images"):
        sampling.held_out(10, validation_images)


def test_a_training_subset_is_sorted_fixed_and_nested():
    train, _ = sampling.held_out(1_000, 100)
    small, large = sampling.train_subset(train, 50), sampling.train_subset(train[::-1], 200)
    assert len(small) == 50
    assert set(small) <= set(large) <= set(train)
    assert (np.diff(small) > 0).all()
    assert np.array_equal(sampling.train_subset(train, None), train)
    with pytest.raises(ValueError, match="train_images 901: 900 images"):
        sampling.train_subset(train, 901)


@given(count=st.integers(1, 300), seed=st.integers(0, 2**31), epoch=st.integers(0, 1000))
def test_an_epoch_visits_each_id_once(count, seed, epoch):
    ids = np.arange(count, dtype=np.int64) * 3 + 1
    order = sampling.epoch_order(ids, seed, epoch)
    assert np.array_equal(np.sort(order), ids)
    assert np.array_equal(order, sampling.epoch_order(ids, seed, epoch))


def test_seeds_and_epochs_are_different_orders():
    ids = np.arange(500, dtype=np.int64)
    orders = {(s, e): sampling.epoch_order(ids, s, e).tobytes() for s in range(4) for e in range(4)}
    assert len(set(orders.values())) == 16
    crops = {(s, e): sampling.pad_crops(ids, 28, s, e, True).tobytes() for s in range(4) for e in range(4)}
    assert len(set(crops.values())) == 16


def test_an_order_does_not_depend_on_the_position_in_the_file():
    ids = np.arange(4_000, dtype=np.int64)
    rank = np.argsort(sampling.epoch_order(ids, 0, 0))
    assert abs(np.corrcoef(ids, rank)[0, 1]) < 0.05


@given(
    micro=st.integers(1, 4), per_rank=st.integers(1, 3), steps=st.integers(1, 9), extra=st.integers(0, 20),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_every_world_size_sees_the_same_micro_batches(micro, per_rank, steps, extra, seed):
    batch = micro * per_rank * 4
    ids = np.arange(batch + extra, dtype=np.int64)
    common = {"seed": seed, "stop": steps, "batch": batch, "micro": micro}
    alone = plan(ids, **common)
    for world in (2, 4):
        ranks = [plan(ids, rank=rank, world=world, **common) for rank in range(world)]
        own = len(ranks[0]) // steps
        joined = [ranks[r][s * own + m] for s in range(steps) for r in range(world) for m in range(own)]
        assert same(joined, alone)


def test_a_plan_may_start_at_every_step():
    ids, _ = sampling.held_out(30, 3)
    crops = sampling.training_crops("random_resized_crop", np.arange(30) + 20, np.arange(30) + 31, 16, seed=3)
    full = plan(ids, crops=crops, stop=10)
    for start in range(11):
        assert same(plan(ids, crops=crops, start=start, stop=10), full[start * 4 :])
    assert not same(plan(ids, crops=crops, seed=4, stop=10), full)


def test_an_epoch_of_a_plan_is_its_order_without_the_last_partial_batch():
    ids = np.arange(30, dtype=np.int64)
    epoch_ids = np.concatenate([batch for batch, _ in plan(ids, start=3, stop=6)])
    assert np.array_equal(epoch_ids, sampling.epoch_order(ids, 3, 1)[:24])


def test_impossible_plans_are_refused_at_the_call():
    ids = np.arange(30, dtype=np.int64)
    for options, words in (
        ({"batch": 32}, "batch_per_step 32 is more than the 30 training images: no step is full"),
        ({"world": 3}, "batch_per_step 8 is not divisible by micro_batch 2 times 3 workers"),
        ({"extra": [30], "share": 3}, "3 extra images of 8 cannot be split evenly among micro-batches of 2"),
        ({"extra": [30], "share": 8}, "8 extra images of 8 cannot be split evenly"),
        ({"share": 4}, "extra_fraction: the training file holds no extra images; write it with .* --extra FILE"),
        ({"batch": 64, "extra": [30], "share": 32}, "the 30 training images and the 32 extra ones per step: no step"),
    ):
        with pytest.raises(ValueError, match=words):
            plan(ids, **options)


@given(
    own=st.integers(1, 3), share=st.integers(1, 3), micro_batches=st.integers(1, 4), train=st.integers(12, 40),
    extra=st.integers(1, 30), seed=st.integers(0, 99),
)  # fmt: skip
def test_every_micro_batch_has_its_share_of_extra_images_and_both_kinds_keep_their_order(
    own, share, micro_batches, train, extra, seed
):
    """Compared with both complete sequences: epochs of the training images, passes over the extra ones."""
    ids, extra_ids = np.arange(train, dtype=np.int64) * 2, np.arange(extra, dtype=np.int64) + 1000

    def numbered_crops(ids, number):
        return np.stack([ids, np.full_like(ids, number), *[ids * 0] * 3], axis=1).astype(np.int32)

    batch, per_epoch = (own + share) * micro_batches, train // (own * micro_batches)
    stop = 2 * per_epoch + 1
    batches = plan(
        ids, seed, 0, stop, batch, own + share, crops=numbered_crops, extra=extra_ids, share=share * micro_batches
    )  # fmt: skip
    assert len(batches) == stop * micro_batches
    for batch_ids, crops in batches:
        assert np.array_equal(crops[:, 0], batch_ids)
        assert (batch_ids[:own] < 1000).all()
        assert (batch_ids[own:] >= 1000).all()
        assert len(batch_ids) == own + share
    epoch_images = per_epoch * own * micro_batches
    expected = np.concatenate([sampling.epoch_order(ids, seed, epoch)[:epoch_images] for epoch in range(3)])
    rows = np.concatenate([np.stack([batch_ids, crops[:, 1]], 1)[:own] for batch_ids, crops in batches])
    assert np.array_equal(rows[:, 0], expected[: len(rows)])
    assert np.array_equal(rows[:, 1], np.arange(len(rows)) // epoch_images)
    rows = np.concatenate([np.stack([batch_ids, crops[:, 1]], 1)[own:] for batch_ids, crops in batches])
    assert np.array_equal(rows[:, 1], np.arange(len(rows)) // extra)
    for begin in range(0, len(rows) - extra + 1, extra):
        assert np.array_equal(np.sort(rows[begin : begin + extra, 0]), extra_ids)


@settings(max_examples=30)
@given(extra=st.integers(1, 40), start=st.integers(0, 12), seed=st.integers(0, 99))
def test_a_plan_with_extra_images_is_the_same_from_every_step_and_for_every_world_size(extra, start, seed):
    options = {"seed": seed, "stop": 12, "batch": 16, "micro": 4, "extra": np.arange(extra) + 50, "share": 4}
    ids = np.arange(50, dtype=np.int64)
    crops = sampling.training_crops("pad_crop_flip", np.full(200, 8), np.full(200, 8), 8, seed)
    whole = plan(ids, crops=crops, **options)
    assert same(plan(ids, crops=crops, start=start, **options), whole[4 * start :])
    for world in (2, 4):
        ranks = [plan(ids, crops=crops, rank=rank, world=world, **options) for rank in range(world)]
        own = 4 // world
        assert same([ranks[r][s * own + m] for s in range(12) for r in range(world) for m in range(own)], whole)


def test_passes_over_extra_images_are_different_orders():
    ids, extra = np.arange(8, dtype=np.int64), np.arange(300) + 8
    orders = set()
    for seed in range(3):
        extra_ids = np.concatenate([batch_ids[1:] for batch_ids, _ in plan(ids, seed, 0, 225, extra=extra, share=4)])
        orders |= {extra_ids[begin : begin + 300].tobytes() for begin in range(0, 900, 300)}
    assert len(orders) == 9


def test_pad_crops_move_uniformly_by_four_pixels_each_way():
    ids = np.arange(40_000, dtype=np.int64)
    crops = sampling.pad_crops(ids, 28, 0, 5, True)
    assert crops.dtype == np.int32
    assert (crops[:, 2:4] == 28).all()
    for column in (0, 1):
        values, counts = np.unique(crops[:, column], return_counts=True)
        assert values.tolist() == list(range(-4, 5))
        assert pvalue(stats.chisquare(counts)) > 0.01
    assert pvalue(stats.binomtest(int(crops[:, 4].sum()), len(ids), 0.5)) > 0.01
    assert np.abs(np.corrcoef(crops[:, [0, 1, 4]].T) - np.eye(3)).max() < 0.02
    assert not sampling.pad_crops(ids, 28, 0, 5, False)[:, 4].any()


SHAPES = [(375, 500), (224, 224), (500, 180), (40, 900), (900, 40), (9, 7)]


@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_random_resized_crops_have_torchvisions_distribution(height, width):
    ids = np.arange(4_000, dtype=np.int64)
    ours = sampling.random_resized_crops(ids, np.full(len(ids), height), np.full(len(ids), width), seed=1, epoch=2)
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in ids])

    assert (ours[:, :2] >= 0).all()
    assert (ours[:, 2:4] > 0).all()
    assert (ours[:, 0] + ours[:, 2] <= height).all()
    assert (ours[:, 1] + ours[:, 3] <= width).all()
    for statistic in (
        lambda c: c[:, 2] * c[:, 3] / (height * width),
        lambda c: np.log(c[:, 3] / c[:, 2]),
        lambda c: c[:, 0] / np.maximum(height - c[:, 2], 1),
        lambda c: c[:, 1] / np.maximum(width - c[:, 3], 1),
    ):
        assert pvalue(stats.ks_2samp(statistic(ours), statistic(theirs))) > 0.001
    assert pvalue(stats.binomtest(int(ours[:, 4].sum()), len(ids), 0.5)) > 0.001


def test_the_distribution_test_detects_a_wrong_distribution():
    """The same comparison fails if the aspect ratio is uniform instead of log-uniform."""
    uniforms = rng.uniforms(rng.sample_keys(np.arange(4_000), 0, "test"), 2)
    log_uniform = np.log(3 / 4) + uniforms[:, 0] * (np.log(4 / 3) - np.log(3 / 4))
    uniform = np.log(3 / 4 + uniforms[:, 1] * (4 / 3 - 3 / 4))
    assert pvalue(stats.ks_2samp(log_uniform, uniform)) < 0.001


@pytest.mark.parametrize(("height", "width"), [(10, 1000), (1000, 10), (1, 1), (1, 50)])
def test_extreme_shapes_fall_back_to_torchvisions_central_crop(height, width):
    ids = np.arange(50, dtype=np.int64)
    ours = sampling.random_resized_crops(ids, np.full(50, height), np.full(50, width), seed=0, epoch=0)
    theirs = RandomResizedCrop.get_params(torch.empty(3, height, width), [0.08, 1.0], [3 / 4, 4 / 3])
    assert {tuple(crop) for crop in ours[:, :4].tolist()} == {theirs}


@settings(max_examples=30)
@given(seed=st.integers(0, 99), epoch=st.integers(0, 99), data=st.data())
def test_a_crop_does_not_depend_on_its_neighbours(seed, epoch, data):
    ids = np.array(data.draw(st.lists(st.integers(0, 10**6), min_size=1, max_size=20)), np.int64)
    heights, widths = 100 + ids % 300, 100 + ids % 200
    together = sampling.random_resized_crops(ids, heights, widths, seed, epoch)
    padded = sampling.pad_crops(ids, 32, seed, epoch, True)
    for n in range(len(ids)):
        one = slice(n, n + 1)
        assert np.array_equal(
            sampling.random_resized_crops(ids[one], heights[one], widths[one], seed, epoch)[0], together[n]
        )
        assert np.array_equal(sampling.pad_crops(ids[one], 32, seed, epoch, True)[0], padded[n])


def test_center_crops_are_the_centre_of_torchvisions_resize_and_center_crop():
    crops = sampling.center_crops(np.array([256, 512, 300, 224]), np.array([256, 256, 500, 1000]), 224)
    assert crops.tolist() == [
        [16, 16, 224, 224, 0],
        [144, 16, 224, 224, 0],
        [19, 119, 262, 262, 0],
        [14, 402, 196, 196, 0],
    ]


@given(height=st.integers(1, 2000), width=st.integers(1, 2000), size=st.integers(1, 300))
def test_center_crops_stay_inside(height, width, size):
    top, left, crop_height, crop_width, _ = sampling.center_crops(np.array([height]), np.array([width]), size)[0]
    assert top >= 0
    assert left >= 0
    assert crop_height == crop_width >= 1
    assert top + crop_height <= height
    assert left + crop_width <= width
    assert abs((height - crop_height) - 2 * top) <= 1


def test_augmentations_are_chosen_by_name():
    square, tall, ids = np.full(5, 28), np.full(5, 40), np.arange(5)
    flipped = sampling.training_crops("pad_crop_flip", square, square, 28, seed=1)(ids, 2)
    assert np.array_equal(flipped, sampling.pad_crops(ids, 28, 1, 2, True))
    plain = sampling.training_crops("pad_crop", square, square, 28, seed=1)(ids, 2)
    assert np.array_equal(plain, sampling.pad_crops(ids, 28, 1, 2, False))
    whole = sampling.training_crops("none", tall, square, 28, seed=1)(ids, 2)
    assert np.array_equal(whole, sampling.evaluation_crops("none", tall, square, 28))
    assert whole.tolist() == [[0, 0, 40, 28, 0]] * 5
    assert np.array_equal(
        sampling.evaluation_crops("random_resized_crop", tall, square, 28), sampling.center_crops(tall, square, 28)
    )
    with pytest.raises(ValueError, match=r"pad_crop needs images of data.image_size 28 x 28: 5 of 5 .* 40 x 28"):
        sampling.training_crops("pad_crop", tall, square, 28, seed=1)
    with pytest.raises(ValueError, match="'mixup' is unknown"):
        sampling.training_crops("mixup", tall, square, 28, seed=1)
