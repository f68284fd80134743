"""`verify`: what is wrong with an exported folder is one message, and what is right passes."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from launch.__main__ import main
from pipeline.deployment.card import Card
from pipeline.deployment.folder import export_network
from pipeline.deployment.onnx_file import write_onnx
from pipeline.evaluation.load import LoadedNetwork
from pipeline.models import build_network
from pipeline.models.export import write_model
from pipeline.recipe.sections import Model
from pipeline.run.files import sha256_of

MODEL = Model(arch="small_cnn", num_classes=10, mean=(0.3, 0.3, 0.3), std=(0.2, 0.2, 0.2))
NAMES = [f"class {i}" for i in range(9)] + ["<b>*shirt*"]


def network_of(folder: Path, seed: int, keep: float) -> LoadedNetwork:
    """Whose weights of layers are zero, but for a share `keep`."""
    state = build_network(MODEL, seed, 28).backbone.state_dict()
    for name, tensor in state.items():
        if tensor.dim() > 1:
            generator = torch.Generator().manual_seed(len(name))
            state[name] = tensor * (torch.rand(tensor.shape, generator=generator) < keep)
    facts = {"image_size": 28, "class_names": NAMES, "keep_fraction": "0.1"}
    write_model(folder / "model.safetensors", state, MODEL, facts)
    return LoadedNetwork(folder / "model.safetensors")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned network as a float32 ONNX file, outside a run."""
    folder = tmp_path_factory.mktemp("network")
    export_network(network_of(folder, 0, 0.09), None, ("onnx",), folder / "export")
    return folder / "export"


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "export"))


def faults_of(folder: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    code = main(["verify", str(folder)])
    output = capsys.readouterr()
    faults = output.err.splitlines()
    assert code == (1 if faults else 0), output
    return faults


def test_a_copied_folder_passes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(folder)]) == 0
    assert "model.onnx: as exported; not stamped" in capsys.readouterr().out


def with_new_hash(folder: Path) -> None:
    """The card and the compressed copy follow the file, as somebody would do who hides that it was replaced."""
    path = folder / "model.onnx"
    values = json.loads((folder / "card.json").read_text())
    values["files"][0]["sha256"] = sha256_of(path)
    (folder / "card.json").write_text(json.dumps(values))
    (folder / "model.onnx.gz").write_bytes(gzip.compress(path.read_bytes()))


def flip_a_bit(folder: Path) -> None:
    content = bytearray((folder / "model.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "model.onnx").write_bytes(content)


def replace(folder: Path, network: Any, facts: dict[str, Any]) -> None:
    write_onnx(network, 28, folder / "model.onnx", facts)
    with_new_hash(folder)


def another_network(folder: Path) -> None:
    network = network_of(folder.parent, 1, 0.09)
    replace(folder, network, network.metadata | {"recipe_sha256": "of another run"})


def weights_of_another_network(folder: Path) -> None:
    """With the metadata of this one."""
    network = network_of(folder.parent, 1, 0.09)
    replace(folder, network, network.metadata)


def wrong_normalisation(folder: Path) -> None:
    network = network_of(folder.parent, 0, 0.09)
    facts = network.metadata
    network.mean += 0.1
    replace(folder, network, facts)


def mask_not_applied(folder: Path) -> None:
    network = network_of(folder.parent, 0, 1.0)
    replace(folder, network, network.metadata)


def no_copy(folder: Path) -> None:
    (folder / "model.onnx.gz").unlink()


def other_copy(folder: Path) -> None:
    (folder / "model.onnx.gz").write_bytes(gzip.compress(b"another file"))


def other_images(folder: Path) -> None:
    (folder / "check.npz").write_bytes(b"nothing")


def no_network(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(b"nothing")
    with_new_hash(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_a_bit, r"model\.onnx is not the file that was exported: its sha256"),
        (another_network, r"model\.onnx was exported from another network: its metadata"),
        (
            weights_of_another_network,
            r"model\.onnx answers otherwise than when it was exported|weights that are not zero",
        ),
        (wrong_normalisation, r"model\.onnx answers otherwise .* normalisation"),
        (mask_not_applied, r"model\.onnx has 8[0-9,]+ weights that are not zero, .* the mask is not applied"),
        (no_copy, r"model\.onnx\.gz is missing"),
        (other_copy, r"model\.onnx\.gz does not unpack"),
        (other_images, r"check\.npz is not the file that was exported"),
        (no_network, r"model\.onnx cannot be run"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_each_fault_is_one_message(
    damage: Callable[[Path], None], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(folder)
    (fault,) = faults_of(folder, capsys)
    assert re.search(message, fault), fault


def test_two_faults_are_two_messages(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip_a_bit(folder)
    other_images(folder)
    assert len(faults_of(folder, capsys)) == 2


@pytest.mark.parametrize("content", [None, "{", "{}", '{"version": 1, "files": 3}'])
def test_a_folder_without_a_readable_card_is_no_export(
    content: str | None, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "card.json"
    path.unlink() if content is None else path.write_text(content)
    assert main(["verify", str(folder)]) == 2
    assert "card.json" in capsys.readouterr().err


def test_a_network_whose_mask_was_not_applied_is_not_exported(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"keep_fraction 0\.1 allows .*The mask was not applied"):
        export_network(network_of(tmp_path, 0, 1.0), None, ("onnx",), tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_the_cards_ten_lines_need_onnxruntime_and_numpy_only(exported: Path) -> None:
    """And print the classes that the network gives the stored images."""
    text = (exported / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(code.strip().splitlines()) <= 10
    code += "import sys\nprint(sorted({name.partition('.')[0] for name in sys.modules}))\n"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=exported, env=environment, capture_output=True, text=True, check=True
    )
    *classes, modules = done.stdout.splitlines()
    assert not {"torch", "onnx", "pipeline", "launch", "safetensors"} & set(re.findall(r"'(\w+)'", modules))
    check = np.load(exported / "check.npz")
    assert classes == [NAMES[label] for label in check["network"].argmax(1)]


def test_the_model_card_is_made_of_the_card_and_shows_names_as_text(exported: Path) -> None:
    text = (exported / "README.md").read_text()
    front, title = re.match(r"---\n(.*?)\n---\n\n(# .*)", text, re.DOTALL).groups()  # pyright: ignore[reportOptionalMemberAccess]
    assert 'library_name: "onnx"' in front
    assert "network, small\\_cnn, 90 % pruned" in title
    assert "Not stamped" in title
    card = Card.read(exported / "card.json")
    assert not card.stamped
    assert card.files[0].sha256 == sha256_of(exported / "model.onnx")
    assert f"| {card.files[0].size:,} |" in text
