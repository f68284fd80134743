"""`load`: the selected network as a plain module on [0, 1] images, without training dependencies."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.transforms.v2.functional import normalize

from pipeline.data.loading.loader import Loader
from pipeline.data.manifest import read_manifest
from pipeline.distributed import Group
from pipeline.evaluation.images import EvaluationImages
from pipeline.evaluation.load import load_network
from pipeline.models import build_network
from pipeline.models.export import write_model
from pipeline.models.pruning.scores import Scores
from pipeline.models.state import effective_state
from pipeline.recipe.file import dump_recipe
from pipeline.recipe.schema import Recipe
from pipeline.recipe.stages import Stage, stages_of
from pipeline.run.files import atomic_write_json, sha256_of
from pipeline.training.context import RunContext
from pipeline.training.stage_export import usage_metadata
from tests.support.small_recipe import small_recipe
from tests.unit.report.test_report import evaluation

ROOT = Path(__file__).parents[3]
SPARSITIES: dict[str, Any] = {"keep_fractions": [0.1, "0.05"], "baselines": ["magnitude", "random", "snip"]}


def finish(run: Path, stage: Stage, recipe: Recipe, seed: int) -> None:
    """Write the output of a finished stage: a network that is a function of `seed`."""
    folder = run / stage.name
    folder.mkdir(parents=True, exist_ok=True)
    network = build_network(recipe.model, seed, recipe.data.image_size)
    if stage.keep_fraction is not None:
        Scores.attach(network, stage.keep_fraction)
    write_model(folder / "model.safetensors", effective_state(network), recipe.model, {"image_size": 28})
    atomic_write_json(folder / "result.json", {"model_sha256": sha256_of(folder / "model.safetensors")})


def write_run(run: Path, **sections: Any) -> tuple[Path, dict[str, int]]:
    """A finished run, and the seed of every stage's network."""
    recipe = small_recipe(Path("/data"), **sections)
    run.mkdir()
    (run / "recipe.yaml").write_text(dump_recipe(recipe))
    seeds = {stage.name: seed for seed, stage in enumerate(stages_of(recipe))}
    for stage in stages_of(recipe):
        finish(run, stage, recipe, seeds[stage.name])
    return run, seeds


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    return write_run(tmp_path_factory.mktemp("runs") / "demo", sparsity=SPARSITIES)


def is_of(network: nn.Module, run: Path, stage: str) -> bool:
    """Whether it is the network of that stage and of no other, by its first layer."""
    own = load_network(run / stage / "model.safetensors")
    return torch.equal(next(network.parameters()), next(own.parameters()))


