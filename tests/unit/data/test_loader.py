"""The loader: exact pixels for any number of threads, and an error within the deadline for every fault."""

from __future__ import annotations

import io
import os
import re
import struct
import subprocess
import sys
import threading
import weakref
import zlib
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.data.loading import sampling
from pipeline.data.loading.decoder import compiled_decoder, decoder_folder, libffcv
from pipeline.data.loading.loader import CorruptSample, Loader, LoaderError
from pipeline.data.manifest import DataError, check_structure, read_index
from pipeline.data.writing.write import WriteOptions, write_dataset

SIDE = 28
SHAPES = [(96, 80), (70, 90), (73, 73), (120, 80)]


def smooth_image(rng, height, width):
    coarse = rng.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def sources():
    rng = np.random.default_rng(0)
    raw = [rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8) for _ in range(40)]
    return {"raw": raw, "jpg": [smooth_image(rng, *SHAPES[n % len(SHAPES)]) for n in range(40)]}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """One file with raw images and one with JPEGs, from PNGs in ten classes of four."""
    folder = tmp_path_factory.mktemp("ffcv")
    for split, images in (("train", sources()["raw"]), ("val", sources()["jpg"])):
        for n, image in enumerate(images):
            class_folder = folder / "tree" / split / f"class-{n // 4}"
            class_folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(class_folder / f"{n:02}.png")
    options = WriteOptions(workers=1, stall_seconds=60)
    raw, jpg = write_dataset("image_folder", folder / "tree", folder, options, force=False, progress=lambda *_: None)
    assert (raw.manifest.image_mode, jpg.manifest.image_mode) == ("raw", "jpg")
    return {"raw": raw.path, "jpg": jpg.path}


