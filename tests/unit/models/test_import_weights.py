"""Third-party weights: files in their formats give the same logits here as in the networks that wrote them."""

from __future__ import annotations

import argparse
import errno
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.models import Network, build_network
from pipeline.models.export import METADATA_KEY, write_model
from pipeline.models.import_weights import load_foreign
from pipeline.models.state import effective_state
from pipeline.recipe.sections import Model

State = dict[str, Tensor]
PLAIN: dict[str, Any] = {"num_classes": 10, "mean": (0, 0, 0), "std": (1, 1, 1)}


def with_random_state(network: nn.Module) -> nn.Module:
    """With running statistics, affine parameters and biases that are not those of a fresh network."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor, low in ((module.running_mean, -0.1), (module.running_var, 0.8), (module.weight, 0.8)):
                    assert tensor is not None
                    tensor.copy_(torch.rand(tensor.shape, generator=generator) * 0.4 + low)
                module.bias.uniform_(-0.1, 0.1, generator=generator)
    return network.eval()


def images(size: int = 32) -> Tensor:
    return torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def assert_same_logits(path: Path, model: Model, source: Callable[[Tensor], Tensor], size: int = 32) -> Network:
    network = build_network(model, seed=8, image_size=size)
    load_foreign(network, path, model)
    expected = source(images(size))
    torch.testing.assert_close(network.eval()(images(size)), expected, rtol=1e-4, atol=1e-5)
    assert float(expected.std()) > 1e-4
    return network


# Third-party networks, with their names


class TheirBasicBlock(nn.Module):
    """As kuangliu's and RobustBench's CIFAR ResNet names things."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        changes = stride != 1 or inputs != outputs
        projection = (nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)) if changes else ()
        self.shortcut = nn.Sequential(*projection)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.shortcut(x))


class TheirCifarResNet18(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = nn.Sequential(TheirBasicBlock(64, 64, 1), TheirBasicBlock(64, 64, 1))
        self.layer2 = nn.Sequential(TheirBasicBlock(64, 128, 2), TheirBasicBlock(128, 128, 1))
        self.layer3 = nn.Sequential(TheirBasicBlock(128, 256, 2), TheirBasicBlock(256, 256, 1))
        self.layer4 = nn.Sequential(TheirBasicBlock(256, 512, 2), TheirBasicBlock(512, 512, 1))
        self.linear = nn.Linear(512, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer4(self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x)))))))
        return self.linear(F.avg_pool2d(x, 4).flatten(1))


class TheirWideBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        if inputs != outputs:
            self.convShortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        if hasattr(self, "convShortcut"):
            x = self.convShortcut(out)
        return x + self.conv2(F.relu(self.bn2(self.conv1(out))))


class TheirWideGroup(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        blocks = [TheirWideBlock(inputs if i == 0 else outputs, outputs, stride if i == 0 else 1) for i in range(4)]
        self.layer = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class TheirWRN28x4(nn.Module):
    """With the names of TRADES, HYDRA's reference code and RobustBench, and the group that they never call."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.block1 = TheirWideGroup(16, 64, 1)
        self.sub_block1 = TheirWideGroup(16, 64, 1)
        self.block2 = TheirWideGroup(64, 128, 2)
        self.block3 = TheirWideGroup(128, 256, 2)
        self.bn1 = nn.BatchNorm2d(256)
        self.fc = nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.block3(self.block2(self.block1(self.conv1(x))))))
        return self.fc(F.avg_pool2d(x, 8).flatten(1))


def reference_mask(scores: Tensor, keep: float) -> Tensor:
    """HYDRA's reference: a full ascending sort, the first int((1 - k) n) of which are dropped; distinct scores."""
    mask = torch.ones(scores.numel())
    mask[scores.abs().flatten().argsort()[: int((1 - keep) * scores.numel())]] = 0
    return mask.view(scores.shape)


class TheirMaskedConv(nn.Conv2d):
    keep = 1.0

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, kernel_size=3, padding=1, bias=False)
        self.popup_scores = nn.Parameter(torch.randn(self.weight.shape))

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight * reference_mask(self.popup_scores, self.keep), self.bias)


class TheirMaskedLinear(nn.Linear):
    keep = 1.0

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.popup_scores = nn.Parameter(torch.randn(self.weight.shape))

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight * reference_mask(self.popup_scores, self.keep), self.bias)


