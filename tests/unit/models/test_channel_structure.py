"""Channels chosen by their scores, within a budget of multiply-accumulates."""

from __future__ import annotations

import math
import pickle
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pipeline.deployment.folder import export_network
from pipeline.deployment.smaller_network import has_pruned_channels
from pipeline.deployment.verification import verify_folder
from pipeline.evaluation.honesty.exported_file import mask_check
from pipeline.evaluation.load import LoadedNetwork
from pipeline.models import Network, build_network
from pipeline.models.export import write_model
from pipeline.models.pruning.channel_removal import Kept, channel_masks, read_channels
from pipeline.models.pruning.channel_structure import CoupledChannels, importance_of
from pipeline.models.pruning.channels import Channels
from pipeline.models.pruning.maskable import maskable
from pipeline.models.pruning.score_init import first_scores
from pipeline.models.pruning.scores import Scores, check_structures, structure_of
from pipeline.models.state import effective_state
from pipeline.recipe.sections import Model

QUARTER = Decimal("0.25")
SMALL = Model(arch="small_cnn", num_classes=10)


class Depthwise(nn.Module):
    """With a residual connection, a depthwise convolution and one in two groups."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.point = nn.Conv2d(16, 24, 1)
        self.grouped = nn.Conv2d(24, 32, 3, padding=1, groups=2)
        self.back = nn.Conv2d(32, 16, 1)
        self.same = nn.Conv2d(16, 16, 1)
        self.fc = nn.Linear(16 * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = x + self.back(self.grouped(self.point(self.depthwise(x))).relu())
        x = x + self.same(x)
        return self.fc(torch.nn.functional.adaptive_avg_pool2d(x, 2).flatten(1))


def depthwise_network() -> Network:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Network(Depthwise(), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), 8)


def channels_of(network: Network, round_to: int = 1) -> CoupledChannels:
    structure = structure_of(network, "channel", round_to)
    assert isinstance(structure, CoupledChannels)
    return structure


def random_scores(network: Network, seed: int) -> dict[str, Tensor]:
    init = first_scores("random", seed)
    return {name: init(name, layer.get_parameter("weight")) for name, layer in maskable(network).items()}


def kept_by(structure: CoupledChannels, keep: Decimal, allocation: str, scores: dict[str, Tensor]) -> Kept:
    """From the masks; checks that they are those of whole channels."""
    masks = structure.mask_rule(keep, allocation, True)(scores, {})  # pyright: ignore[reportArgumentType]
    network = depthwise_network()
    for name, mask in masks.items():
        with torch.no_grad():
            network.backbone.get_parameter(name).copy_(mask)
    kept = read_channels(network, structure.channels)
    for name, mask in channel_masks(structure.channels, kept).items():
        assert torch.equal(masks[name].flatten(2).all(2) if masks[name].dim() > 2 else masks[name], mask)
        assert masks[name].shape == scores[name].shape
    return kept


def first_of_each_group(channels: Channels, round_to: int) -> list[int]:
    """So many that each layer has `round_to` outputs; at both ends of the grouped convolution a channel is two."""
    members = [np.flatnonzero(channels.groups == group) for group in range(1, len(channels.group_names))]
    widths = [2 if name in ("point.weight", "grouped.weight") else 1 for name in channels.group_names[1:]]
    return [0, *(int(c) for ids, w in zip(members, widths, strict=True) for c in ids[: max(round_to // w, 1)])]


def test_the_importance_of_a_channel_is_the_sum_over_all_weights_that_go_with_it() -> None:
    network = depthwise_network()
    channels, scores = channels_of(network).channels, random_scores(network, 1)
    importance = importance_of(channels, scores)
    for channel in range(1, channels.count + 1):
        kept = np.ones(channels.count + 1, np.bool_)
        kept[channel] = False
        gone = {name: ~mask for name, mask in channel_masks(channels, kept).items()}
        expected = sum(
            float(scores[name].abs().double().flatten(2).sum(2)[mask].sum())
            if scores[name].dim() > 2
            else float(scores[name].abs().double()[mask].sum())
            for name, mask in gone.items()
        )
        assert importance[channel] == pytest.approx(expected, rel=1e-9)


@settings(max_examples=25)
@given(
    keep=st.decimals("0.1", "1", places=3),
    allocation=st.sampled_from(["global", "uniform"]),
    round_to=st.sampled_from([1, 4, 8]),
    seed=st.integers(0, 100),
)
def test_the_budget_is_never_exceeded_and_every_group_keeps_a_channel(
    keep: Decimal, allocation: str, round_to: int, seed: int
) -> None:
    network = depthwise_network()
    structure, scores = channels_of(network, round_to), random_scores(network, seed)
    channels, costs = structure.channels, structure.costs
    total = costs.total(np.ones(channels.count + 1, np.bool_))
    budget = math.floor(Fraction(keep) * total)
    smallest = np.isin(np.arange(channels.count + 1), first_of_each_group(channels, round_to))
    if costs.total(smallest) > budget:
        with pytest.raises(ValueError, match="of the multiply-accumulates; raise it"):
            structure.check_budget(keep)
        return
    kept = kept_by(structure, keep, allocation, scores)
    assert costs.total(kept) <= budget
    sizes = np.bincount(channels.groups[kept], minlength=len(channels.group_names))
    assert sizes[1:].min() >= 1
    for name, layer in channels.layers.items():
        if layer.outputs.any():
            count = int(kept[layer.outputs].sum())
            assert count == len(layer.outputs) or count % round_to == 0, name
    if keep == 1:
        assert kept.all()
    importance = importance_of(channels, scores)
    for group in range(1, len(channels.group_names)):
        members = np.flatnonzero(channels.groups == group)
        inside, outside = importance[members[kept[members]]], importance[members[~kept[members]]]
        assert not len(outside) or inside.min() >= outside.max(), "the most important ones of a group stay"
    if round_to == 1 and not kept.all():
        for group in {int(g) for g in channels.groups[~kept]}:
            members = np.flatnonzero((channels.groups == group) & ~kept)
            larger = kept.copy()
            larger[members[importance[members].argmax()]] = True
            assert costs.total(larger) > budget, "exact to one channel of any group"


def test_global_ranks_by_importance_per_cost() -> None:
    network = depthwise_network()
    structure, scores = channels_of(network), random_scores(network, 3)
    kept = kept_by(structure, Decimal("0.5"), "global", scores)
    importance, groups = importance_of(structure.channels, scores), structure.channels.groups
    at_least = (importance[None] >= importance[:, None]) & (groups[None] == groups[:, None])
    value = importance / (at_least * importance).sum(1) / structure.costs.of_channels(structure.channels).clip(1)
    first = np.array([importance[c] == importance[groups == groups[c]].max() for c in range(len(groups))])
    value[0] = np.inf
    best = int(np.where(kept, -1.0, value).argmax())
    ranked = kept & ((value >= value[best]) | first)
    ranked[best] = True
    budget = 0.5 * structure.costs.total(np.ones_like(kept))
    assert structure.costs.total(ranked) > budget, "the best of those that go does not fit"


def test_uniform_keeps_the_same_fraction_of_every_group() -> None:
    network = depthwise_network()
    structure = channels_of(network)
    kept = kept_by(structure, Decimal("0.5"), "uniform", random_scores(network, 3))
    groups = structure.channels.groups
    fractions = [kept[groups == g].mean() for g in range(1, len(structure.channels.group_names))]
    assert max(fractions) - min(fractions) <= 2 / 12  # channels of the smallest group


def test_removed_channels_learn_and_can_return() -> None:
    """Straight-through: dL/ds = dL/dw sign(s) w of every weight that reads one, in a network with the same logits."""
    network = build_network(SMALL, 1, 28).eval()
    scores = Scores.attach(network, QUARTER, "global", structure="channel")
    images, exact = torch.rand(4, 3, 28, 28), {name: mask.clone() for name, mask in scores.masks().items()}
    logits = network(images)
    assert scores.follow_shares() is None
    scores.refresh()
    torch.testing.assert_close(network(images), logits, atol=1e-5, rtol=0)
    removed = ~exact["fc1.weight"].any(0)
    assert 0 < removed.float().mean() < 1
    network(images).square().sum().backward()
    reading = scores.parameters()["fc1.weight"].grad
    assert reading is not None
    assert reading[:, removed][exact["fc1.weight"].any(1)].abs().sum() > 0
    with torch.no_grad():
        scores.parameters()["fc1.weight"][:, removed] = 100.0
    scores.refresh()
    with scores.within_budget():
        masks = {name: mask.clone() for name, mask in scores.masks().items()}
    assert masks["fc1.weight"][:, removed].any(), "some are back"
    assert not scores.masks()["conv2.weight"].equal(masks["conv2.weight"])


def test_the_rule_can_be_pickled() -> None:
    network = depthwise_network()
    rule, scores = channels_of(network).mask_rule(QUARTER, "global"), random_scores(network, 0)
    masks, again = rule(scores, {}), pickle.loads(pickle.dumps(rule))(scores, {})
    assert all(torch.equal(masks[name], again[name]) for name in masks)


def test_nan_is_named() -> None:
    network = depthwise_network()
    rule, scores = channels_of(network).mask_rule(QUARTER, "global"), random_scores(network, 0)
    scores["point.weight"][3] = math.nan
    with pytest.raises(ValueError, match=r"point.weight: scores contain NaN; lower the learning rate"):
        rule(scores, {})


def test_a_budget_below_the_smallest_network_is_refused() -> None:
    network = build_network(SMALL, 0, 28)
    check_structures(network, ["channel"], [QUARTER], 8)
    message = "keep_fractions 0.001 with structure channel: the smallest network, with 8 of .* raise it"
    with pytest.raises(ValueError, match=message):
        check_structures(network, ["channel"], [QUARTER, Decimal("0.001")], 8)


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """small_cnn with a quarter of its multiply-accumulates, channels as zeros in place."""
    network = build_network(SMALL, 1, 28).train()
    with torch.no_grad():
        network(torch.rand(16, 3, 28, 28))
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.bias)
    scores = Scores.attach(network, QUARTER, "global", structure="channel", round_to=8)
    path = tmp_path / "model.safetensors"
    facts = {"keep_fraction": "0.25", "image_size": 28, "structure": "channel", "mask_sha256": scores.mask_sha256()}
    write_model(path, effective_state(network), SMALL, facts)
    return path


def test_export_writes_the_smaller_network(exported: Path) -> None:
    network, folder = LoadedNetwork(exported), exported.parent / "export"
    card = export_network(network, None, ("onnx", "torch"), folder)
    smaller = LoadedNetwork(folder / "model.safetensors")
    assert smaller.file.stat().st_size < 0.7 * exported.stat().st_size
    assert card.network == smaller.metadata
    assert set(card.others_sha256) == {"check.npz", "model.safetensors"}
    assert verify_folder(folder) == (card, [])
    assert all(sizes[0] % 8 == 0 for name, sizes in smaller.metadata["widths"].items() if name != "fc2")
    images = torch.rand(5, 3, 28, 28)
    program = torch.export.load(folder / "model.pt2").module()
    with torch.inference_mode():
        for smaller_network in (smaller, program):
            torch.testing.assert_close(smaller_network(images), network(images), atol=1e-5, rtol=0)
    assert has_pruned_channels(network)
    assert not has_pruned_channels(smaller)


def test_honesty_counts_the_channels_that_are_used(exported: Path) -> None:
    assert mask_check(exported).status == "pass"
    write_model(exported, build_network(SMALL, 1, 28).backbone.state_dict(), SMALL, LoadedNetwork(exported).metadata)
    assert mask_check(exported).status == "warn"