def copy_of(path, folder):
    """A copy of an FFCV file and its manifest, to be damaged."""
    for file in path.parent.glob(f"{path.name}*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder / path.name


def stored(path, sample):
    """(offset, bytes) of a stored image."""
    index = read_index(path, check_structure(path))
    return int(index.samples[sample]["data_ptr"]), int(index.sizes[sample])


def pillow_pixels(path, sample):
    """Pillow's pixels of a stored JPEG, uint8."""
    begin, size = stored(path, sample)
    return np.asarray(Image.open(io.BytesIO(path.read_bytes()[begin : begin + size])).convert("RGB"))


def overwrite(path, place, data):
    with path.open("r+b") as stream:
        stream.seek(place)
        stream.write(data)


def pixels(batch):
    return batch.images.permute(0, 2, 3, 1).numpy()


def brute_force(image, crop):
    """A crop pixel by pixel, zero outside the image."""
    top, left, height, width, flip = crop
    result = np.zeros((height, width, 3), np.uint8)
    for row in range(height):
        for column in range(width):
            y, x = top + row, left + (width - 1 - column if flip else column)
            if 0 <= y < image.shape[0] and 0 <= x < image.shape[1]:
                result[row, column] = image[y, x]
    return result


def plan(loader, seed=0, steps=6, batch=8):
    crops = sampling.training_crops("random_resized_crop", loader.heights, loader.widths, loader.image_size, seed)
    ids = np.arange(loader.num_samples)
    return sampling.training_plan(
        ids, crops, seed=seed, start_step=0, stop_step=steps, batch_per_step=batch, micro_batch=batch
    )


def prefetch_threads():
    return sum(thread.name == "prefetch" for thread in threading.enumerate())


@settings(max_examples=20)
@given(data=st.data())
def test_raw_pixels_are_the_source_with_the_crop_applied(files, data):
    images = sources()["raw"]
    count = data.draw(st.integers(1, 6))
    ids = np.array(data.draw(st.lists(st.integers(0, 39), min_size=count, max_size=count)))
    offsets = st.lists(st.integers(-SIDE - 2, SIDE + 2), min_size=count, max_size=count)
    crops = np.full((count, 5), SIDE, np.int32)
    crops[:, 0], crops[:, 1] = data.draw(offsets), data.draw(offsets)
    crops[:, 4] = data.draw(st.lists(st.integers(0, 1), min_size=count, max_size=count))
    with Loader(files["raw"], image_size=SIDE, threads=2) as loader:
        batch = loader.read(ids, crops)
    for n in range(count):
        assert np.array_equal(pixels(batch)[n], brute_force(images[ids[n]], crops[n]))
    assert batch.ids.tolist() == ids.tolist()
    assert batch.labels.tolist() == (ids // 4).tolist()
    assert (batch.images.dtype, batch.labels.dtype, batch.ids.dtype) == (torch.uint8, torch.int64, torch.int64)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)


def test_on_a_device_images_are_float32_in_0_to_1(files):
    ids = np.arange(5)
    with Loader(files["raw"], image_size=SIDE, threads=1) as loader:
        batch = loader.read(ids, sampling.whole_image_crops(np.full(5, SIDE), np.full(5, SIDE)))
    images, labels = batch.to(torch.device("cpu"))
    assert images.dtype == torch.float32
    assert torch.equal(images, batch.images.float() / 255)
    assert torch.equal(labels, batch.labels)


def test_whole_raw_images_are_bit_exact_and_resized_by_area(files):
    images = np.stack(sources()["raw"])
    ids = np.arange(len(images))
    with Loader(files["raw"], image_size=SIDE, threads=1) as loader:
        assert loader.num_samples == 40
        assert loader.labels.tolist() == [n // 4 for n in range(40)]
        whole = sampling.whole_image_crops(loader.heights, loader.widths)
        assert np.array_equal(pixels(loader.read(ids, whole)), images)
    with Loader(files["raw"], image_size=14, threads=1) as loader:
        halved = pixels(loader.read(ids, whole))
    expected = np.stack([cv2.resize(image, (14, 14), interpolation=cv2.INTER_AREA) for image in images])
    assert np.abs(halved.astype(int) - expected).max() <= 1


def test_crops_that_grow_in_one_direction_are_resized_as_by_ffcv(files):
    """By OpenCV, even if they shrink in the other direction."""
    crops = np.array([[0, 2, 28, 16, 0], [3, 0, 17, 28, 0], [1, 1, 10, 12, 0]], np.int32)
    with Loader(files["raw"], image_size=20, threads=1) as loader:
        images_read = pixels(loader.read(np.arange(3), crops))
    for image, (top, left, high, wide, _), mine in zip(sources()["raw"], crops.tolist(), images_read, strict=False):
        theirs = np.empty((20, 20, 3), np.uint8)
        source, target = image.ctypes.data, theirs.ctypes.data
        libffcv.ctypes_resize(0, source, SIDE, SIDE, top, top + high, left, left + wide, target, 20, 20)
        assert np.array_equal(mine, theirs)


def test_jpegs_decode_as_pillow_does_and_are_cropped_resized_and_mirrored(files):
    side = SHAPES[2][0]
    with Loader(files["jpg"], image_size=side, threads=1) as loader:
        for n in range(2, 40, 4):
            whole = pixels(loader.read(np.array([n]), np.array([[0, 0, side, side, 0]])))[0].astype(int)
            # FFCV uses turbojpeg's fast transform, Pillow the accurate one.
            difference = np.abs(whole - pillow_pixels(files["jpg"], n))
            assert difference.mean() < 1.5
            assert difference.max() <= 10

    rng = np.random.default_rng(1)
    with Loader(files["jpg"], image_size=24, threads=1) as loader:
        ids = rng.integers(0, 40, 60)
        crops = sampling.random_resized_crops(ids, loader.heights[ids], loader.widths[ids], 0, 0)
        images_read = pixels(loader.read(ids, crops)).astype(int)
    for n, (top, left, height, width, flip) in enumerate(crops):
        region = pillow_pixels(files["jpg"], ids[n])[top : top + height, left : left + width]
        expected = cv2.resize(region, (24, 24), interpolation=cv2.INTER_AREA).astype(int)
        difference = np.abs(images_read[n] - (expected[:, ::-1] if flip else expected))
        assert difference.mean() < 1.5
        assert difference.max() <= 10


@pytest.mark.parametrize("mode", ["raw", "jpg"])
@pytest.mark.parametrize("side", [20, SIDE, 73, 100])
def test_without_compiling_the_pixels_are_the_same(files, mode, side):
    """Shrunk by area, copied beyond the edges, enlarged, mirrored."""
    rng = np.random.default_rng(side)
    ids = rng.permutation(40)
    with (
        Loader(files[mode], image_size=side, threads=2) as compiled,
        Loader(files[mode], image_size=side, threads=2, compiled=False) as plain,
    ):
        heights, widths = compiled.heights[ids], compiled.widths[ids]
        padded = sampling.pad_crops(ids, side, 1, 0, flip=True)
        padded[:, :2] += rng.integers(-side - 2, side + 2, (40, 2), dtype=np.int32)
        for crops in (
            sampling.random_resized_crops(ids, heights, widths, 0, 0),
            sampling.center_crops(heights, widths, side),
            sampling.whole_image_crops(heights, widths),
            padded,
        ):
            assert torch.equal(plain.read(ids, crops).images, compiled.read(ids, crops).images)


@pytest.mark.parametrize("mode", ["raw", "jpg"])
def test_pixels_do_not_depend_on_threads_or_on_the_rest_of_the_batch(files, mode):
    with (
        Loader(files[mode], image_size=20, threads=1) as one,
        Loader(files[mode], image_size=20, threads=3) as three,
    ):
        ids = np.random.default_rng(0).permutation(40)
        crops = sampling.random_resized_crops(ids, one.heights[ids], one.widths[ids], 0, 0)
        together = one.read(ids, crops).images
        assert torch.equal(together, three.read(ids, crops).images)
        for n in (0, 17, 39):
            assert torch.equal(together[n], three.read(ids[n : n + 1], crops[n : n + 1]).images[0])
        assert len(three.read(ids[:0], crops[:0]).images) == 0


def test_prefetched_batches_follow_the_plan_and_are_not_overwritten(files):
    with Loader(files["jpg"], image_size=20, threads=2, ahead=1) as loader:
        expected = [loader.read(ids, crops) for ids, crops in plan(loader)]
        images_read = list(loader.batches(plan(loader)))
        other = list(loader.batches(plan(loader, seed=1)))
    assert len(images_read) == len(expected) == 6
    for a, b in zip(images_read, expected, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.ids, b.ids)
        assert torch.equal(a.labels, b.labels)
    assert not torch.equal(images_read[0].images, other[0].images)
    assert prefetch_threads() == 0


@pytest.mark.parametrize("mode", ["raw", "jpg"])
def test_images_of_other_sizes_are_those_of_loaders_of_that_size(files, mode):
    """The same bytes whatever the previous size, from a decoder that is compiled once."""
    sizes = [20, 64, 32, 96, 64, 20]
    with Loader(files[mode], image_size=20, threads=2) as loader:
        parts = list(plan(loader))
        images_read = list(loader.batches(parts, sizes))
        decoder: Any = loader._decoder
        assert len(decoder.signatures) == 1
    for part, size, batch in zip(parts, sizes, images_read, strict=True):
        with Loader(files[mode], image_size=size, threads=1) as alone:
            expected = alone.read(*part).images
        assert batch.images.shape == (8, 3, size, size)
        assert torch.equal(batch.images, expected)


def test_a_crop_of_the_requested_size_is_copied(files):
    images = sources()["raw"]
    with Loader(files["raw"], image_size=64, threads=1) as loader:
        crops = np.array([[-3, 2, SIDE, SIDE, 1]], np.int32)
        assert np.array_equal(pixels(loader.read(np.array([7]), crops, SIDE))[0], brute_force(images[7], crops[0]))
        with pytest.raises(ValueError, match="only crops of 64 x 64 may"):
            loader.read(np.array([7]), crops)


def test_two_loaders_can_be_open_at_once(files):
    with Loader(files["jpg"], image_size=20, threads=2) as a, Loader(files["raw"], image_size=28, threads=2) as b:
        alone = [list(loader.batches(plan(loader))) for loader in (a, b)]
        together = list(zip(a.batches(plan(a)), b.batches(plan(b)), strict=True))
    for n, pair in enumerate(together):
        assert torch.equal(pair[0].images, alone[0][n].images)
        assert torch.equal(pair[1].images, alone[1][n].images)


def test_leaving_early_leaves_no_thread(files):
    before = threading.active_count()
    with Loader(files["raw"], image_size=SIDE, threads=2, ahead=2) as loader:
        for _ in range(50):
            for _batch in loader.batches(plan(loader, steps=1000)):
                break
            assert prefetch_threads() == 0
            assert threading.active_count() <= before + 2
    assert threading.active_count() == before


def test_closing_ends_a_running_iteration(files):
    loader = Loader(files["raw"], image_size=SIDE, threads=1, ahead=1)
    batches = loader.batches(plan(loader, steps=1000))
    next(batches)
    loader.close()
    loader.close()
    with pytest.raises(LoaderError, match="closed"):
        next(batches)
    with pytest.raises(LoaderError, match="closed"):
        loader.read(np.arange(1), sampling.pad_crops(np.arange(1), SIDE, 0, 0, True))
    assert prefetch_threads() == 0


def test_memory_is_bounded_even_for_a_slow_consumer(files):
    """`ahead` batches that wait, two that are being read, the consumer's and the one before that."""
    batches: list[weakref.ref] = []
    new_batch = threading.Condition()

    class CountingLoader(Loader):
        def _submit(self, ids, crops, image_size):
            pending = super()._submit(ids, crops, image_size)
            with new_batch:
                batches.append(weakref.ref(pending.images))
                new_batch.notify_all()
            return pending

    ahead, most = 3, 0
    with CountingLoader(files["raw"], image_size=SIDE, threads=2, ahead=ahead) as loader:
        for number, _batch in enumerate(loader.batches(plan(loader, steps=30))):
            reachable = min(number + 1 + ahead + 2, 30)
            with new_batch:
                assert new_batch.wait_for(lambda count=reachable: len(batches) >= count, timeout=60)
            most = max(most, sum(reference() is not None for reference in batches))
    assert ahead + 2 <= most <= ahead + 4


def test_an_error_of_the_plan_is_raised_at_its_batch(files):
    def failing_plan(loader):
        yield from plan(loader, steps=2)
        raise RuntimeError("the plan failed")

    with Loader(files["raw"], image_size=SIDE, threads=1) as loader:
        batches = loader.batches(failing_plan(loader))
        assert len(next(batches).ids) == len(next(batches).ids) == 8
        with pytest.raises(RuntimeError, match="the plan failed"):
            next(batches)
        assert prefetch_threads() == 0


def test_a_stuck_plan_is_an_error_within_the_deadline(files):
    release = threading.Event()

    def stuck_plan(loader):
        yield from plan(loader, steps=2)  # a batch is completed once the next one is submitted
        release.wait(60)

    with Loader(files["raw"], image_size=SIDE, threads=1) as loader:
        batches = loader.batches(stuck_plan(loader), deadline_s=0.5)
        next(batches)
        thread = next(thread for thread in threading.enumerate() if thread.name == "prefetch")
        with pytest.raises(LoaderError, match=r"no batch within 0\.5 s; its reader is stuck"):
            next(batches)
        assert not release.is_set()
        release.set()
        thread.join(10)
        assert not thread.is_alive()


DAMAGE = {
    "zeroed header": lambda data: bytes(20) + data[20:],
    "random bytes in the middle": lambda data: data[:900] + np.random.default_rng(0).bytes(50) + data[950:],
    "one bit": lambda data: data[:900] + bytes([data[900] ^ 1]) + data[901:],
}


@pytest.mark.parametrize("mode", ["raw", "jpg"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_images_are_named(files, tmp_path, mode, damage):
    path = copy_of(files[mode], tmp_path)
    for sample in (7, 13):
        begin, size = stored(path, sample)
        overwrite(path, begin, DAMAGE[damage](path.read_bytes()[begin : begin + size]))
    with Loader(path, image_size=SIDE, threads=2) as loader:
        whole = sampling.whole_image_crops(loader.heights, loader.widths)
        ids = np.arange(40)
        with pytest.raises(CorruptSample, match=rf"{path}: sample 7, 13: stored bytes differ"):
            loader.read(ids, whole)
        intact = np.setdiff1d(ids, [7, 13])
        assert len(loader.read(intact, whole[intact]).images) == 38
        with pytest.raises(CorruptSample, match="sample 7: "):
            list(loader.batches([(intact, whole[intact]), (ids[:8], whole[:8])]))
        assert prefetch_threads() == 0


def test_an_image_that_turbojpeg_cannot_decode_is_named(files, tmp_path):
    """The decoder reports errors too: here the checksum matches the damaged bytes."""
    path = copy_of(files["jpg"], tmp_path)
    begin, size = stored(path, 5)
    overwrite(path, begin, bytes(20))
    damaged = path.read_bytes()[begin : begin + size]
    with Loader(path, image_size=SIDE, threads=2) as loader:
        loader._table[5, 5] = zlib.crc32(damaged)
        with pytest.raises(CorruptSample, match="sample 5: cannot be decoded"):
            loader.read(np.arange(40), sampling.whole_image_crops(loader.heights, loader.widths))


@pytest.mark.parametrize("claim", [(65535, 65535), (16, 16)])
def test_a_jpeg_that_claims_another_size_is_not_decoded(files, tmp_path, claim):
    """libjpeg would allocate for what the JPEG claims, or scale it down without a word."""
    path = copy_of(files["jpg"], tmp_path)
    begin, size = stored(path, 5)
    frame = path.read_bytes()[begin : begin + size].index(b"\xff\xc0") + 5
    overwrite(path, begin + frame, struct.pack(">HH", *claim))
    with Loader(path, image_size=SIDE, threads=1) as loader:
        loader._table[5, 5] = zlib.crc32(path.read_bytes()[begin : begin + size])
        with pytest.raises(CorruptSample, match="sample 5: cannot be decoded"):
            loader.read(np.arange(40), sampling.whole_image_crops(loader.heights, loader.widths))


def test_a_file_that_is_truncated_while_in_use_is_an_error(files, tmp_path):
    path = copy_of(files["raw"], tmp_path)
    with Loader(path, image_size=SIDE, threads=1) as loader:
        batches = loader.batches(plan(loader, steps=1000))
        next(batches)
        os.truncate(path, 4096)
        with pytest.raises(CorruptSample, match=rf"{path}: sample \d+, .*: the file ends before its data"):
            list(batches)


def test_pointers_outside_the_file_are_refused_at_the_start(files, tmp_path):
    path = copy_of(files["raw"], tmp_path)
    size, samples = path.stat().st_size, check_structure(path).num_samples
    overwrite(path, size - 24 * samples + 8, (size * 2).to_bytes(8, "little"))
    with pytest.raises(DataError, match=str(path)):
        Loader(path, image_size=SIDE, threads=1)


@pytest.mark.parametrize("ids", [[40], [0, -1], [3, 10**12]])
def test_unknown_ids_are_named(files, ids):
    with (
        Loader(files["raw"], image_size=SIDE, threads=1) as loader,
        pytest.raises(CorruptSample, match=rf"{files['raw']}: no sample {ids[-1]}; its 40 samples"),
    ):
        loader.read(np.array(ids), sampling.pad_crops(np.array(ids), SIDE, 0, 0, True))


@pytest.mark.parametrize("crop", [[-1, 0, 20, 20], [0, 9, 20, 20], [0, 0, 0, 20], [0, 0, 29, 5]])
def test_resized_crops_must_stay_in_the_image(files, crop):
    with Loader(files["raw"], image_size=SIDE, threads=1) as loader:
        with pytest.raises(ValueError, match=rf"crop {re.escape(str(crop))} leaves sample 6 of 28 x 28 pixels"):
            loader.read(np.array([5, 6]), np.array([[0, 0, 28, 28, 0], [*crop, 0]]))
        with pytest.raises(ValueError, match=r"crops have shape \[1, 5\], expected \[2, 5\]"):
            loader.read(np.array([5, 6]), np.array([[0, 0, 28, 28, 0]]))


@pytest.mark.slow
def test_importing_the_loader_leaves_torch_threads_and_numba_alone():
    code = (
        "import numba, torch; torch.set_num_threads(3); import pipeline.data.loading.loader; "
        "assert torch.get_num_threads() == 3; assert not numba.config.DISABLE_JIT"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_the_compiled_decoder_is_kept_for_other_processes_and_made_again_if_damaged(files, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    decoder_in_a_new_process: Any = compiled_decoder.__wrapped__
    first, second = decoder_in_a_new_process(), decoder_in_a_new_process()
    assert [sum(decoder.stats.cache_hits.values()) for decoder in (first, second)] == [0, 1]
    ids = np.arange(40)
    with Loader(files["raw"], image_size=SIDE, threads=1) as loader:
        crops = sampling.random_resized_crops(ids, loader.heights, loader.widths, 0, 0)
        expected = loader.read(ids, crops).images
        monkeypatch.setattr(loader, "_decoder", second)
        assert torch.equal(loader.read(ids, crops).images, expected)
    folder = decoder_folder()
    assert folder is not None
    for path in folder.rglob("*.nbc"):
        path.write_bytes(b"damaged")
    assert sum(decoder_in_a_new_process().stats.cache_hits.values()) == 0


def test_a_decoder_that_cannot_be_kept_is_compiled_in_every_process(tmp_path, monkeypatch):
    (tmp_path / "hydra-pipeline").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert decoder_folder() is None
