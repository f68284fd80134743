"""The golden losses: the first steps of every objective and phase reproduce the recorded ones.

So a refactoring, which must not change them, is verified: bit for bit on a processor model that has recorded them, and
within rounding on any other.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from pipeline.recipe.objective import TECHNIQUES
from pipeline.recipe.stages import PhaseName, stages_of
from pipeline.run.files import read_json
from tests.golden.recipes import EPOCHS, RECIPES, STEPS, UNSTEADY, golden_recipe
from tests.golden.record import DEADLINE_S, FILE, Facts, Golden, processor, replace_section, run_golden_recipes

pytestmark = pytest.mark.timeout(DEADLINE_S + 60)
ADVICE = "if this change was meant to change numbers, record them again: python -m tests.golden.record"


def tolerance(recipe: str, stage: str, step: int) -> float:
    """Largest relative difference of a loss on another processor model, for steps 1, 2, ... of a stage.

    Measured by limiting PyTorch, oneDNN and MKL to AVX2, and to SSE4: at most 2e-6 in the first steps of new weights;
    later 2e-7, and 2e-2 in the `UNSTEADY` recipes. Beyond that, 1e-3 allows for a connection that enters or leaves a
    mask, or a pixel's gradient that changes its sign.
    """
    if stage == "pretrain" and step <= 3:
        return 1e-5
    return 0.1 if recipe in UNSTEADY else 1e-3


def differences(name: str, reference: dict[str, Facts], result: dict[str, Facts], exact: bool) -> list[str]:
    """Differences of the stages of the recipe `name`: for each its first loss that differs or, if `exact`, digests."""
    messages = [f"{stage}: it was recorded or run, but not both" for stage in sorted(reference.keys() ^ result.keys())]
    for stage in sorted(reference.keys() & result.keys()):
        expected, actual = reference[stage], result[stage]
        losses = expected["losses"].split(), actual["losses"].split()
        counts = [len(part) for part in losses]
        if counts[0] != counts[1]:
            messages.append(f"{stage}: it took {counts[1]} steps, but {counts[0]} are recorded")
            continue
        for step, (one, other) in enumerate(zip(*losses, strict=True), start=1):
            there, here = float.fromhex(one), float.fromhex(other)
            limit = 0.0 if exact else tolerance(name, stage, step) * abs(there)
            if abs(here - there) > limit:
                messages.append(
                    f"{stage}, step {step} of {counts[0]}: the loss is {here!r} ({other}), but {there!r} ({one}) is "
                    f"recorded; they differ by {abs(here - there):.3g}, and may differ by {limit:.3g}"
                )
                break
        else:
            messages += [
                f"{stage}: all losses are equal, but the {part} are not: {actual.get(part)} instead of {digest}"
                for part, digest in expected.items()
                if exact and actual.get(part) != digest
            ]
    return messages


@pytest.fixture(scope="module")
def results(fashion_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Golden:
    return run_golden_recipes(fashion_data, tmp_path_factory.mktemp("golden"))


@pytest.mark.parametrize("name", RECIPES)
def test_losses_equal_the_recorded_ones(results: Golden, name: str) -> None:
    sections, here = read_json(FILE), processor()
    section = sections.get(here) or next(iter(sections.values()))
    method = "exactly, on this processor model" if here in sections else f"within rounding, as {here} has no section"
    messages = differences(name, section["recipes"][name], results[name], exact=here in sections)
    assert not messages, "\n".join(
        [
            f"{name}:",
            *messages,
            f"compared {method}; recorded with torch {section['torch']}, this is {torch.__version__}",
            ADVICE,
        ]
    )


def test_every_objective_and_phase_is_recorded_with_all_its_steps(tmp_path: Path) -> None:
    recipes = {name: golden_recipe(tmp_path, name) for name in RECIPES}
    assert {r.objective.name for r in recipes.values()} == set(TECHNIQUES)
    assert {stage.phase for recipe in recipes.values() for stage in stages_of(recipe)} == set(get_args(PhaseName))
    for section in read_json(FILE).values():
        assert section["recipes"].keys() == recipes.keys()
        for name, recipe in recipes.items():
            stages = {stage.name: stage for stage in stages_of(recipe)}
            assert section["recipes"][name].keys() == stages.keys()
            for stage, facts in section["recipes"][name].items():
                epochs, replays = stages[stage].optimisation.epochs, stages[stage].objective.steps_per_batch
                assert len(facts["losses"].split()) == STEPS // EPOCHS * epochs * replays
                assert ("masks" in facts) == (stages[stage].keep_fraction is not None)


RECORDED = {"pretrain": {"losses": "0x1.0p+0 0x1.8p+0", "weights": "w"}}


def _with(**facts: str) -> dict[str, Facts]:
    return {"pretrain": {**RECORDED["pretrain"], **facts}}


def test_a_difference_is_named_by_stage_step_and_both_losses() -> None:
    last_bit = _with(losses="0x1.0p+0 0x1.8000000000001p+0")
    assert differences("clean", RECORDED, RECORDED, exact=True) == []
    assert differences("clean", RECORDED, last_bit, exact=False) == []
    (message,) = differences("clean", RECORDED, last_bit, exact=True)
    assert message == (
        "pretrain, step 2 of 2: the loss is 1.5000000000000002 (0x1.8000000000001p+0), but 1.5 (0x1.8p+0) is "
        "recorded; they differ by 2.22e-16, and may differ by 0"
    )
    (message,) = differences("clean", RECORDED, _with(losses="0x1.1p+0 0x1.8p+0"), exact=False)
    assert message.startswith("pretrain, step 1 of 2: the loss is 1.0625 (0x1.1p+0), but 1.0 (0x1.0p+0) is recorded; ")


def test_digests_count_on_the_same_processor_model_only() -> None:
    (message,) = differences("clean", RECORDED, _with(weights="v"), exact=True)
    assert message == "pretrain: all losses are equal, but the weights are not: v instead of w"
    assert differences("clean", RECORDED, _with(weights="v"), exact=False) == []


def test_a_stage_that_is_missing_or_new_is_a_difference() -> None:
    for one, other in ((RECORDED, {}), ({}, RECORDED)):
        assert differences("clean", one, other, exact=False) == ["pretrain: it was recorded or run, but not both"]


def test_another_number_of_steps_is_a_difference() -> None:
    (message,) = differences("clean", RECORDED, _with(losses="0x1.0p+0"), exact=True)
    assert message == "pretrain: it took 1 steps, but 2 are recorded"


def test_on_other_processors_later_steps_may_differ_more() -> None:
    first, later = ({"prune": {"losses": f"0x1.0p+0 {loss}", "weights": "w"}} for loss in ("0x1.0p+0", "0x1.08p+0"))
    assert len(differences("clean", first, later, exact=False)) == 1
    assert differences(UNSTEADY[0], first, later, exact=False) == []


def test_changed_numbers_drop_the_sections_of_other_processors() -> None:
    section: dict[str, Any] = {"torch": "2", "recipes": {"clean": RECORDED}}
    both, change = replace_section({"one": section}, "other", section)
    assert both == {"one": section, "other": section}
    assert change == "new section for other"
    assert replace_section(both, "one", deepcopy(section)) == (both, "unchanged numbers for one")
    new_section = {"torch": "2", "recipes": {"clean": _with(weights="v")}}
    sections, change = replace_section(both, "one", new_section)
    assert sections == {"one": new_section}
    assert change.splitlines() == [
        "changed numbers for one",
        "  clean: pretrain",
        "  dropped, as it belongs to earlier code: other",
    ]