@pytest.mark.parametrize(
    ("arguments", "stage"),
    [
        ({"keep_fraction": 1}, "pretrain"),
        ({"stage": "pretrain"}, "pretrain"),
        ({"method": "dense"}, "pretrain"),
        ({"keep_fraction": 0.1}, "keep-0.1/finetune"),
        ({"keep_fraction": "0.10"}, "keep-0.1/finetune"),
        ({"keep_fraction": Decimal("0.05")}, "keep-0.05/finetune"),
        ({"keep_fraction": 0.05, "stage": "prune"}, "keep-0.05/prune"),
        ({"keep_fraction": 0.05, "method": "hydra", "stage": "prune"}, "keep-0.05/prune"),
        ({"keep_fraction": 0.1, "method": "HYDRA"}, "keep-0.1/finetune"),
        ({"keep_fraction": 0.1, "method": "magnitude"}, "keep-0.1/magnitude"),
        ({"keep_fraction": 0.05, "method": "random"}, "keep-0.05/random"),
        ({"keep_fraction": 0.05, "stage": "snip"}, "keep-0.05/snip"),
    ],
)
def test_arguments_select_the_network(
    finished: tuple[Path, dict[str, int]], arguments: dict[str, Any], stage: str
) -> None:
    run, seeds = finished
    network = load_network(str(run), **arguments)
    assert [name for name in seeds if is_of(network, run, name)] == [stage]
    assert not network.training


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep_fraction": 0.2}, "demo has no keep_fraction 0.2; there is 1, 0.1, 0.05"),
        ({"keep_fraction": "most"}, "demo has no keep_fraction most; there is 1, 0.1, 0.05"),
        ({"keep_fraction": 0.1, "method": "lottery"}, "no method lottery at keep_fraction 0.1; there is hydra, magn"),
        ({"keep_fraction": 1, "method": "hydra"}, "no method hydra at keep_fraction 1; there is dense"),
        ({"keep_fraction": 1, "stage": "finetune"}, "no stage finetune at keep_fraction 1; there is pretrain"),
        ({"keep_fraction": 0.1, "method": "snip", "stage": "prune"}, "no stage prune at keep_fraction 0.1; there is s"),
        ({}, r"demo has several networks; give keep_fraction, one of 1, 0.1, 0.05 \(1 is dense\)"),
        ({"method": "magnitude"}, "several networks; give keep_fraction, one of 0.1, 0.05"),
    ],
)
def test_a_missing_network_is_refused_with_the_alternatives(
    finished: tuple[Path, dict[str, int]], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load_network(finished[0], **arguments)


def test_without_finetune_the_pruned_network_is_hydras(tmp_path: Path) -> None:
    phase = {"epochs": 1, "lr": 0.1}
    phases = {"pretrain": phase, "prune": phase, "finetune": None}
    run, _ = write_run(tmp_path / "search", phases=phases, sparsity={"keep_fractions": [0.1], "baselines": []})
    assert is_of(load_network(run, 0.1), run, "keep-0.1/prune")


def test_it_takes_images_in_0_1_and_gives_the_networks_own_logits(tmp_path: Path) -> None:
    """The reference is a plain backbone after torchvision's normalisation, with the same weights."""
    mean, std = (0.1, 0.5, 0.3), (0.2, 0.3, 0.4)
    run, _ = write_run(tmp_path / "run", model={"mean": mean, "std": std})
    network = load_network(run, keep_fraction=0.1)
    images = torch.rand(4, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    backbone = build_network(small_recipe(Path("/data")).model, seed=9).backbone.eval()
    weights = {name.removeprefix("backbone."): tensor for name, tensor in network.state_dict().items()}
    backbone.load_state_dict(weights)
    with torch.no_grad():
        torch.testing.assert_close(network(images), backbone(normalize(images, list(mean), list(std))))
        assert float(network(images).std()) > 1e-3
    for name, tensor in weights.items():
        if tensor.ndim > 1:  # masks are applied: n - floor(0.9 n) are kept
            assert int(tensor.count_nonzero()) == tensor.numel() - tensor.numel() * 9 // 10, name


def remove_result(run: Path) -> None:
    (run / "keep-0.1/finetune/result.json").unlink()


def replace_model(run: Path) -> None:
    (run / "pretrain/model.safetensors").replace(run / "keep-0.1/finetune/model.safetensors")


def truncate_model(run: Path) -> None:
    path = run / "keep-0.1/finetune/model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def remove_model(run: Path) -> None:
    (run / "keep-0.1/finetune/model.safetensors").unlink()


def remove_recipe(run: Path) -> None:
    (run / "recipe.yaml").unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (remove_result, r"keep-0.1/finetune is not finished; python -m launch resume .*/run"),
        (replace_model, "keep-0.1/finetune/model.safetensors is not the network that the stage exported"),
        (truncate_model, "keep-0.1/finetune/model.safetensors is damaged"),
        (remove_model, "keep-0.1/finetune/model.safetensors does not exist"),
        (remove_recipe, r"run is not a run \(it has no recipe.yaml\); give its folder"),
    ],
)
def test_a_damaged_run_is_refused(tmp_path: Path, spoil: Callable[[Path], None], message: str) -> None:
    run, _ = write_run(tmp_path / "run")
    spoil(run)
    with pytest.raises(ValueError, match=message):
        load_network(run, keep_fraction=0.1)


def test_a_file_is_one_network(finished: tuple[Path, dict[str, int]]) -> None:
    file = finished[0] / "pretrain" / "model.safetensors"
    assert not load_network(file).training
    with pytest.raises(ValueError, match=f"{re.escape(str(file))} is one network; omit keep_fraction"):
        load_network(file, keep_fraction=0.1)
    with pytest.raises(ValueError, match=r"nowhere\.safetensors does not exist"):
        load_network("nowhere.safetensors")


@pytest.mark.slow
def test_loading_imports_no_training_dependency() -> None:
    heavy = ["ray", "deepspeed", "ffcv", "numba", "cv2", "wandb", "matplotlib", "submitit", "pyautoattack", "pyarrow"]
    code = f"import sys, pipeline; pipeline.load; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_the_guides_snippet_loads_and_attacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (snippet,) = [
        code
        for code in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "guide.md").read_text(), re.DOTALL)
        if "pipeline.load(" in code
    ]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    run, _ = write_run(tmp_path / "runs" / "demo", sparsity={"keep_fractions": ["0.01"]})
    generator = torch.Generator().manual_seed(0)
    names: dict[str, Any] = {"images": torch.rand(2, 3, 28, 28, generator=generator)}
    exec(snippet, names)
    assert is_of(names["network"], run, "keep-0.01/finetune")
    assert is_of(names["dense"], run, "pretrain")
    assert is_of(names["baseline"], run, "keep-0.01/magnitude")
    assert names["logits"].shape == (2, 10)


def with_test_data(run: Path, data: Path, **facts: Any) -> Path:
    """A finished run on real data; `facts` join the metadata of its dense network, whose file is returned."""
    recipe = small_recipe(data)
    run.mkdir()
    (run / "recipe.yaml").write_text(dump_recipe(recipe))
    (stage, *_) = stages_of(recipe)
    finish(run, stage, recipe, seed=3)
    file = run / stage.name / "model.safetensors"
    network = build_network(recipe.model, 3, recipe.data.image_size)
    write_model(file, effective_state(network), recipe.model, {"image_size": 28, **facts})
    atomic_write_json(file.with_name("result.json"), {"model_sha256": sha256_of(file)})
    return file


