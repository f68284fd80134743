"""Result files of evaluations: they round-trip byte for byte, and errors name the damaged file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.evaluation.images import EvaluationImages
from pipeline.evaluation.measures.base import summarise
from pipeline.evaluation.result import EvaluationHeader, EvaluationResult, HonestyResult
from pipeline.run.files import atomic_write_json

HEADER: dict[str, Any] = {
    **{"attack": "corruptions", "title": "all corruptions", "settings": {"norm": None, "eps": None, "kinds": ["fog"]}},
    **{"chunk": 250, "model_sha256": "m", "data_sha256": "d"},
}
LISTED = {"preprocessing": "torchvision, resize 256, centre crop 224", "image_list_sha256": "l"}
SHORT = {"name": "mask", "verdict": "warn", "figure": "9 of 10 connections"}
CHECK = {**SHORT, "meaning": "it was not applied"}
CORRECT = np.array([True, True, False, True])


def verdicts(**columns: np.ndarray) -> dict[str, np.ndarray]:
    return {"sample_id": np.arange(4), "clean_correct": CORRECT, "robust_correct": CORRECT[::-1], **columns}


COLUMNS = {
    "least": {},
    "top5": {"clean_top5": CORRECT, "robust_top5": CORRECT},
    "ensemble": {"broken_square": ~CORRECT, "flag_other": CORRECT},
    "corruptions": {f"{'extra' if n == 'blur' else 'right'}_{n}_{s}": CORRECT for n in ("fog", "blur") for s in (1, 2)},
    "certificates": {"radius": np.linspace(0, 0.3, 4), "clean_prediction": np.array([1, -1, 0, 2])},
}


@pytest.mark.parametrize("listed", [{}, LISTED], ids=["file", "listed"])
@pytest.mark.parametrize("honesty", [{}, {"honesty": {"images": 2, "checks": [SHORT]}}], ids=["alone", "honesty"])
@pytest.mark.parametrize("measure", COLUMNS)
def test_a_result_round_trips(tmp_path: Path, measure: str, honesty: Any, listed: dict[str, str]) -> None:
    values = HEADER | listed | {"images": 4} | summarise(verdicts(**COLUMNS[measure])) | honesty
    atomic_write_json(tmp_path / "before.json", values)
    result = EvaluationResult.read(tmp_path / "before.json")
    atomic_write_json(tmp_path / "after.json", result.to_json())
    assert (tmp_path / "after.json").read_bytes() == (tmp_path / "before.json").read_bytes()
    assert (result.correct("clean"), result.accuracy("robust").value) == (3, 0.75)


def test_honesty_round_trips(tmp_path: Path) -> None:
    values = HEADER | {"images": 4, "checks": [CHECK]}
    atomic_write_json(tmp_path / "honesty.json", values)
    result = HonestyResult.read(tmp_path / "honesty.json")
    assert json.dumps(result.to_json()) == json.dumps(values)
    assert result.summary().to_json() == {"images": 4, "checks": (SHORT,)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{torn", "cannot be read"),
        ("[]", "is damaged: value: Input should be"),
        (json.dumps(HEADER | {"images": 4}), "is damaged: clean_correct: Field required"),
    ],
)
def test_errors_name_the_damaged_file(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "pgd.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"^{path} {message}"):
        EvaluationResult.read(path)


def test_only_a_file_with_the_same_header_is_current(tmp_path: Path) -> None:
    values = HEADER | {"images": 4, "checks": [CHECK]}
    header = EvaluationHeader.parse(values)
    path = tmp_path / "pgd.json"
    assert header.read_if_current(path, HonestyResult) is None
    for change, current in (
        ({}, True),
        ({"chunk": 1}, False),
        ({"settings": {}}, False),
        ({"more": 1}, True),
        ({"checks": 1}, False),
    ):
        atomic_write_json(path, values | change)
        assert (header.read_if_current(path, HonestyResult) is not None) == current
    path.write_text("[]")
    assert header.read_if_current(path, HonestyResult) is None


@pytest.mark.parametrize(("count", "expected"), [(None, 10), (10, 10), (11, 10), (3, [0, 3, 6]), (1, [0])])
def test_images_are_spread_evenly(count: int | None, expected: Any) -> None:
    class TenImages:
        num_samples = 10

    loader: Any = TenImages()
    images = EvaluationImages.all_of(loader, "none")
    expected = list(range(10)) if expected == 10 else expected
    assert images.spread(count).ids.tolist() == expected
    assert [ids.tolist() for ids in images.spread(3).chunks(2)] == [[0, 3], [6]]
