"""Leaderboard entries: published formats, recounted numbers, and every refusal."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from launch.__main__ import main
from pipeline.evaluation.measures.base import summarise
from pipeline.recipe.file import dump_recipe
from pipeline.recipe.stages import stages_of
from pipeline.report.leaderboards.robustbench import LIST_SHA256
from tests.support.small_recipe import small_recipe

ID = "Doe2026Small"
PAPER = f"--id {ID} --title 'Small & robust' --authors 'Jane Doe, John Roe' --link https://example.org/1 --venue arXiv"
ATTACKS = ["apgd-ce", "apgd-t", "fab-t", "square"]
KEYS = {"link": str, "name": str, "authors": str, "additional_data": bool, "number_forward_passes": int}
KEYS |= dict.fromkeys(("dataset", "venue", "architecture", "eps", "clean_acc", "reported", "autoattack_acc"), str)
"""Of every file in RobustBench's model_info/*/L*, and their types."""
ENTRY = [
    *("link_to_paper", "ap_key", "Type of Pipeline:", "A: Pretraining ", "A: Finetuning"),
    *("A: OneShot (1S) vs Iterative (IT)", "Pruning structure", "Pruning locality", "Pruning criterion"),
]
"""Of the entry HYDRA_Sehwag2020Hydra in that benchmark's taxonomy/taxonomy.json, in its order."""
CIFAR: dict[str, Any] = {
    "data": {"dataset": "cifar10", "image_size": 32, "augmentation": "pad_crop_flip"},
    "model": {"arch": "resnet18_cifar", "num_classes": 10},
    "threat_model": {"norm": "linf", "eps": "8/255"},
    "objective": {"name": "trades", "steps": 10, "step_size": "2/255", "beta": 6.0},
    "sparsity": {"keep_fractions": [0.1, "0.05", "0.01"]},
}
IMAGENET: dict[str, Any] = {
    "data": {"dataset": "imagenet", "image_size": 224, "augmentation": "random_resized_crop"},
    "model": {"arch": "wide_resnet50_2", "num_classes": 1000},
    "threat_model": {"norm": "linf", "eps": "4/255"},
}
LISTED = {"image_list_sha256": LIST_SHA256, "preprocessing": "torchvision, resize 256, centre crop 224"}


def settings(eps: str, targets: int = 9) -> dict[str, Any]:
    return {"norm": "linf", "eps": eps, "attacks": ATTACKS, "iterations": 100, "targets": targets, "queries": 5000}


def write_autoattack(folder: Path, ids: np.ndarray, seed: int, **more: Any) -> tuple[np.ndarray, np.ndarray]:
    """Write synthetic AutoAttack verdicts in the layout of `launch evaluate`; return (clean, robust)."""
    generator = np.random.default_rng(seed)
    clean = generator.random(len(ids)) < 0.8
    robust = clean & (generator.random(len(ids)) < 0.6)
    facts: dict[str, Any] = {"attack": "autoattack", "title": "AutoAttack (standard)", "settings": settings("8/255")}
    facts |= {"chunk": 250, "model_sha256": folder.as_posix(), "data_sha256": "d" * 64, "images": len(ids)}
    columns = {"sample_id": ids, "clean_correct": clean, "robust_correct": robust}
    for flag, images in more.pop("flags", {"randomised": 0, "other": 0}).items():
        columns[f"flag_{flag}"] = np.arange(len(ids)) < images
    facts |= summarise(columns)
    (folder / "evaluate").mkdir(parents=True, exist_ok=True)
    path = folder / "evaluate" / f"autoattack-{seed:08x}.json"
    path.write_text(json.dumps(facts | more))
    pq.write_table(pa.table(columns), path.with_suffix(".parquet"))
    return clean, robust


def write_run(folder: Path, values: dict[str, Any], images: int = 0, **more: Any) -> Path:
    """A finished run; every evaluated network has AutoAttack verdicts of `images` images, if any."""
    recipe = small_recipe(Path("/data"), **values)
    folder.mkdir()
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    for seed, stage in enumerate(stages_of(recipe)):
        place = folder / stage.name
        place.mkdir(parents=True)
        (place / "result.json").write_text(json.dumps({"model_sha256": place.as_posix(), "layers": []}))
        if images and stage.measure:
            write_autoattack(place, np.arange(images), seed, **more)
    return folder


def leaderboard(capsys: pytest.CaptureFixture[str], run: Path, paper: str = PAPER) -> tuple[int, list[str], str]:
    """Exit code, lines on standard output, and standard error."""
    capsys.readouterr()
    code = main(["leaderboard", str(run), *shlex.split(paper)])
    out, err = capsys.readouterr()
    return code, out.splitlines(), err


def model_infos(run: Path) -> dict[str, dict[str, Any]]:
    root = run / "report" / "leaderboards" / "robustbench"
    return {path.relative_to(root).as_posix(): json.loads(path.read_text()) for path in root.rglob("*.json")}