@pytest.fixture
def image_file(fashion_data: Path, tmp_path: Path) -> tuple[Path, torch.Tensor]:
    """The file of an image of the test set, and the tensor of it that evaluations see."""
    with Loader(fashion_data / "test.beton", image_size=28, threads=1, compiled=False) as loader:
        images = EvaluationImages.all_of(loader, "none")
        x, _ = loader.read(np.array([5]), images.crops(np.array([5]))).to(torch.device("cpu"))
    Image.fromarray((255 * x[0, 0]).round().byte().numpy()).save(tmp_path / "shirt.png")
    return tmp_path / "shirt.png", x[0]


def test_an_exported_file_is_enough_to_use_it(
    fashion_data: Path, tmp_path: Path, image_file: tuple[Path, torch.Tensor]
) -> None:
    """What a stage exports, moved away from its run."""
    recipe = small_recipe(fashion_data)
    context = RunContext(recipe, tmp_path, "", Group(0, 1, torch.device("cpu")))
    facts = usage_metadata(context)
    context.close()
    file = with_test_data(tmp_path / "run", fashion_data, **facts).rename(tmp_path / "alone.safetensors")
    network = load_network(file)
    manifest = read_manifest(fashion_data / "test.beton")
    assert network.class_names == manifest.class_names
    assert network.threat_model == {"norm": "linf", "eps": "1/10"}
    assert network.metadata["preprocessing"] == {
        "image_size": 28,
        "augmentation": "none",
        **{key: getattr(manifest, key) for key in ("image_mode", "max_resolution", "jpeg_quality")},
        "background": None,
        "exif_rotate": False,
    }
    assert torch.equal(network.preprocess(image_file[0]), image_file[1])
    assert network.evaluation is None
    assert facts == json.loads(json.dumps(facts))


def test_an_older_file_is_completed_from_its_run(
    fashion_data: Path, tmp_path: Path, image_file: tuple[Path, torch.Tensor]
) -> None:
    file = with_test_data(tmp_path / "run", fashion_data)
    manifest = read_manifest(fashion_data / "test.beton")
    network = load_network(file)
    assert network.class_names == manifest.class_names
    assert network.threat_model == {"norm": "linf", "eps": "1/10"}
    assert torch.equal(network.preprocess(image_file[0]), image_file[1])
    atomic_write_json(tmp_path / "run" / "provenance.json", {"data_sha256": {"data.test_file": "of another file"}})
    network = load_network(file)
    assert network.class_names == [f"class {label}" for label in range(10)]
    with pytest.raises(ValueError, match=r"model.safetensors does not say how images are prepared.*put it back"):
        network.preprocess  # noqa: B018
    network = load_network(file.rename(tmp_path / "alone.safetensors"))
    assert network.threat_model is None
    with pytest.raises(ValueError, match=r"alone.safetensors does not say how images are prepared"):
        network.preprocess  # noqa: B018


def test_accuracies_are_those_of_the_runs_evaluation(fashion_data: Path, tmp_path: Path) -> None:
    file = with_test_data(tmp_path / "run", fashion_data)
    ones = np.arange(200) < 150
    evaluated = evaluation(ones, ones & (np.arange(200) < 100), sha256_of(file))
    file.with_name("evaluate").mkdir()
    path = file.with_name("evaluate") / "pgd.json"
    atomic_write_json(path, evaluated)
    found = load_network(tmp_path / "run", keep_fraction=1).evaluation
    assert found is not None
    assert (found.clean_correct, found.robust_correct) == (150, 100)
    atomic_write_json(path, evaluated | {"model_sha256": "of an earlier training"})
    assert load_network(file).evaluation is None
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"pgd\.json is damaged"):
        load_network(file).evaluation  # noqa: B018


def test_the_guides_snippets_give_images_as_the_network_sees_them(
    fashion_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, image_file: tuple[Path, torch.Tensor]
) -> None:
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "guide.md").read_text(), re.DOTALL)
    (stacking,) = [code for code in snippets if "network.preprocess" in code]
    (batches,) = [code for code in snippets if "EvaluationImages" in code]
    monkeypatch.chdir(tmp_path)
    shutil.copy(image_file[0], tmp_path / "boot.jpg")
    names: dict[str, Any] = {"torch": torch, "network": load_network(with_test_data(tmp_path / "run", fashion_data))}
    exec(stacking, names)
    assert torch.equal(names["images"], torch.stack([image_file[1]] * 2))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "fashion_mnist").symlink_to(fashion_data)
    exec(batches, names)
    assert (names["images"].shape[1:], names["labels"].dtype) == ((3, 28, 28), torch.int64)
