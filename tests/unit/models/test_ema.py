"""The EMA of weights: a closed-form sum, masks computed from it, and a network that is restored exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.models.ema import Ema
from pipeline.models.pruning.scores import Scores
from pipeline.models.pruning.topk import topk_mask
from pipeline.models.state import effective_state, named_state, train_only, trained_parameters


def small_network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(54, 4))


def training(network: nn.Module, scores: Scores | None, steps: int, seed: int = 0) -> Iterator[dict[str, Tensor]]:
    """Changes everything that a phase trains at random, and yields a copy of the state after every step."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        with torch.no_grad():
            for parameter in trained_parameters(network).values():
                parameter.add_(torch.randn(parameter.shape, generator=generator))
        network.train()(torch.randn(8, 3, 5, 5, generator=generator))  # BatchNorm's statistics
        if scores is not None:
            scores.refresh()
        yield {name: tensor.detach().clone() for name, tensor in named_state(network).items()}


@settings(max_examples=25)
@given(st.sampled_from([0.0, 0.5, 0.9, 0.999]), st.integers(1, 30))
def test_the_average_is_the_weighted_sum_of_all_steps(decay: float, steps: int) -> None:
    network = small_network()
    ema = Ema(network, decay)
    states = []
    for step, state in enumerate(training(network, None, steps), start=1):
        states.append(state)
        ema.update(step)
    average = ema.state()
    weights = torch.tensor([decay ** (steps - i) for i in range(1, steps + 1)], dtype=torch.float64)
    assert {name for name in average if name.startswith("ema/buffer/")} == {
        f"ema/buffer/1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")
    }
    for name, mean in average.items():
        values = torch.stack([state[name.removeprefix("ema/")].double() for state in states])
        if name.endswith("num_batches_tracked"):
            assert int(mean) == steps
            continue
        expected = torch.tensordot(weights, values, dims=1) / weights.sum()
        assert mean.dtype == torch.float32
        torch.testing.assert_close(mean.double(), expected, rtol=1e-4, atol=1e-5)


def test_tensors_are_averaged_at_once_to_the_bits_of_one_at_a_time() -> None:
    network, decay = small_network(), 0.9
    ema = Ema(network, decay)
    means = {name: tensor.detach().clone() for name, tensor in named_state(network).items()}
    for step, state in enumerate(training(network, None, 8), start=1):
        ema.update(step)
        for name, mean in means.items():
            if mean.is_floating_point():
                mean.lerp_(state[name], (1 - decay) / (1 - decay**step))
    average = ema.state()
    assert all(torch.equal(average[f"ema/{name}"], mean) for name, mean in means.items() if mean.is_floating_point())


def test_a_long_average_of_constant_weights_is_those_weights() -> None:
    network = small_network()
    ema = Ema(network, 0.9999)
    for step in (1, 2, 10_000, 10**9):
        ema.update(step)
        average = ema.state()
        for name, tensor in named_state(network).items():
            assert torch.equal(average[f"ema/{name}"], tensor)


def phase_of(trains: str) -> tuple[nn.Module, Scores]:
    network = small_network()
    scores = Scores.attach(network, Decimal("0.3"))
    train_only(network, "scores" if trains == "scores" else "weights")
    return network, scores


@pytest.mark.parametrize("trains", ["scores", "weights"])
def test_masks_are_computed_from_the_average_and_the_network_is_restored(trains: str) -> None:
    network, scores = phase_of(trains)
    ema = Ema(network, 0.8, scores)
    for step, _ in enumerate(training(network, scores, 6), start=1):
        ema.update(step)
    average = ema.state()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    effective, mask_hash = effective_state(network), scores.mask_sha256()
    live = {name: id(tensor) for name, tensor in named_state(network).items()}

    with ema.applied():
        inside = effective_state(network)
        state = named_state(network)
        assert {name: id(tensor) for name, tensor in state.items()} == live, (
            "the engine holds references to these tensors"
        )
        for name, kept in (("0.weight", 49), ("4.weight", 65)):  # n - floor(0.7 n) of 162 and of 216
            own = f"{name[:2]}parametrizations.weight"
            score = average[f"ema/score/{name}"] if trains == "scores" else before[f"{own}.0.score"]
            weight = average[f"ema/weight/{name}"] if trains == "weights" else before[f"{own}.original"]
            assert torch.equal(inside[name], torch.where(topk_mask(score, kept), weight, 0.0))
        assert torch.equal(inside["1.running_var"], average["ema/buffer/1.running_var"])
        same_masks = scores.mask_sha256() == mask_hash
        assert same_masks == (trains == "weights"), "frozen scores keep their masks, averaged ones make their own"
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert scores.mask_sha256() == mask_hash
    assert all(torch.equal(tensor, effective[name]) for name, tensor in effective_state(network).items())
    kinds = {name.split("/")[1] for name in average}
    assert kinds == ({"score", "weight", "buffer"} if trains == "scores" else {"weight", "buffer"})


def test_the_network_is_restored_after_an_error() -> None:
    network = small_network()
    ema = Ema(network, 0.5)
    list(training(network, None, 2))
    ema.update(1)
    list(training(network, None, 1, seed=1))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}

    def fail_inside() -> None:
        with ema.applied():
            assert not torch.equal(network.state_dict()["0.weight"], before["0.weight"])
            raise RuntimeError("during validation")

    with pytest.raises(RuntimeError, match="during validation"):
        fail_inside()
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_the_average_resumes_exactly_from_a_file(tmp_path: Path) -> None:
    def train(save_after: int | None) -> dict[str, Tensor]:
        network, scores = phase_of("scores")
        ema = Ema(network, 0.7, scores)
        for step, _ in enumerate(training(network, scores, 8), start=1):
            ema.update(step)
            if step == save_after:
                save_file(ema.state(), tmp_path / "ema.safetensors")
                ema = Ema(network, 0.7, scores)
                ema.load(load_file(tmp_path / "ema.safetensors"))
        return ema.state()

    uninterrupted, resumed = train(None), train(3)
    assert uninterrupted.keys() == resumed.keys()
    assert all(torch.equal(uninterrupted[name], resumed[name]) for name in uninterrupted)


def test_half_precision_weights_are_averaged_in_float32() -> None:
    network = nn.Linear(4, 4).bfloat16()
    ema = Ema(network, 0.9)
    ema.update(1)
    assert ema.state()["ema/weight/weight"].dtype == torch.float32
    with ema.applied():
        assert network.weight.dtype == torch.bfloat16


def average_of_others(network: nn.Module) -> dict[str, Tensor]:
    average = Ema(network, 0.9).state()
    average["ema/weight/9.weight"] = average.pop("ema/weight/4.weight")
    return average


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda network: Ema(network, 1.0), r"decay 1\.0 must lie in \[0, 1\)"),
        (lambda network: Ema(network, 0.9).update(0), r"step 0 must be at least 1"),
        (lambda network: Ema(network, 0.9).load(average_of_others(network)), r"difference: ema/weight/4\.weight"),
    ],
)
def test_invalid_arguments_are_refused(act: Callable[[nn.Module], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        act(small_network())
