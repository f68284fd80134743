"""Files of weights as other training programs wrap them, and files that hold what no weight is."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline.models import build_network, head_names
from pipeline.models.import_weights import load_foreign
from pipeline.recipe.sections import Model

State = dict[str, Tensor]
MEAN, STD = (0.5, 0.25, 0.125), (0.25, 0.5, 0.125)
SMALL = Model(arch="vgg2_bn_cifar", num_classes=10, mean=MEAN, std=STD)


def source_network() -> nn.Module:
    """As a training leaves it: running statistics and counts are not those of a fresh network."""
    network = build_network(SMALL, 7).backbone
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if name.endswith(("running_mean", "running_var")):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            elif name.endswith("num_batches_tracked"):
                tensor.fill_(1234)
    return network


SOURCE: State = source_network().state_dict()


class TheirNormalizer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("new_mean", torch.tensor(MEAN)[..., None, None])
        self.register_buffer("new_std", torch.tensor(STD)[..., None, None])


class TheirAttacker(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.normalize = TheirNormalizer()
        self.model = model


class TheirAttackerModel(nn.Module):
    """As MadryLab's robustness names things: the network is registered twice, its normalisation too."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.normalizer = TheirNormalizer()
        self.model = model
        self.attacker = TheirAttacker(model)


def of_robustness() -> dict[str, Any]:
    state = nn.DataParallel(TheirAttackerModel(source_network())).state_dict()
    assert {"module.model.features.0.weight", "module.attacker.model.features.0.weight"} <= state.keys()
    assert {"module.normalizer.new_mean", "module.attacker.normalize.new_std"} <= state.keys()
    return {"model": state, "epoch": 90, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}}


def with_prefix(prefix: str) -> State:
    return {prefix + name: tensor for name, tensor in SOURCE.items()}


FILES: dict[str, Callable[[], Any]] = {
    "plain": lambda: SOURCE,
    "torch.compile": lambda: with_prefix("_orig_mod."),
    "torch.compile in DataParallel": lambda: with_prefix("module._orig_mod."),
    "DataParallel in torch.compile": lambda: {"state_dict": with_prefix("_orig_mod.module.")},
    "one compiled part": lambda: {
        re.sub("^features", "features._orig_mod", name): tensor for name, tensor in SOURCE.items()
    },
    "robustness": of_robustness,
    "robustness, the attacker's copy alone": lambda: with_prefix("module.attacker.model."),
    "DeepSpeed": lambda: {
        "module": SOURCE,
        "buffer_names": [],
        "param_shapes": [{name: tensor.shape for name, tensor in SOURCE.items()}],
        "optimizer": None,
        "global_steps": 7,
        "ds_config": {"zero_optimization": {"stage": 1}},
        "ds_version": "0.19.8",
    },
    "Lightning": lambda: {
        "epoch": 3,
        "global_step": 9,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": with_prefix("classifier_net."),
        "loops": {},
        "optimizer_states": [],
    },
    "RobustBench": lambda: {
        "state_dict": with_prefix("module.model.")
        | {"module.normalize.mean": torch.tensor(MEAN), "module.normalize.std": torch.tensor(STD)}
    },
}


@pytest.mark.parametrize("wrapper", FILES)
def test_every_tensor_is_that_of_the_file_bit_for_bit(tmp_path: Path, wrapper: str) -> None:
    torch.save(FILES[wrapper](), tmp_path / "w.pt")
    network = build_network(SMALL, 8)
    load_foreign(network, tmp_path / "w.pt", SMALL)
    state = network.backbone.state_dict()
    assert state.keys() == SOURCE.keys()
    for name, tensor in state.items():
        assert tensor.dtype == SOURCE[name].dtype
        assert torch.equal(tensor, SOURCE[name]), name
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in network.parameters())


def refusal(path: Path, model: Model = SMALL) -> str:
    """The error, of one line, that names the file; the network is unchanged."""
    network = build_network(model, 0, 32)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        load_foreign(network, path, model, 32)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert "\n" not in str(caught.value)
    return str(caught.value)


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def test_a_copy_that_differs_is_refused(tmp_path: Path) -> None:
    content = of_robustness()
    name = "module.attacker.model.features.0.weight"
    content["model"][name] = content["model"][name] + 1
    message = refusal(saved(tmp_path / "w.pt", content))
    assert f"module.model.features.0.weight and {name} should be the same tensor and differ" in message


def test_what_lies_beside_the_network_is_named_and_nothing_else(tmp_path: Path) -> None:
    state = with_prefix("model.") | {"criterion.weight": torch.ones(10)}
    message = refusal(saved(tmp_path / "w.ckpt", {"state_dict": state}))
    assert "missing [], unexpected ['criterion.weight'], shape mismatch []" in message


