"""Exported networks: files that plain torchvision loads, and clear errors for other files."""

from __future__ import annotations

import os
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.transforms.v2.functional import normalize

from pipeline.models import Network, build_network, export
from pipeline.models.pruning.scores import Scores
from pipeline.models.state import effective_state, layer_counts
from pipeline.recipe.sections import Model

RESNET = Model(arch="resnet18", num_classes=7, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
SMALL = Model(arch="small_cnn", num_classes=10)
FACTS: dict[str, Any] = {"keep_fraction": "0.1", "mask_sha256": "m" * 64, "recipe_sha256": None}


def pruned_network(model: Model) -> Network:
    """At 10 %, with running statistics that are not those of a fresh network."""
    network = build_network(model, seed=1)
    Scores.attach(network, Decimal("0.1"))
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.copy_(torch.randn(module.running_mean.shape, generator=generator) * 0.1)
            module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) + 0.5)
    return network.eval()


def images() -> torch.Tensor:
    return torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_plain_torchvision_loads_the_file_and_gives_the_same_logits(tmp_path: Path) -> None:
    path, network = tmp_path / "model.safetensors", pruned_network(RESNET)
    export.write_model(path, effective_state(network), RESNET, FACTS)

    plain = torchvision.models.resnet18(num_classes=7)
    plain.load_state_dict(load_file(path), strict=True)
    expected = network(images())
    torch.testing.assert_close(plain.eval()(normalize(images(), [0.1, 0.2, 0.3], [0.5, 0.6, 0.7])), expected)
    assert float(expected.std()) > 1e-3
    torch.testing.assert_close(export.load_model(path).eval()(images()), expected)

    state = plain.state_dict()
    for layer in layer_counts(network):
        assert int(state[layer["name"]].count_nonzero()) == layer["kept"]
    metadata = export.read_metadata(path)
    assert metadata == {**RESNET.model_dump(mode="json", exclude=export.ORIGIN), **FACTS}
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, state = tmp_path / "model.safetensors", effective_state(build_network(SMALL, 0))
    export.write_model(path, state, SMALL, {})
    before = path.read_bytes()

    def full(_: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "settle_file", full)
    with pytest.raises(OSError, match="No space left"):
        export.write_model(path, {name: tensor + 1 for name, tensor in state.items()}, SMALL, {})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["model.safetensors"]


def write_other_file(path: Path, kind: str) -> None:
    state = effective_state(build_network(SMALL, 0))
    if kind == "without metadata":
        save_file(state, path)
    elif kind == "with metadata of others":
        save_file(state, path, {"format": "pt"})
    elif kind == "with an unknown architecture":
        export.write_model(path, state, SMALL, {"arch": "vgg12"})
    elif kind == "with the tensors of another":
        export.write_model(path, state, RESNET, {})
    elif kind == "truncated":
        export.write_model(path, state, SMALL, {})
        os.truncate(path, path.stat().st_size - 1000)
    else:
        path.write_bytes(b"PK\x03\x04 not safetensors at all")


@pytest.mark.parametrize(
    "kind",
    [
        "without metadata",
        "with metadata of others",
        "with an unknown architecture",
        "with the tensors of another",
        "truncated",
        "of another format",
    ],
)
def test_other_files_are_refused_by_name(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "model.safetensors"
    write_other_file(path, kind)
    with pytest.raises(ValueError, match=f"{path} is damaged or was not written by this project: .") as caught:
        export.load_model(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{tmp_path / 'absent'} does not exist; a stage writes it"):
        export.load_model(tmp_path / "absent")