class TheirMaskedVGG4(nn.Module):
    """HYDRA's vgg4_bn."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs, last in ((3, 64, False), (64, 64, True), (64, 128, False), (128, 128, True)):
            layers += [TheirMaskedConv(inputs, outputs), nn.BatchNorm2d(outputs), nn.ReLU()]
            layers += [nn.MaxPool2d(2, 2)] if last else []
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d((2, 2))
        self.classifier = nn.Sequential(
            *(
                TheirMaskedLinear(512, 256),
                nn.ReLU(),
                TheirMaskedLinear(256, 256),
                nn.ReLU(),
                TheirMaskedLinear(256, 10),
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.avgpool(self.features(x)).flatten(1))

    def at(self, keep: float) -> TheirMaskedVGG4:
        for module in self.modules():
            if isinstance(module, (TheirMaskedConv, TheirMaskedLinear)):
                module.keep = keep
        return self


class TheirNormalisation(nn.Module):
    def __init__(self, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.get_buffer("mean")) / self.get_buffer("std")


def their_small_cnn() -> nn.Sequential:
    """Wong et al.'s small network for CIFAR, which most tests below use because it is fast."""
    torch.manual_seed(4)
    convolutions = (nn.Conv2d(3, 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 4, 2, 1), nn.ReLU())
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(2048, 100), nn.ReLU(), nn.Linear(100, 10))


SMALL = Model(arch="cnn_small", **PLAIN)


# What fits


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_torchvision_and_timm(tmp_path: Path, ending: str) -> None:
    """timm's ResNets have torchvision's names."""
    torch.manual_seed(0)
    source = with_random_state(torchvision.models.resnet18(num_classes=10))
    path = tmp_path / f"resnet18.{ending}"
    if ending == "pth":
        torch.save(source.state_dict(), path)
    else:
        save_file(source.state_dict(), path)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def on_pixels(x: Tensor) -> Tensor:
        return source((x - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1))

    network = assert_same_logits(path, Model(arch="resnet18", num_classes=10), on_pixels, 64)
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in network.parameters())


def test_cifar_resnet_of_robustbench_behind_its_normalisation(tmp_path: Path) -> None:
    torch.manual_seed(0)
    mean, std = [0.4914, 0.4822, 0.4465], [0.2471, 0.2435, 0.2616]
    parts = OrderedDict(normalize=TheirNormalisation(mean, std), model=with_random_state(TheirCifarResNet18()))
    source = nn.Sequential(parts)
    torch.save({"state_dict": nn.DataParallel(source).state_dict(), "epoch": 90}, tmp_path / "r18.pt")
    model = Model.model_validate({"arch": "resnet18_cifar", "num_classes": 10, "mean": mean, "std": std})
    assert_same_logits(tmp_path / "r18.pt", model, source.eval())


