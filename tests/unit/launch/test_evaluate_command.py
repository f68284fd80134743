"""`launch evaluate`: refused attacks, the files beside the network, and resuming."""

from __future__ import annotations

import functools
import io
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.transforms import CenterCrop, Compose, Resize, ToTensor

from launch import run_folder
from launch.__main__ import main
from launch.commands import evaluation_cache
from pipeline.data.loading import image_list
from pipeline.evaluation import spec
from pipeline.evaluation.chunks import read_verdicts
from pipeline.evaluation.honesty.probes import Probes
from pipeline.evaluation.load import load_network
from pipeline.evaluation.measures.autoattack import Ensemble
from pipeline.evaluation.measures.pgd import Pgd
from pipeline.models import build_network
from pipeline.models.export import write_model
from pipeline.models.state import effective_state, named_state
from pipeline.recipe.file import load_recipe
from pipeline.run import checkpoint
from pipeline.run.checkpoint import Snapshot
from pipeline.run.files import atomic_write_json, sha256_of
from pipeline.run.layout import StageFolder
from pipeline.run.progress import Progress
from tests.support.small_recipe import small_recipe

STAGES = ("pretrain", "keep-0.1/finetune")
IMAGES, HONESTY_IMAGES, CHUNK, TEST_IMAGES = 12, 10, 4, 500