def test_cifar_networks_become_entries_of_both_leaderboards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", CIFAR, images=10_000)
    code, lines, err = leaderboard(capsys, run)
    assert (code, err) == (0, "")
    infos = model_infos(run)
    suffixes = ["dense", *(f"keep-{k}{m}" for k in ("0.1", "0.05", "0.01") for m in ("", "_magnitude"))]
    assert sorted(infos) == sorted(f"model_info/cifar10/Linf/{ID}_{suffix}.json" for suffix in suffixes)
    for name, info in infos.items():
        assert {key: type(info[key]) for key in KEYS} == KEYS
        assert set(info) - set(KEYS) == ({"unreliable"} if name.endswith("dense.json") else {"unreliable", "footnote"})
        keep, _, method = name.partition("_keep-")[2].removesuffix(".json").partition("_")
        stage = f"keep-{keep}/{method or 'finetune'}" if keep else "pretrain"
        verdicts = pq.read_table(next((run / stage / "evaluate").glob("*.parquet"))).to_pydict()
        clean, robust = (sum(verdicts[f"{kind}_correct"]) for kind in ("clean", "robust"))
        assert (info["clean_acc"], info["autoattack_acc"]) == (f"{clean / 100:.2f}", f"{robust / 100:.2f}")
    hydra = infos[f"model_info/cifar10/Linf/{ID}_keep-0.05.json"]
    fixed = {"link": "https://example.org/1", "name": "Small & robust", "authors": "Jane Doe, John Roe"}
    fixed |= {"venue": "arXiv", "additional_data": False, "number_forward_passes": 1, "dataset": "cifar10"}
    fixed |= {"architecture": "ResNet-18", "eps": "8/255", "unreliable": False}
    fixed |= {"footnote": "95 % of the connections are pruned (HYDRA)."}
    assert {key: hydra[key] for key in fixed} == fixed

    folder = run / "report" / "leaderboards" / "adversarial_pruning_benchmark"
    (entry,) = json.loads((folder / "taxonomy.json").read_text())
    assert list(entry) == ENTRY
    assert entry["ap_key"] == f"HYDRA_{ID}"
    assert entry["A: Pretraining "] == entry["A: Finetuning"] == "Adversarial Training (AT) TRADES"
    assert entry["Pruning locality"] == "Local Pruning (L)"
    issue = (folder / "new-ap-method.md").read_text()
    for number, (keep, pruned) in enumerate((("0.1", 90), ("0.05", 95), ("0.01", 99)), 1):
        info = infos[f"model_info/cifar10/Linf/{ID}_keep-{keep}.json"]
        section = issue.partition(f"## Evaluation Results of Model n°{number}\n")[2].partition("## ")[0]
        assert f'"HYDRA_{ID}_R18_CIFAR10_US_{pruned}" : ["your_gdrive_link_id", ".safetensors"]' in section
        assert f"_Clean Accuracy:_ {info['clean_acc']}\n_Robust Accuracy (AA):_ {info['autoattack_acc']}\n" in section
        assert "_Robust Accuracy (HO-FMN):_ not run" in section
    assert sorted(lines) == sorted(str(path) for path in (run / "report").rglob("*.*") if path.is_file())


