"""The model of a step's cost over workers, against a ring that is walked message by message."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.recipe.file import load_recipe
from tests.bench.scaling import ATTACK_PASS, Machine, Sent, compute_s, main, send_s
from tests.support.commands import ROOT

RECIPE = ROOT / "recipes" / "imagenet_resnet50_linf4.yaml"


@given(workers=st.sampled_from([1, 2, 4, 8, 16, 32]), latency=st.floats(0, 1e-3), bandwidth=st.floats(1e8, 1e11))
def test_sending_is_that_of_a_ring(workers: int, latency: float, bandwidth: float) -> None:
    """A sum goes round twice in parts of 1/n, a gathering once; every message waits for the one before it."""
    recipe, sent = load_recipe(RECIPE), Sent(8_000, 16_000, 400)
    walked = 0.0
    for _ in range(2 * (workers - 1)):
        walked += latency + sent.gradients / workers / bandwidth
    for whole in (sent.weights, recipe.batch.micro_batches_per_step * sent.statistics):
        for _ in range(workers - 1):
            walked += latency + whole / workers / bandwidth
    assert send_s(recipe, sent, workers, Machine(1.0, bandwidth, latency)) == pytest.approx(walked)


def test_compute_is_that_of_the_images_passes() -> None:
    recipe = load_recipe(RECIPE)  # two attack steps
    machine = Machine(100.0, 1.0, 0.0)
    assert compute_s(recipe, 1, machine) == pytest.approx(1024 / 100 * (1 + 2 * ATTACK_PASS))
    assert compute_s(recipe, 32, machine) == pytest.approx(compute_s(recipe, 1, machine) / 32)
    with pytest.raises(ValueError, match="3 workers do not divide 32"):
        compute_s(recipe, 3, machine)


def test_the_table_says_where_a_recipe_ends(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(RECIPE), "--images-per-s", "1000"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 7
    assert "at most 32 workers" not in "".join(rows[:3])
    assert all("at most 32 workers" in row for row in rows[3:])


def test_the_page_holds_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    page = Path(ROOT / "docs" / "scaling.md").read_text()
    commands = [line for line in page.splitlines() if line.startswith("python -m tests.bench.scaling recipes/")]
    assert commands
    for command in commands:
        words = command.split()[3:]
        assert main([str(ROOT / words[0]), *words[1:]]) == 0
        table = capsys.readouterr().out.partition("\n\n")[2].strip()
        assert table in page, command
