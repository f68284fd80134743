"""Exported files compute what their network computes, and keep pruned connections at zero."""

from __future__ import annotations

import gzip
import json
import zipfile
from collections.abc import Callable
from decimal import Decimal
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from pipeline.deployment.int8_file import write_int8
from pipeline.deployment.onnx_file import CannotExport, logits_of, write_onnx
from pipeline.deployment.torch_program import write_program
from pipeline.deployment.twin import Twin
from pipeline.models import Network, build_network
from pipeline.models.export import METADATA_KEY
from pipeline.models.pruning.scores import Scores
from pipeline.models.state import effective_state
from pipeline.recipe.sections import Model

MEAN, STD = (0.3, 0.4, 0.5), (0.2, 0.3, 0.25)
ARCHITECTURES = {
    "small_cnn": 28,
    "cnn_small": 28,
    "vgg4_bn_cifar": 32,
    "vgg4_cifar": 32,
    "wrn_28_4": 32,
    "resnet18_w16_cifar": 28,
    "ra_resnet50": 64,
}
"""One of each family of our own, and the size of its images in pixels."""


def pruned_network(arch: str, size: int, keep: str = "0.1") -> Network:
    """With BatchNorm statistics that are not the initial ones, so that folding them matters."""
    model = Model(arch=arch, num_classes=10, mean=MEAN, std=STD)
    network = build_network(model, seed=1, image_size=size)
    network.train()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _ in range(3):
            network(torch.rand(8, 3, size, size, generator=generator))
    Scores.attach(network, Decimal(keep))
    plain = build_network(model, seed=1, image_size=size)
    plain.backbone.load_state_dict(effective_state(network))
    return plain.eval()


def images_of(size: int, count: int, seed: int = 3) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_format_computes_the_networks_logits(arch: str, tmp_path: Path) -> None:
    size = ARCHITECTURES[arch]
    network, images = pruned_network(arch, size), images_of(size, 5)
    with torch.inference_mode():
        expected = network(images).numpy()
    write_onnx(network, size, tmp_path / "model.onnx", {})
    got = logits_of(tmp_path / "model.onnx", images.numpy())
    np.testing.assert_allclose(got, expected, atol=1e-5 * max(1.0, np.abs(expected).max()), rtol=0)
    write_int8(tmp_path / "model.onnx", [images.numpy()], tmp_path / "int8.onnx")
    quantised = logits_of(tmp_path / "int8.onnx", images.numpy())
    spread = expected.max() - expected.min()
    assert np.abs(quantised - expected).max() < 0.25 * spread, "8 bits lose something, not the answer"
    for name, answers, tolerance in (("model.onnx", got, 1e-4), ("int8.onnx", quantised, 0.02)):
        with torch.no_grad():
            twin = Twin(tmp_path / name)(images).numpy()
        np.testing.assert_allclose(twin, answers, atol=tolerance * np.abs(answers).max(), rtol=0, err_msg=name)


@pytest.mark.parametrize("arch", ["small_cnn", "resnet18_w16_cifar"])
def test_the_torch_program_computes_the_networks_logits_for_any_batch(arch: str, tmp_path: Path) -> None:
    size = ARCHITECTURES[arch]
    network = pruned_network(arch, size)
    write_program(network, size, tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2").module()
    for count in (1, 7):
        images = images_of(size, count)
        with torch.inference_mode():
            torch.testing.assert_close(program(images), network(images), atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """small_cnn with 1 % of its connections, in every format."""
    folder = tmp_path_factory.mktemp("files")
    network = pruned_network("small_cnn", 28, "0.01")
    write_onnx(network, 28, folder / "model.onnx", {"class_names": ["café"]})
    write_int8(folder / "model.onnx", [images_of(28, 8).numpy()], folder / "int8.onnx")
    write_program(network, 28, folder / "model.pt2")
    return folder


def weights_of(path: Path) -> list[np.ndarray]:
    tensors = [onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer]
    return [tensor for tensor in tensors if tensor.ndim in (2, 4) and tensor.size > 1000]


def test_pruned_connections_are_zero_in_int8(folder: Path) -> None:
    whole, small = weights_of(folder / "model.onnx"), weights_of(folder / "int8.onnx")
    assert len(whole) == len(small) == 3
    for weight in small:
        assert weight.dtype == np.int8
        assert (weight != 0).mean() <= 0.012
    assert sum(map(np.count_nonzero, small)) <= sum(map(np.count_nonzero, whole))


def test_int8_compresses_to_a_hundredth(folder: Path) -> None:
    parameters = sum(weight.size for weight in weights_of(folder / "model.onnx"))
    assert len(gzip.compress((folder / "int8.onnx").read_bytes())) < 4 * parameters / 80


def test_files_take_any_number_of_images(folder: Path) -> None:
    for name in ("model.onnx", "int8.onnx"):
        session = onnxruntime.InferenceSession(folder / name, providers=["CPUExecutionProvider"])
        (given,), (made,) = session.get_inputs(), session.get_outputs()
        assert (given.name, given.shape[1:], given.type) == ("images", [3, 28, 28], "tensor(float)")
        assert made.name == "logits"
        for count in (1, 6):
            assert logits_of(folder / name, images_of(28, count).numpy()).shape == (count, 10)


def test_files_say_what_they_are_and_name_nothing_of_this_machine(folder: Path) -> None:
    facts = {prop.key: prop.value for prop in onnx.load(folder / "model.onnx").metadata_props}
    assert json.loads(facts[METADATA_KEY]) == {"class_names": ["café"]}
    contents = [(folder / name).read_bytes() for name in ("model.onnx", "int8.onnx")]
    with zipfile.ZipFile(folder / "model.pt2") as archive:
        contents += [archive.read(name) for name in archive.namelist()]
    for content in contents:
        assert str(Path(__file__).parents[3]).encode() not in content
        assert b"site-packages" not in content


def test_equal_networks_give_equal_files(folder: Path, tmp_path: Path) -> None:
    network = pruned_network("small_cnn", 28, "0.01")
    write_onnx(network, 28, tmp_path / "model.onnx", {"class_names": ["café"]})
    assert (tmp_path / "model.onnx").read_bytes() == (folder / "model.onnx").read_bytes()
    write_int8(tmp_path / "model.onnx", [images_of(28, 8).numpy()], tmp_path / "int8.onnx")
    assert (tmp_path / "int8.onnx").read_bytes() == (folder / "int8.onnx").read_bytes()


class Branching(nn.Module):
    """Its answer depends on a condition on values, which no exporter can follow."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = images.flatten(1)[:, :10]
        return features if features.sum() > 3 else -features


@pytest.mark.parametrize("write", [partial(write_onnx, facts={}), write_program], ids=["onnx", "torch"])
def test_what_cannot_be_exported_is_refused_and_leaves_no_file(
    write: Callable[[Network, int, Path], None], tmp_path: Path
) -> None:
    network = Network(Branching(), MEAN, STD).eval()
    with pytest.raises(CannotExport, match=r"cannot express this network: .*data-dependent"):
        write(network, 28, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