def test_svhn_counts_the_first_ten_thousand_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = CIFAR | {"data": {**CIFAR["data"], "dataset": "svhn", "augmentation": "pad_crop"}}
    values |= {"model": {"arch": "vgg16_bn_cifar", "num_classes": 10}}
    run = write_run(tmp_path / "run", values, images=10_500)
    code, lines, _ = leaderboard(capsys, run)
    assert code == 0
    assert "not for RobustBench, pretrain, keep-0.1/finetune, " in lines[-1]
    assert "there is no leaderboard for svhn linf, only for cifar10 linf, cifar10 l2, cifar100 linf, im" in lines[-1]
    issue = (run / "report/leaderboards/adversarial_pruning_benchmark/new-ap-method.md").read_text()
    verdicts = pq.read_table(next((run / "keep-0.1/finetune/evaluate").glob("*.parquet"))).to_pydict()
    robust = np.mean(verdicts["robust_correct"][:10_000])
    assert robust != np.mean(verdicts["robust_correct"])
    section = issue.partition("_V16_SVHN_US_90")[2].partition("## ")[0]
    assert f"_Robust Accuracy (AA):_ {100 * robust:.2f}\n" in section

    spread = write_run(tmp_path / "spread", values)
    for stage in ("keep-0.1", "keep-0.05", "keep-0.01"):
        write_autoattack(spread / stage / "finetune", np.arange(10_000) * 26_032 // 10_000, seed=1)
    code, _, err = leaderboard(capsys, spread)
    assert code == 2
    assert "10,000 images were evaluated, but not all of the first 10,000" in err


def test_imagenet_requires_the_list_and_torchvisions_preprocessing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = {"settings": settings("4/255")}
    run = write_run(tmp_path / "run", IMAGENET, images=5000, **own)
    code, lines, err = leaderboard(capsys, run)
    assert (code, lines) == (2, [])
    assert "was evaluated on 5,000 images (read from the FFCV file), and RobustBench uses the 5,000 of its list" in err
    assert f"python -m launch evaluate {run} --attack autoattack --folder DIR --image-list imagenet_test" in err
    assert "adversarial pruning benchmark: it accepts cifar10 and svhn with resnet18_cifar or" in err
    write_autoattack(run / "keep-0.1/finetune", np.arange(5000), 77, **own, **LISTED | {"image_list_sha256": "0" * 64})
    assert (
        "was evaluated on 5,000 images (torchvision, resize 256, centre crop 224), and" in leaderboard(capsys, run)[2]
    )
    _, robust = write_autoattack(
        run / "keep-0.1/finetune", np.arange(5000), 78, **own, **LISTED, flags={"zero_gradient": 5000}
    )
    code, lines, _ = leaderboard(capsys, run)
    assert code == 0
    assert [line.split(":")[0] for line in lines[1:]] == [
        "not for RobustBench, pretrain, keep-0.1/magnitude",
        "not for adversarial pruning benchmark",
    ]
    ((name, info),) = model_infos(run).items()
    assert name == f"model_info/imagenet/Linf/{ID}_keep-0.1.json"
    assert (info["eps"], info["architecture"], info["unreliable"]) == ("4/255", "WideResNet-50-2", True)
    assert info["autoattack_acc"] == f"{100 * robust.mean():.2f}"


@pytest.mark.parametrize(
    ("values", "more", "message"),
    [
        (
            {},
            {"images": 0},
            "evaluated by nothing, and only standard AutoAttack counts: python -m launch evaluate .* autoattack",
        ),
        (
            {},
            {"attack": "pgd", "title": "PGD-20"},
            "evaluated by PGD-20 on 10,000 images, and only standard AutoAttack counts",
        ),
        (
            {},
            {"settings": settings("8/255") | {"iterations": 5}},
            "evaluated by AutoAttack .* and only standard AutoAttack counts",
        ),
        (
            {},
            {"images": 1000},
            "evaluated on 1,000 of the 10,000 test images: python -m launch evaluate .* --images all",
        ),
        ({}, {"model_sha256": "of another network"}, "evaluated by nothing"),
        ({"threat_model": {"norm": "linf", "eps": "4/255"}}, {}, "eps for cifar10 linf is 8/255, and .* is 4/255"),
        ({"data": {**CIFAR["data"], "image_size": 28}}, {}, "images were resized or cropped"),
        ({"data": {**CIFAR["data"], "augmentation": "random_resized_crop"}}, {}, "images were resized or cropped"),
        ({"model": {"num_classes": 4}}, {}, "cifar10 has 10 classes, and this network has 4"),
        (
            {"sparsity": {"keep_fractions": [0.1, 0.2]}},
            {"images": 100},
            "90, 95 and 99 % pruned, .* lacks 95 % and 99 %",
        ),
        ({"model": {"arch": "wrn_28_4"}}, {"images": 100}, "resnet18_cifar or .*; this run is cifar10 with wrn_28_4"),
        ({"threat_model": {"norm": "l2", "eps": "1/2"}}, {"images": 100}, "at linf eps 8/255, and .* is l2 eps 1/2"),
        (
            {"sparsity": {"structure": "1x4"}},
            {"images": 100},
            "is of unstructured pruning, and sparsity.structure is 1x4",
        ),
    ],
)
def test_networks_outside_a_leaderboards_rules_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], values: dict[str, Any], more: dict[str, Any], message: str
) -> None:
    merged = CIFAR | {key: {**CIFAR[key], **value} for key, value in values.items()}
    run = write_run(tmp_path / "run", merged, **{"images": 10_000, **more})
    code, lines, err = leaderboard(capsys, run)
    assert (code, lines) == (2, [])
    assert re.search(message, err)
    assert not (run / "report").exists()


def test_l2_extra_images_and_imported_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = CIFAR | {"threat_model": {"norm": "l2", "eps": "1/2"}}
    values |= {"model": {**CIFAR["model"], "arch": "wrn_28_10", "weights": "/data/others.safetensors"}}
    run = write_run(tmp_path / "run", values, images=10_000, settings=settings("1/2") | {"norm": "l2"})
    assert leaderboard(capsys, run)[0] == 0
    info = model_infos(run)[f"model_info/cifar10/L2/{ID}_dense.json"]
    assert (info["eps"], info["architecture"], info["additional_data"]) == ("0.5", "WideResNet-28-10", None)
    values = CIFAR | {"data": {**CIFAR["data"], "extra_fraction": 0.5}}
    run = write_run(tmp_path / "more", values, images=10_000)
    assert leaderboard(capsys, run)[0] == 0
    assert all(info["additional_data"] is True for info in model_infos(run).values())


def test_ids_are_file_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", CIFAR, images=10_000)
    code, _, err = leaderboard(capsys, run, PAPER.replace(ID, "../up"))
    assert code == 2
    assert "--id ../up: expected letters, digits and dashes" in err


def test_a_run_that_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", CIFAR, images=10_000)
    (run / "report").touch()  # a file in the way, which stops even root
    code, lines, err = leaderboard(capsys, run)
    assert (code, lines) == (2, [])
    assert re.fullmatch(rf"error: {run}/report/leaderboards cannot be written: .*; make a copy of the run\n", err)