@pytest.mark.parametrize("key", ["state_dict", "module"])
def test_a_mapping_within_itself_is_refused(tmp_path: Path, key: str) -> None:
    content: dict[str, Any] = {"epoch": 1}
    content[key] = content
    message = refusal(saved(tmp_path / "w.pt", content))
    assert f"holds no state dict under {key} / {key} / " in message
    assert "is it a mapping within itself?" in message


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "int8": lambda tensor: tensor.to(torch.int8),
    "int64": lambda tensor: tensor.to(torch.int64),
    "bool": lambda tensor: tensor > 0,
    "float8_e4m3fn": lambda tensor: tensor.to(torch.float8_e4m3fn),
    "complex64": lambda tensor: tensor.to(torch.complex64),
}


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["features.0.weight", "features.1.running_var", "normalize.mean"])
def test_kinds_of_numbers_that_no_weight_is_are_refused(tmp_path: Path, kind: str, ending: str, name: str) -> None:
    path, tensor = tmp_path / f"w.{ending}", KINDS[kind](SOURCE.get(name, torch.tensor(MEAN)))
    state = {"module." + key: value for key, value in (SOURCE | {name: tensor}).items()}
    torch.save(state, path) if ending == "pt" else save_file(state, path)
    message = refusal(path)
    if name != "normalize.mean" or kind not in ("int8", "int64"):  # whole numbers, which are others than the recipe's
        assert f"module.{name} is {kind}; weights must be float32, float64, float16 or bfloat16" in message


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["sparse", "meta", "quantised"])
def test_tensors_without_plain_values_are_refused(tmp_path: Path, kind: str) -> None:
    name = "classifier.0.weight"
    tensor = {
        "sparse": lambda tensor: tensor.to_sparse(),
        "meta": lambda tensor: tensor.to("meta"),
        "quantised": lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8),
    }[kind](SOURCE[name])
    message = refusal(saved(tmp_path / "w.pt", SOURCE | {name: tensor}))
    assert f"{name} [" in message
    assert message.endswith("is not stored value by value; save the state dict of plain tensors")


def zip_of(path: Path, parts: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    return path


ARCHIVES: dict[str, dict[str, bytes]] = {
    "empty": {},
    "no pickle": {"w/data/0": bytes(12), "w/version": b"3\n"},
    "no data": {"w/data.pkl": b"\x80\x02}q\x00.", "w/version": b"3\n"},
    "a pickle that ends early": {"w/data.pkl": b"\x80\x02}q\x00(X\x01", "w/version": b"3\n"},
    "a pickle of nothing": {"w/data.pkl": b"", "w/version": b"3\n"},
    "a program": {"w/code/__torch__.py": b"x", "w/constants.pkl": b"\x80\x02).", "w/data.pkl": b"\x80\x02)."},
}


@pytest.mark.parametrize("archive", ARCHIVES)
def test_archives_that_hold_no_state_dict_are_refused(tmp_path: Path, archive: str) -> None:
    assert re.search("is damaged or not a weights file|holds ", refusal(zip_of(tmp_path / "w.pt", ARCHIVES[archive])))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), legacy=st.booleans())
def test_however_a_file_is_damaged_it_is_refused_by_name(tmp_path: Path, data: st.DataObject, legacy: bool) -> None:
    """It has no tensor of the network, so that what is read after all does not fit."""
    path = tmp_path / "w.pt"
    torch.save({"a.weight": torch.arange(3.0)}, path, _use_new_zipfile_serialization=not legacy)
    whole = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    refusal(path)


# Another number of classes


@pytest.mark.parametrize(
    ("arch", "head"),
    [
        ("small_cnn", "fc2"),
        ("vgg2_cifar", "classifier.4"),
        ("wrn_28_4", "fc"),
        ("resnet18_w16_cifar", "fc"),
        ("cnn_small", "7"),
        ("squeezenet1_1", "classifier.1"),
        ("shufflenet_v2_x0_5", "fc"),
        ("mobilenet_v3_small", "classifier.3"),
    ],
)
def test_the_last_layer_is_what_depends_on_the_number_of_classes(arch: str, head: str) -> None:
    model = Model(arch=arch, num_classes=10)
    network = build_network(model, 0, 32 if arch.startswith("cnn") else None)
    assert head_names(network, model, 32) == {f"{head}.weight", f"{head}.bias"}
    with pytest.raises(ValueError, match="cnn_small is built for images of one size"):
        head_names(network, Model(arch="cnn_small", num_classes=10), None)


@pytest.mark.parametrize("classes", [3, 10, 37])
def test_a_new_head_is_that_of_the_seed_and_the_body_that_of_the_file(tmp_path: Path, classes: int) -> None:
    """With as many classes, too: they may be others."""
    values = SMALL.model_dump() | {"num_classes": classes, "weights": "x", "weights_head": "new"}
    model, path = Model.model_validate(values), saved(tmp_path / "w.pt", {"state_dict": with_prefix("module.")})
    network, fresh = build_network(model, 8), build_network(model, 8).backbone.state_dict()
    load_foreign(network, path, model)
    for name, tensor in network.backbone.state_dict().items():
        expected = fresh if name.startswith("classifier.4.") else SOURCE
        assert torch.equal(tensor, expected[name]), name


def test_a_new_head_leaves_no_other_tensor_out(tmp_path: Path) -> None:
    model = Model.model_validate(SMALL.model_dump() | {"weights": "x", "weights_head": "new"})
    state = dict(SOURCE)
    del state["classifier.2.bias"], state["classifier.4.bias"]
    message = refusal(saved(tmp_path / "w.pt", state), model)
    assert "missing ['classifier.2.bias'], unexpected [], shape mismatch []" in message


def test_another_number_of_classes_is_refused_with_both_remedies(tmp_path: Path) -> None:
    path = saved(tmp_path / "w.pt", SOURCE)
    message = refusal(path, SMALL.model_copy(update={"num_classes": 3}))
    assert "classifier.4.weight ((10, 256) in the file, (3, 256) in the network)" in message
    assert message.endswith("set model.weights_head=new, which trains a new last layer")