@pytest.fixture(scope="module")
def finished(fashion_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose networks are untrained, and the pruned one's mask was left out."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    recipe = small_recipe(
        fashion_data, sparsity={"keep_fractions": [0.1], "baselines": []}, evaluation={"chunk": CHUNK}, seed=5
    )
    run_folder.write_run_folder(folder, recipe, run_folder.check_data(recipe))
    for seed, stage in enumerate(STAGES):
        (folder / stage).mkdir(parents=True)
        network = build_network(recipe.model, seed=seed, image_size=28)
        facts = {"image_size": 28, "keep_fraction": "0.1" if "keep" in stage else None}
        write_model(folder / stage / "model.safetensors", effective_state(network), recipe.model, facts)
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of it. AutoAttack's budgets are a few steps; the process's settings are put back."""
    monkeypatch.setattr(spec, "Ensemble", functools.partial(Ensemble, iterations=2, queries=3))
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield Path(shutil.copytree(finished, tmp_path / "run"))
    torch.use_deterministic_algorithms(deterministic)
    torch.set_num_threads(threads)


def evaluate(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, list[dict[str, Any]], str]:
    """Exit code, the networks' counts, and the standard error output."""
    capsys.readouterr()
    code = main(["evaluate", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, [json.loads(line) for line in out.splitlines()], err


def evaluated_chunks(monkeypatch: pytest.MonkeyPatch, measure: type, stop_at: int | None = None) -> list[np.ndarray]:
    """The ids of every chunk that is evaluated from now on; the one with number `stop_at` is interrupted."""
    chunks: list[np.ndarray] = []
    original: Callable[..., Any] = measure.verdicts

    def verdicts(self: Any, network: Any, x: Any, y: Any, ids: np.ndarray) -> Any:
        if len(chunks) == stop_at:
            raise KeyboardInterrupt
        chunks.append(ids)
        return original(self, network, x, y, ids)

    monkeypatch.setattr(measure, "verdicts", verdicts)
    return chunks


def test_every_network_of_a_run_is_attacked_and_its_verdicts_are_kept(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, results, _ = evaluate(capsys, run, "--attack", "apgd", "--images", IMAGES)
    assert code == 0
    assert [one["file"] for one in results] == [str(run / stage / "model.safetensors") for stage in STAGES]
    for stage, one in zip(STAGES, results, strict=True):
        (path,) = (run / stage / "evaluate").glob("apgd-*.json")
        assert {"file": one["file"], **json.loads(path.read_text())} == one
        verdicts = read_verdicts(path.with_suffix(".parquet"))
        assert np.array_equal(verdicts["sample_id"], np.arange(IMAGES) * TEST_IMAGES // IMAGES)
        assert one["robust_correct"] == verdicts["robust_correct"].sum()
        assert (one["attack"], one["settings"]["iterations"], one["chunk"]) == ("apgd", 2, CHUNK)
        assert list(one["broken_by"]) == ["apgd-ce", "apgd-t"]
        left = {p.name for p in (run / stage / "evaluate").glob("[!.]*") if not p.name.startswith("honesty-")}
        assert left == {path.name, path.with_suffix(".parquet").name}


def test_honesty_checks_go_with_attacks_that_follow_gradients(
    run: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    _, results, _ = evaluate(capsys, run, "--attack", "apgd,pgd", "--images", IMAGES)
    assert [(one["attack"], one["honesty"]["images"]) for one in results] == [
        (attack, HONESTY_IMAGES) for attack in ("apgd", "pgd") for _ in STAGES
    ]
    assert results[0]["honesty"] == results[2]["honesty"]
    checks = {check["name"]: check for check in results[1]["honesty"]["checks"]}
    assert len(checks) == 11
    assert (checks["mask"]["verdict"], checks["repeatable"]["verdict"]) == ("warn", "pass")
    assert "keep_fraction 0.1 allows" in checks["mask"]["figure"]
    assert any(f"{STAGES[1]}: honesty check mask: {checks['mask']['figure']}" in message for message in caplog.messages)
    for stage, one in zip(STAGES, results, strict=False):
        (path,) = (run / stage / "evaluate").glob("apgd-*.json")
        assert json.loads(path.read_text())["honesty"] == one["honesty"]
        (path,) = (run / stage / "evaluate").glob("honesty-*.json")
        whole = json.loads(path.read_text())["checks"]
        assert all(check["meaning"] for check in whole)
        verdicts = read_verdicts(path.with_suffix(".parquet"))
        assert np.array_equal(verdicts["sample_id"], np.arange(HONESTY_IMAGES) * TEST_IMAGES // HONESTY_IMAGES)
    _, results, _ = evaluate(capsys, run, "--attack", "square,transfer,corruptions", "--images", 2)
    assert [one["attack"] for one in results if "honesty" in one] == []


def test_a_network_is_checked_once_for_each_pgd(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = run / STAGES[1] / "model.safetensors"
    chunks = evaluated_chunks(monkeypatch, Probes)
    _, (first,), _ = evaluate(capsys, file, "--images", 6)
    assert [len(ids) for ids in chunks] == [4, 2]
    assert first["honesty"]["images"] == 6
    _, (again,), _ = evaluate(capsys, file, "--images", 6, "--attack", "apgd")
    assert (len(chunks), again["honesty"]) == (2, first["honesty"])
    evaluate(capsys, file, "--images", 6, "--steps", 3)
    assert len(chunks) == 4
    (made,) = [
        p for p in file.parent.glob("evaluate/honesty-*.json") if json.loads(p.read_text())["settings"]["steps"] == 2
    ]
    made.rename(StageFolder(file.parent).honesty)  # as the run's own
    made.with_suffix(".parquet").unlink()
    assert evaluate(capsys, file, "--images", 6)[1] == [first]
    assert len(chunks) == 4


def test_interrupted_honesty_checks_continue_with_the_next_chunk(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = run / STAGES[1] / "model.safetensors"
    undisturbed = evaluate(capsys, file, "--images", IMAGES)[1]
    shutil.rmtree(file.parent / "evaluate")
    with monkeypatch.context() as patched:
        evaluated_chunks(patched, Probes, stop_at=2)
        assert evaluate(capsys, file, "--images", IMAGES)[0] == 1
    chunks = evaluated_chunks(monkeypatch, Probes)
    assert evaluate(capsys, file, "--images", IMAGES)[1] == undisturbed
    assert [len(ids) for ids in chunks] == [2]


def test_the_file_is_compared_with_the_network_that_was_trained(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, stage = load_recipe(run / "recipe.yaml"), run / STAGES[0]
    model = stage / "model.safetensors"

    def verdict() -> str:
        (result,) = evaluate(capsys, model, "--images", 2)[1]
        return next(check["verdict"] for check in result["honesty"]["checks"] if check["name"] == "exported file")

    assert verdict() == "warn"  # there is none
    for seed, expected in ((0, "pass"), (1, "warn")):
        shutil.rmtree(stage / "evaluate")
        state = dict(named_state(build_network(recipe.model, seed, 28)))
        checkpoint.write_checkpoint(stage, Snapshot(state, {}, Progress(seed, seed, seed)))
        atomic_write_json(stage / "result.json", {"selected_step": seed, "model_sha256": sha256_of(model)})
        assert verdict() == expected


def test_no_honesty_checks_where_the_recipe_has_none(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = load_recipe(run / "recipe.yaml", ["evaluation.honesty_images=0"])
    run_folder.write_run_folder(run, recipe, {})
    _, (result,), _ = evaluate(capsys, run / STAGES[0] / "model.safetensors", "--images", 2)
    assert "honesty" not in result


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_bar_moves_with_every_corruption(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, seconds = Terminal(), itertools.count()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setattr(evaluation_cache, "monotonic", lambda: float(next(seconds)))
    file = run / STAGES[0] / "model.safetensors"
    assert main(["evaluate", str(file), "--attack", "corruptions", "--images", "6"]) == 0
    drawn = [line for line in terminal.getvalue().split("\r") if "pass " in line]
    results = [re.search(r"pretrain: corruptions: .* (\d)/6 .*, pass (\d+) of 91\]", line) for line in drawn]
    seen = [(int(match[1]), int(match[2])) for match in results if match is not None]
    assert len(seen) == len(drawn)
    expected = [(before + size * i // 91, i) for before, size in ((0, 4), (4, 2)) for i in range(1, 92)]
    assert [at for at in seen if at in expected] == seen
    assert set(expected) <= set(seen)


def test_what_was_evaluated_before_is_not_evaluated_again(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = run / STAGES[0] / "model.safetensors"
    first = evaluate(capsys, file, "--attack", "square", "--images", IMAGES)
    chunks = evaluated_chunks(monkeypatch, Ensemble)
    assert evaluate(capsys, file, "--attack", "square", "--images", IMAGES) == first
    assert chunks == []
    _, (more,), _ = evaluate(capsys, file, "--attack", "square", "--images", IMAGES + 1)
    assert (len(chunks), more["images"]) == (4, IMAGES + 1)
    write_model(file, torch_state(1), small_recipe(Path(".")).model, {"image_size": 28})
    _, (other,), _ = evaluate(capsys, file, "--attack", "square", "--images", IMAGES)
    assert other["model_sha256"] != first[1][0]["model_sha256"]


def torch_state(seed: int) -> dict[str, torch.Tensor]:
    return effective_state(build_network(small_recipe(Path(".")).model, seed=seed, image_size=28))


def test_the_runs_own_evaluation_is_taken_and_left_alone(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = run / STAGES[1] / "model.safetensors"
    _, (usual,), _ = evaluate(capsys, file, "--images", IMAGES)
    own = StageFolder(file.parent).evaluation("pgd")
    for suffix in (".json", ".parquet"):
        (made,) = own.parent.glob(f"pgd-*{suffix}")
        made.rename(own.with_suffix(suffix))  # as the run's own
    before = own.read_bytes()
    chunks = evaluated_chunks(monkeypatch, Pgd)
    assert evaluate(capsys, file, "--images", IMAGES)[1] == [usual]
    assert chunks == []
    _, (stronger,), _ = evaluate(capsys, file, "--images", IMAGES, "--steps", 3, "--restarts", 2, "--step-size", "1/30")
    assert stronger["settings"] == {
        "norm": "linf",
        "eps": "1/10",
        "steps": 3,
        "restarts": 2,
        "step_size": pytest.approx(1 / 30),
    }
    assert len(chunks) == IMAGES // CHUNK + -(-HONESTY_IMAGES // CHUNK)  # honesty checks begin with it, too
    assert own.read_bytes() == before
    assert len(list(own.parent.glob("pgd-3x2-*.json"))) == 1


@pytest.mark.parametrize("attack", ["square", "transfer"])
def test_an_interrupted_evaluation_resumes_with_the_next_chunk(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, attack: str
) -> None:
    file = run / STAGES[1] / "model.safetensors"
    arguments = (file, "--attack", attack, "--images", IMAGES)
    undisturbed = evaluate(capsys, *arguments)[1]
    (whole,) = (file.parent / "evaluate").glob("*.parquet")
    expected = read_verdicts(whole)
    shutil.rmtree(file.parent / "evaluate")
    measure = {"square": Ensemble, "transfer": spec.Transfer}[attack]
    with monkeypatch.context() as patched:
        evaluated_chunks(patched, measure, stop_at=2)
        code, results, err = evaluate(capsys, *arguments)
    assert (code, results) == (1, [])
    assert "finished chunks are kept; the same command continues with the next one" in err
    chunks = evaluated_chunks(monkeypatch, measure)
    assert evaluate(capsys, *arguments)[1] == undisturbed
    assert len(chunks) == IMAGES // CHUNK - 2
    results = read_verdicts(whole)
    assert results.keys() == expected.keys()
    assert all(np.array_equal(results[name], expected[name]) for name in results)


def test_examples_are_transferred_to_every_other_network(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, (result,), _ = evaluate(capsys, run, "--attack", "transfer", "--images", IMAGES)
    assert code == 0
    assert result["file"] == str(run / STAGES[1] / "model.safetensors")
    source = str(run / STAGES[1] / "model.safetensors")
    code, (result,), _ = evaluate(capsys, run, "--attack", "transfer", "--images", IMAGES, "--source", source)
    assert (code, result["file"]) == (0, str(run / STAGES[0] / "model.safetensors"))


def test_several_attacks_are_one_command(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, results, err = evaluate(capsys, run, "--attack", "square,transfer", "--images", IMAGES)
    assert (code, err) == (0, "")
    files = [str(run / stage / "model.safetensors") for stage in STAGES]
    assert [(one["attack"], one["file"]) for one in results] == [
        ("square", files[0]),
        ("square", files[1]),
        ("transfer", files[1]),
    ]
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", str(run), "--attack", "square,rumour"])
    assert ended.value.code == 2
    assert "'rumour' is not one of pgd, apgd, autoattack, square, transfer, corruptions" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "501"], "--images 501: expected all or a number from 1 to 500"),
        (["--images", "0"], "--images 0: expected all or a number"),
        (["--images", "few"], "--images few: expected all or a number"),
        (["--steps", "0"], "--steps, --restarts and --step-size must be positive"),
        (["--attack", "apgd", "--steps", "5"], "--attack apgd runs with its authors' settings"),
        (["--attack", "pgd,apgd", "--steps", "5"], "--attack apgd runs with its authors' settings"),
        (["--attack", "square", "--source", "x"], "--source x is for --attack transfer"),
        (["--attack", "transfer", "--source", "nowhere.safetensors"], "nowhere.safetensors does not exist"),
    ],
)
def test_invalid_options_are_refused(
    run: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    code, results, err = evaluate(capsys, run / STAGES[0] / "model.safetensors", *arguments)
    assert (code, results) == (2, [])
    assert message in err


def test_a_network_is_no_source_of_attacks_on_itself(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = evaluate(capsys, run / STAGES[0] / "model.safetensors", "--attack", "transfer")
    assert code == 2
    assert "is the network under attack itself; name another one: --source FILE" in err


@pytest.fixture
def listed(fashion_data: Path, tmp_path: Path) -> tuple[Path, list[str]]:
    """A run of a network for 224 pixels, and options that name a folder of images and a list of some of them."""
    recipe = small_recipe(fashion_data, data={"image_size": 224}, sparsity={"keep_fractions": [0.1], "baselines": []})
    folder, images, generator = tmp_path / "listed", tmp_path / "val", np.random.default_rng(0)
    run_folder.write_run_folder(folder, recipe, run_folder.check_data(recipe))
    (folder / "pretrain").mkdir()
    state = effective_state(build_network(recipe.model, seed=0, image_size=224))
    write_model(folder / "pretrain" / "model.safetensors", state, recipe.model, {"image_size": 224})
    for i, name in enumerate(("Bag", "Sandal", "Bag")):
        (images / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (240, 300, 3), np.uint8)).save(images / name / f"{i}.png")
    (tmp_path / "list.txt").write_text("Sandal/1.png\nBag/2.png\nBag/0.png\n")
    return folder, ["--folder", str(images), "--image-list", str(tmp_path / "list.txt")]


def test_listed_images_are_preprocessed_like_torchvision(
    listed: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, options = listed
    monkeypatch.setattr(spec, "Ensemble", functools.partial(Ensemble, iterations=2, queries=3))
    code, (result,), err = evaluate(capsys, run, "--attack", "square", *options)
    assert (code, err, result["images"]) == (0, "", 3)
    assert result["title"] == "Square attack, linf eps 1/10; torchvision, resize 256, centre crop 224"
    assert len(result["image_list_sha256"]) == len(result["data_sha256"]) == 64
    (path,) = (run / "pretrain" / "evaluate").glob("*.parquet")
    verdicts = read_verdicts(path)
    assert verdicts["label"].tolist() == [5, 8, 8]  # of Fashion-MNIST's classes, in the list's order
    folder = ImageFolder(options[1], Compose([Resize(256), CenterCrop(224), ToTensor()]))
    with torch.no_grad():
        logits = load_network(run / "pretrain" / "model.safetensors")(torch.stack([folder[i][0] for i in (2, 1, 0)]))
    assert verdicts["clean_prediction"].tolist() == logits.argmax(dim=1).tolist()
    chunks = evaluated_chunks(monkeypatch, Ensemble)
    assert evaluate(capsys, run, "--attack", "square", *options) == (0, [result], "")
    assert chunks == []


def test_a_list_that_does_not_come_is_one_line_and_a_failure(
    listed: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, options = listed
    path = Path(options[-1])
    path.unlink()
    os.mkfifo(path)  # without a writer, opening it blocks
    monkeypatch.setattr(image_list, "FILE_DEADLINE_S", 0.05)
    code, results, err = evaluate(capsys, run, "--attack", "square", *options)
    os.close(os.open(path, os.O_RDWR))  # unblocks a waiting reader
    assert (code, results) == (1, [])
    assert err == (
        f"error: {path}: no result within 0.05 s; its reader is stuck; "
        "finished chunks are kept; the same command continues with the next one\n"
    )


def test_listed_images_that_do_not_fit_the_network_are_refused(
    listed: tuple[Path, list[str]], run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = evaluate(capsys, listed[0], *listed[1][:2])
    assert code == 2
    assert "--folder and --image-list go together" in err
    code, _, err = evaluate(capsys, listed[0], *listed[1], "--images", 4)
    assert code == 2
    assert "--images 4: expected all or a number from 1 to 3" in err
    code, _, err = evaluate(capsys, run, *listed[1])
    assert code == 2
    assert "--folder gives images of 224 x 224 pixels, and the network was trained on 28" in err


def test_out_of_gpu_memory_is_one_line_that_says_what_to_lower(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By then cuBLAS has the workspace without which torch refuses a product under deterministic algorithms."""

    def full(*_: object) -> None:
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] in (":4096:8", ":16:8")
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")

    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    monkeypatch.setattr(evaluation_cache.EvaluationCache, "evaluate", full)
    code, rows, err = evaluate(capsys, run)
    assert (code, rows) == (1, [])
    assert (
        err.strip().splitlines()[-1].startswith("error: OutOfMemoryError: the GPU is out of memory; lower batch.micro")
    )
    assert "finished chunks are kept" in err
