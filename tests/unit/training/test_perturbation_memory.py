"""Remembered perturbations follow their images through crops, flips, epochs and resets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pipeline import rng
from pipeline.data.loading import sampling
from pipeline.data.loading.loader import Loader
from pipeline.data.loading.sampling import CropFunction
from pipeline.distributed import Group
from pipeline.recipe.objective import FgsmPgi
from pipeline.recipe.stages import stages_of
from pipeline.run.progress import Progress
from pipeline.training.context import RunContext
from pipeline.training.perturbation_memory import EPOCHS, VALUES, PerturbationMemory
from pipeline.training.stage_start import build_perturbations
from tests.support.small_recipe import small_recipe

GROUP = Group(0, 1, torch.device("cpu"))
SIZE = 6


def memory_of(ids: Tensor, crops: CropFunction, size: int = SIZE, **values: int) -> PerturbationMemory:
    settings = {"first_epoch": 0, "steps_per_epoch": 1, "reset_epochs": 40} | values
    return PerturbationMemory(GROUP, ids.numpy(), crops, image_size=size, **settings)


def keys_at(ids: Tensor, step: int) -> Tensor:
    return torch.from_numpy(rng.sample_keys(ids.numpy(), 0, "attack", step).view(np.int64))


def random_noise(ids: Tensor, step: int) -> Tensor:
    uniforms = rng.uniforms(rng.sample_keys(ids.numpy(), 0, "attack", step), 3 * SIZE**2)
    return torch.from_numpy(2 * uniforms - 1).view(-1, 3, SIZE, SIZE)


@pytest.mark.parametrize("augmentation", ["none", "pad_crop", "pad_crop_flip"])
def test_they_move_with_the_pixels_that_the_loader_shows(fashion_data: Path, augmentation: str) -> None:
    """Images in place of perturbations come out as the loader crops and mirrors them, with zeros around them."""
    ids = np.arange(5, 69)
    with Loader(fashion_data / "train.beton", image_size=28, threads=1, compiled=False) as loader:
        crops = sampling.training_crops(augmentation, loader.heights, loader.widths, 28, 0)
        whole = sampling.whole_image_crops(loader.heights[ids], loader.widths[ids])
        plan = [(ids, whole), (ids, crops(ids, 7))]
        still, cropped = (batch.images for batch in loader.batches(iter(plan), iter([28, 28])))
    memory = memory_of(torch.from_numpy(ids), crops, 28, first_epoch=5)
    epochs = torch.full((len(ids),), 1, dtype=torch.int32)
    memory.load({VALUES: (still // 2).to(torch.int8).contiguous(), EPOCHS: epochs})
    noise = memory.of(0, torch.from_numpy(ids), keys_at(torch.from_numpy(ids), 2), 2)
    assert noise.dtype == torch.float32
    assert torch.equal((noise * 127).round(), (cropped // 2).float())
    assert torch.equal(still, cropped) == (augmentation == "none")


def test_a_perturbation_comes_back_rounded_to_a_127th_of_eps() -> None:
    ids = torch.tensor([3, 4, 9])
    memory = memory_of(ids, lambda ids, epoch: np.zeros((len(ids), 5), np.int32))
    lent = memory.of(0, ids, keys_at(ids, 0), 0)
    torch.testing.assert_close(lent.double(), random_noise(ids, 0), rtol=0, atol=1e-6)
    lent.copy_(values := torch.linspace(-1.001, 1.001, lent.numel()).view_as(lent))
    back = memory.of(0, ids, keys_at(ids, 1), 1)
    assert float((back - values).abs().max()) <= 0.5 / 127 + 0.0011
    assert (float(back.min()), float(back.max())) == (-1.0, 1.0)


@given(seed=st.integers(0, 10_000), reset=st.integers(1, 4), flip=st.booleans(), first=st.integers(0, 3))
def test_it_is_a_canvas_per_image_written_through_its_crops(seed: int, reset: int, flip: bool, first: int) -> None:
    """Pixel by pixel over several epochs, each of which leaves out some images, and resumed at any step."""
    random = np.random.default_rng(seed)
    ids = torch.tensor([2, 3, 5, 8, 13, 21])

    def crops(some: np.ndarray, epoch: int) -> np.ndarray:
        return sampling.pad_crops(some, SIZE, seed, epoch, flip)

    memory = memory_of(ids, crops, first_epoch=first, steps_per_epoch=2, reset_epochs=reset)
    canvases: dict[int, np.ndarray] = {}
    order = ids
    for step in range(12):
        epoch = step // 2
        if step % (2 * reset) == 0:
            canvases.clear()
        if step % 2 == 0:
            order = ids[torch.from_numpy(random.permutation(len(ids)))]
        batch = order[:2] if step % 2 == 0 else order[2:4]  # the last two are left out
        noise = memory.of(0, batch, keys_at(batch, step), step)
        written = random.integers(-127, 128, noise.shape)
        for place, image in enumerate(batch.tolist()):
            top, left, _, _, mirrored = crops(np.array([image]), first + epoch)[0]
            expected = random_noise(batch, step)[place].numpy()
            canvas = canvases.get(image)
            after = np.zeros((3, SIZE, SIZE)) if canvas is None else canvas.copy()
            for row, column in np.ndindex(SIZE, SIZE):
                y, x = top + row, left + (SIZE - 1 - column if mirrored else column)
                inside = 0 <= y < SIZE and 0 <= x < SIZE
                if canvas is not None:
                    expected[:, row, column] = canvas[:, y, x] / 127 if inside else 0
                if inside:
                    after[:, y, x] = written[place, :, row, column]
            np.testing.assert_allclose(noise[place], expected, rtol=0, atol=1e-6)
            canvases[image] = after
        noise.copy_(torch.from_numpy(written) / 127)
        if random.random() < 0.3:
            state = memory.state()
            memory = memory_of(ids, crops, first_epoch=first, steps_per_epoch=2, reset_epochs=reset)
            memory.load(state)


def test_a_state_is_a_copy_with_what_was_written_last() -> None:
    ids = torch.arange(4)
    memory = memory_of(ids, lambda ids, epoch: np.zeros((len(ids), 5), np.int32), steps_per_epoch=2)
    memory.of(0, ids[:2], keys_at(ids[:2], 0), 0).fill_(1.0)
    state = memory.state()
    memory.of(0, ids[2:], keys_at(ids[2:], 1), 1).fill_(-1.0)
    assert state[VALUES][:2].eq(127).all()
    assert not state[VALUES][2:].any()
    assert state[EPOCHS].tolist() == [0, 0, -1, -1]
    assert memory.state()[VALUES][2:].eq(-127).all()


def test_a_state_takes_the_bytes_that_the_recipe_announces() -> None:
    ids = torch.arange(7)
    state = memory_of(ids, lambda ids, epoch: np.zeros((len(ids), 5), np.int32)).state()
    announced = FgsmPgi.model_validate({"name": "fgsm_pgi", "step_size": 1}).remembered_bytes(SIZE)
    assert sum(tensor.numel() * tensor.element_size() for tensor in state.values()) == 7 * announced


def test_a_stage_remembers_if_its_objective_does_until_it_overfits(fashion_data: Path) -> None:
    recipe = small_recipe(
        fashion_data,
        objective={"name": "fgsm_pgi", "step_size": "1/10"},
        phases={"prune": {"epochs": 1, "lr": 0.1, "objective": {"name": "clean"}}},
        evaluation={"validation_steps": 2},
    )
    context = RunContext(recipe, fashion_data, "token", GROUP)
    pretrain, prune = stages_of(recipe)[:2]
    start = Progress(step=0, steps_per_epoch=20, total_steps=40)
    memory = build_perturbations(context, pretrain, start)
    assert memory is not None
    assert memory.state()[VALUES].shape == (1280, 3, 28, 28)
    assert build_perturbations(context, pretrain, replace(start, level=1)) is None
    assert build_perturbations(context, prune, start) is None
    context.close()
