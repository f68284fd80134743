"""The twin of an ONNX file computes its logits, and has a straight-through gradient."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from pipeline.deployment.attacked_file import AttackedFile, ScaledLogits
from pipeline.deployment.onnx_file import INPUT, OUTPUT, logits_of
from pipeline.deployment.twin import CannotTwin, Twin


def write_graph(path: Path, nodes: list[onnx.NodeProto], **constants: np.ndarray) -> Path:
    """An ONNX file of `nodes` from images [n, 3, 2, 2] to logits of the same shape."""
    shape = ["n", 3, 2, 2]
    given = helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, shape)
    made = helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, shape)
    tensors = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "graph", [given], [made], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, path)
    return path


@pytest.fixture
def rounding(tmp_path: Path) -> Path:
    """Rounds images to multiples of 0.1 in [-0.2, 25.3]: zero point 2."""
    scale, zero_point = np.float32(0.1), np.uint8(2)
    nodes = [
        helper.make_node("QuantizeLinear", [INPUT, "scale", "zero_point"], ["levels"]),
        helper.make_node("DequantizeLinear", ["levels", "scale", "zero_point"], [OUTPUT]),
    ]
    return write_graph(tmp_path / "rounding.onnx", nodes, scale=np.array(scale), zero_point=np.array(zero_point))


def test_rounding_passes_the_gradient_within_the_range_only(rounding: Path) -> None:
    images = torch.tensor([-1.0, -0.26, -0.14, 0.0, 0.049, 0.12, 1.0, 25.2, 25.4, 30.0, 0.35, 0.25]).view(1, 3, 2, 2)
    images.requires_grad_()
    logits = Twin(rounding)(images)
    np.testing.assert_allclose(logits.detach().numpy(), logits_of(rounding, images.detach().numpy()), atol=1e-6)
    (gradient,) = torch.autograd.grad(logits.sum(), images)
    inside = (images >= -0.2) & (images <= 25.3)
    assert torch.equal(gradient, inside.float())


def test_an_attacked_file_answers_as_the_file_with_the_twins_gradient(rounding: Path) -> None:
    file, images = AttackedFile(rounding), torch.rand(5, 3, 2, 2, generator=torch.Generator().manual_seed(0)) * 40 - 5
    expected = logits_of(rounding, images.numpy())
    assert torch.equal(file(images), torch.from_numpy(expected))
    images.requires_grad_()
    logits = file(images)
    assert np.array_equal(logits.detach().numpy(), expected)
    weights = torch.linspace(-1, 1, logits.numel()).view_as(logits)
    (got,) = torch.autograd.grad((logits * weights).sum(), images)
    (want,) = torch.autograd.grad((file.twin(images) * weights).sum(), images)
    assert torch.equal(got, want)
    assert 0 < got.count_nonzero() < got.numel()


def test_an_operation_without_a_known_gradient_is_refused_by_name(tmp_path: Path) -> None:
    path = write_graph(tmp_path / "erf.onnx", [helper.make_node("Erf", [INPUT], [OUTPUT])])
    with pytest.raises(CannotTwin, match="Erf"):
        Twin(path)


def test_cross_entropy_does_not_saturate_on_scaled_logits() -> None:
    """Large logits have no gradient in float32; scaled ones have, and the same class."""
    network = torch.nn.Linear(6, 4)
    confident = torch.nn.Sequential(network, torch.nn.Flatten(), _Times(1e4))
    x = torch.rand(8, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = network(x).argmax(1)
    for module, alive in ((confident, False), (ScaledLogits(confident), True)):
        logits = module(x)
        assert torch.equal(logits.argmax(1), y)
        (gradient,) = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, y), x)
        assert bool(gradient.abs().sum(1).gt(0).all()) == alive


class _Times(torch.nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.factor * x