def test_wide_resnet_of_the_reference_with_its_unused_group(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = with_random_state(TheirWRN28x4())
    checkpoint = {"epoch": 100, "arch": "wrn_28_4", "state_dict": source.state_dict(), "best_prec1": 57.2}
    torch.save(checkpoint, tmp_path / "checkpoint.pth.tar")
    assert_same_logits(tmp_path / "checkpoint.pth.tar", Model(arch="wrn_28_4", **PLAIN), source)


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("keep", [None, 0.9, 0.01])
def test_masked_vgg_of_the_reference(tmp_path: Path, prefix: str, keep: float | None) -> None:
    """At 0.9 the reference keeps 2305 of the last layer's 2560 weights, not 2304; its files must load the same way."""
    torch.manual_seed(0)
    source = TheirMaskedVGG4()
    with_random_state(source)
    state = {prefix + name: tensor for name, tensor in source.state_dict().items()}
    optimizer = torch.optim.SGD(source.parameters(), lr=0.1, momentum=0.9)
    torch.save({"state_dict": state, "optimizer": optimizer.state_dict()}, tmp_path / "masked.pth.tar")
    model = Model.model_validate({"arch": "vgg4_bn_cifar", **PLAIN, "weights": "x", "weights_keep_fraction": keep})
    network = assert_same_logits(tmp_path / "masked.pth.tar", model, source.at(keep or 1.0))
    kept = int(network.backbone.state_dict()["classifier.4.weight"].count_nonzero())
    assert kept == {None: 2560, 0.9: 2305, 0.01: 26}[keep]


def test_dense_file_of_the_reference(tmp_path: Path) -> None:
    source = their_small_cnn()
    torch.save({"state_dict": source.state_dict()}, tmp_path / "dense.pth.tar")
    assert_same_logits(tmp_path / "dense.pth.tar", SMALL, source)


def test_first_densenets_of_torchvision(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = with_random_state(torchvision.models.densenet121(num_classes=10))
    old = {re.sub(r"(\.(?:norm|conv))([12]\.)", r"\1.\2", name): tensor for name, tensor in source.state_dict().items()}
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    assert "features.denseblock1.denselayer1.norm1.weight" not in old
    torch.save(old, tmp_path / "densenet.pth")
    assert_same_logits(tmp_path / "densenet.pth", Model(arch="densenet121", **PLAIN), source, 32)


def test_a_network_of_this_project(tmp_path: Path) -> None:
    source = build_network(SMALL, 0, 32)
    write_model(tmp_path / "model.safetensors", effective_state(source), SMALL, {"image_size": 32})
    assert_same_logits(tmp_path / "model.safetensors", SMALL, source)
    other = SMALL.model_copy(update={"mean": (0.5, 0.5, 0.5)})
    with pytest.raises(ValueError, match=re.escape("set model.mean=[0.0, 0.0, 0.0]")):
        load_foreign(build_network(other, 0, 32), tmp_path / "model.safetensors", other)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_old_files_and_other_dtypes(tmp_path: Path, dtype: torch.dtype, legacy: bool) -> None:
    source = their_small_cnn().to(dtype)
    torch.save(source.state_dict(), tmp_path / "w.pth", _use_new_zipfile_serialization=not legacy)
    network = assert_same_logits(tmp_path / "w.pth", SMALL, source.to(torch.float32))
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}


def test_files_from_before_batches_were_counted(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = TheirMaskedVGG4()
    with_random_state(source)
    state = {k: v for k, v in source.state_dict().items() if not k.endswith(("num_batches_tracked", "popup_scores"))}
    torch.save(state, tmp_path / "old.pth")
    assert_same_logits(tmp_path / "old.pth", Model(arch="vgg4_bn_cifar", **PLAIN), source)


# What does not fit


def refusal(path: Path, model: Model = SMALL) -> str:
    """The error message about the file; the network is unchanged."""
    network = build_network(model, 0, 32)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        load_foreign(network, path, model)
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert "\n" not in str(caught.value)
    return str(caught.value)


def save_changed(path: Path, change: Callable[[State], Any]) -> Path:
    """Saves cnn_small's state dict after `change`, which modifies it in place or returns a replacement."""
    state = dict(their_small_cnn().state_dict())
    torch.save(change(state) or state, path)
    return path


def test_every_mismatch_is_listed(tmp_path: Path) -> None:
    def change(state: State) -> None:
        del state["0.bias"], state["2.weight"]
        state["9.weight"] = state["extra"] = torch.zeros(3)
        state["7.weight"] = torch.zeros(11, 100)
        state["7.bias"] = torch.zeros(11)

    message = refusal(save_changed(tmp_path / "w.pth", change))
    assert "does not fit model.arch cnn_small with num_classes 10, read as the network's own names: " in message
    assert "missing ['0.bias', '2.weight'], unexpected ['9.weight', 'extra'], shape mismatch [" in message
    assert "'7.weight ((11, 100) in the file, (10, 100) in the network)'" in message
    assert "'7.bias ((11,) in the file, (10,) in the network)'" in message
    assert message.endswith("set model.arch to the file's architecture, or give another file")


def test_the_nearest_names_are_reported(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = TheirCifarResNet18().state_dict()
    del state["linear.bias"]
    torch.save(state, tmp_path / "w.pth")
    message = refusal(tmp_path / "w.pth", Model(arch="resnet18_cifar", **PLAIN))
    assert "read as CIFAR ResNets of HYDRA's reference and RobustBench: missing ['fc.bias'], unexpected []" in message


def test_the_file_of_another_network_is_refused_key_by_key(tmp_path: Path) -> None:
    state = build_network(Model(arch="vgg2_bn_cifar", **PLAIN), 0).backbone.state_dict()
    torch.save(state, tmp_path / "vgg.pth")
    message = refusal(tmp_path / "vgg.pth")
    expected = [*their_small_cnn().state_dict(), *state]
    assert [name for name in expected if f"'{name}'" not in message] == []


@pytest.mark.parametrize("names", [("mean", "std"), ("normalize.mean", "normalize.std"), ("module.mu", "module.sigma")])
def test_another_normalisation_is_refused_with_the_fix(tmp_path: Path, names: tuple[str, str]) -> None:
    def change(state: State) -> None:
        state[names[0]] = torch.tensor([0.5, 0.25, 0.125]).view(3, 1, 1)
        state[names[1]] = torch.tensor([2.0])

    path = save_changed(tmp_path / "w.pth", change)
    message = refusal(path)
    assert f"{names[0]} is [0.5, 0.25, 0.125], but model.mean is [0.0, 0.0, 0.0]; " in message
    assert f"set model.mean=[0.5, 0.25, 0.125]; {names[1]} is [2.0, 2.0, 2.0]" in message
    assert "set model.std=[2.0, 2.0, 2.0]" in message
    matching = Model(arch="cnn_small", num_classes=10, mean=(0.5, 0.25, 0.125), std=(2, 2, 2))
    load_foreign(build_network(matching, 0, 32), path, matching)


def test_non_finite_weights_are_refused(tmp_path: Path) -> None:
    def change(state: State) -> None:
        state["5.bias"].fill_(torch.nan)

    message = refusal(save_changed(tmp_path / "w.pth", change))
    assert "holds NaN or infinity in ['5.bias']" in message


MASKED = Model.model_validate({"arch": "cnn_small", **PLAIN, "weights": "x", "weights_keep_fraction": 0.5})


def test_a_mask_needs_scores_that_fit(tmp_path: Path) -> None:
    message = refusal(save_changed(tmp_path / "dense.pth", lambda state: None), MASKED)
    assert "holds no popup_scores, so there is no mask to apply; remove model.weights_keep_fraction" in message

    def with_scores(state: State, score: Tensor) -> None:
        state["0.popup_scores"] = score

    message = refusal(
        save_changed(tmp_path / "misshapen.pth", lambda state: with_scores(state, torch.zeros(3))), MASKED
    )
    assert "0.popup_scores has no 0.weight of the same shape (3,)" in message
    message = refusal(
        save_changed(tmp_path / "nan.pth", lambda state: with_scores(state, torch.nan * state["0.weight"])), MASKED
    )
    assert "0.popup_scores: scores contain NaN" in message


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert refusal(tmp_path / "absent.pth").startswith(f"model.weights = {tmp_path / 'absent.pth'} does not exist")


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "text"])
def test_damaged_files_are_named(tmp_path: Path, ending: str, damage: str) -> None:
    path = tmp_path / f"w.{ending}"
    state = their_small_cnn().state_dict()
    if ending == "pth":
        torch.save(state, path)
    else:
        save_file(state, path)
    if damage == "truncated":
        os.truncate(path, path.stat().st_size // 2)
    else:
        path.write_bytes(b"" if damage == "empty" else b"<!DOCTYPE html><title>404</title>")
    assert " is damaged or no" in refusal(path)


class Malicious:
    """A pickle that creates a folder when pickle.load reads it."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_malicious_pickle_is_refused_and_does_not_run(tmp_path: Path, legacy: bool) -> None:
    path, target = tmp_path / "w.pth", tmp_path / "done"
    content = {"state_dict": their_small_cnn().state_dict(), "best": Malicious(target)}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    message = refusal(path)
    assert "it refers to posix.mkdir" in message
    assert "save its state dict alone, preferably as .safetensors" in message
    assert not target.exists()
    torch.load(path, weights_only=False)
    assert target.exists(), "the file must be harmful for the test to prove anything"


def test_harmless_objects_are_refused_as_well(tmp_path: Path) -> None:
    path = save_changed(tmp_path / "timm.pth", lambda state: {"state_dict": state, "args": argparse.Namespace(lr=0.1)})
    assert "it refers to argparse.Namespace" in refusal(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"epoch": 3, "weights": {}}, "a mapping with the keys ['epoch', 'weights']; expected a state dict, alone"),
        ({"model": {"0.weight": torch.zeros(1), "lr": 0.1}}, "a mapping with the keys ['0.weight', 'lr']"),
        ([torch.zeros(2)], "holds list; expected a state dict, alone or under one of state_dict, model_state_dict"),
        ({}, "a mapping with the keys []"),
    ],
)
def test_files_without_a_state_dict_are_refused_with_their_content(tmp_path: Path, content: Any, words: str) -> None:
    torch.save(content, tmp_path / "w.pth")
    assert words in refusal(tmp_path / "w.pth")


@pytest.mark.parametrize("damage", range(8))
def test_a_changed_bit_of_a_torch_file_is_noticed(tmp_path: Path, damage: int) -> None:
    """torch itself does not compare the checksums of a zip archive."""
    path = tmp_path / "w.pth"
    torch.save(their_small_cnn().state_dict(), path)
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda part: part.file_size)
    whole = bytearray(path.read_bytes())
    whole[largest.header_offset + 200 + damage * largest.file_size // 10] ^= 1 << damage
    path.write_bytes(whole)
    torch.load(path, weights_only=True)
    message = refusal(path)
    assert "w.pth is damaged (Bad CRC-32 for file" in message
    assert message.endswith("download it again")


def zip_with(path: Path, name: str, content: bytes, compression: int = zipfile.ZIP_STORED) -> None:
    """A file of torch.save with one of its parts exchanged."""
    torch.save({"a": torch.zeros(3)}, path)
    with zipfile.ZipFile(path) as archive:
        parts = {part.filename: archive.read(part) for part in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for part, data in parts.items():
            exchanged = part.endswith(name)
            archive.writestr(part, content if exchanged else data, compression if exchanged else zipfile.ZIP_STORED)


GIB_64 = b"\x8a\x05" + (64 << 30).to_bytes(5, "little")
BOMBS = {
    "bytearray": b"\x80\x02cbuiltins\nbytearray\n" + GIB_64 + b"\x85R.",
    "Python 2's bytearray": b"\x80\x02c__builtin__\nbytearray\n" + GIB_64 + b"\x85R.",
    "codec": b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x09\x00\x00\x00hex_codec\x86R.",
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("bomb", BOMBS)
def test_a_pickle_that_would_fill_the_memory_is_refused(tmp_path: Path, bomb: str, legacy: bool) -> None:
    path = tmp_path / "w.pth"
    if legacy:
        path.write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + BOMBS[bomb])
    else:
        zip_with(path, "data.pkl", BOMBS[bomb])
    assert re.search(r"was not read: it calls \w+\.(bytearray|encode), which no tensor needs", refusal(path))


def test_a_compressed_archive_is_not_unpacked(tmp_path: Path) -> None:
    zip_with(tmp_path / "w.pth", "data/0", bytes(1 << 20), zipfile.ZIP_DEFLATED)
    assert "data/0' in it is compressed, which torch.save never does" in refusal(tmp_path / "w.pth")


@pytest.mark.parametrize("name", ["a.weight", "mean", "fc.popup_scores"])
def test_a_tensor_that_repeats_one_value_is_not_copied(tmp_path: Path, name: str) -> None:
    path = tmp_path / "w.pth"
    torch.save({name: torch.zeros(1).expand(1 << 40)}, path)
    assert path.stat().st_size < 10_000
    assert f"{name} [1099511627776] is not stored value by value" in refusal(path)


def test_a_small_tensor_that_repeats_one_value_is_read(tmp_path: Path) -> None:
    path = save_changed(tmp_path / "w.pth", lambda state: {**state, "mean": torch.zeros(1).expand(3)})
    load_foreign(build_network(SMALL, 0, 32), path, SMALL)


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("tensor", [torch.eye(3).to_sparse(), torch.empty(3, device="meta")], ids=["sparse", "meta"])
def test_tensors_without_values_are_refused(tmp_path: Path, tensor: Tensor) -> None:
    torch.save({"a.weight": tensor}, tmp_path / "w.pth")
    assert "a.weight [" in (message := refusal(tmp_path / "w.pth"))
    assert "is not stored value by value" in message


def test_a_normalisation_of_another_length_is_not_printed(tmp_path: Path) -> None:
    path = save_changed(tmp_path / "w.pth", lambda state: {**state, "mean": torch.zeros(100_000)})
    assert "mean has the shape [100000], and model.mean has 3 values" in refusal(path)


def test_weights_that_may_not_be_read_are_called_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_changed(tmp_path / "w.pth", lambda state: state)

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")  # root may read every file

    monkeypatch.setattr(Path, "open", refuse)
    assert "w.pth cannot be read: Permission denied" in refusal(path)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"mean": {}}', '{"mean": [null]}', '{"std": [1e999, "a"]}', "7", "{"])
def test_metadata_that_is_no_normalisation_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "w.safetensors"
    save_file(dict(their_small_cnn().state_dict()), path, {METADATA_KEY: text})
    assert "w.safetensors is damaged or not safetensors" in refusal(path)


@pytest.mark.parametrize("header", [2**63, 2**40, 99_000_000])
def test_a_safetensors_header_that_claims_to_be_huge_is_refused(tmp_path: Path, header: int) -> None:
    path = tmp_path / "w.safetensors"
    save_file(dict(their_small_cnn().state_dict()), path)
    path.write_bytes(header.to_bytes(8, "little") + path.read_bytes()[8:])
    assert "w.safetensors is damaged or not safetensors" in refusal(path)
