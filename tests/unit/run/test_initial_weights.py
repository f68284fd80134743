"""What a value of `model.weights` stands for: a file, or a run's dense network."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.run.files import atomic_write_json, sha256_of
from pipeline.run.initial_weights import weights_file


def test_a_file_is_itself_and_a_run_is_its_dense_network(tmp_path: Path) -> None:
    file, run = tmp_path / "w.pt", tmp_path / "run"
    with pytest.raises(ValueError, match=rf"^model.weights = {file} does not exist; name a file of weights, or the"):
        weights_file(file)
    file.write_bytes(b"weights")
    assert weights_file(file) == file

    (run / "pretrain").mkdir(parents=True)
    with pytest.raises(ValueError, match=rf"^model.weights = {run} is a folder and not a run's \(it has no recipe"):
        weights_file(run)
    (run / "recipe.yaml").touch()
    with pytest.raises(ValueError, match=rf"its dense network is not finished: python -m launch resume {run}$"):
        weights_file(run)
    network, result = run / "pretrain" / "model.safetensors", run / "pretrain" / "result.json"
    network.write_bytes(b"network")
    atomic_write_json(result, {"model_sha256": sha256_of(network)})
    assert weights_file(run) == network

    network.write_bytes(b"another")
    with pytest.raises(ValueError, match=rf"{network} is not the network that the run exported"):
        weights_file(run)
    network.unlink()
    with pytest.raises(ValueError, match=rf"{network} is not the network that the run exported"):
        weights_file(run)
