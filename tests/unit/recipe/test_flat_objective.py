"""Runs with flat objectives; flat_recipes/ has a resolved recipe of that format for each technique."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from launch import run_folder
from launch.__main__ import main
from pipeline.recipe.file import dump_recipe, load_recipe, recipe_hash
from pipeline.recipe.flat_objective import ADDED, DEFAULTS, from_flat, to_flat
from pipeline.recipe.objective import TECHNIQUES
from pipeline.recipe.schema import RecipeError
from pipeline.report.results import read_runs
from pipeline.run.files import read_json

FLAT = Path(__file__).parent / "flat_recipes"
HASHES: dict[str, str] = read_json(FLAT / "hashes.json")
PAIRS = [(name, key) for name in HASHES for key in DEFAULTS if key not in TECHNIQUES[name].model_fields]


def flat_values(name: str) -> dict[str, Any]:
    return yaml.safe_load((FLAT / f"{name}.yaml").read_text(encoding="utf-8"))


def write_recipe(folder: Path, values: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return folder / "recipe.yaml"


def test_every_technique_of_the_flat_format_has_a_recipe() -> None:
    names = {path.stem for path in FLAT.glob("*.yaml")}
    flat = {name for name, one in TECHNIQUES.items() if set(one.model_fields) - ADDED.keys() <= flat_keys()}
    assert names == HASHES.keys() == flat
    assert all(set(flat_values(name)["objective"]) == flat_keys() for name in names)


def flat_keys() -> set[str]:
    """The keys of the flat form."""
    return {"name", *DEFAULTS}


@pytest.mark.parametrize("name", HASHES)
def test_a_flat_recipe_is_read_with_its_own_values_and_keeps_its_hash(name: str) -> None:
    recipe, values = load_recipe(FLAT / f"{name}.yaml"), flat_values(name)
    assert type(recipe.objective) is TECHNIQUES[name]
    assert recipe_hash(recipe) == HASHES[name]
    assert to_flat(yaml.safe_load(dump_recipe(recipe))) == values, "no value is lost"
    for objective in recipe.objectives.values():
        assert set(objective.model_dump()) == set(type(objective).model_fields)
    changed = {key for key, value in values["objective"].items() if key != "name" and value != DEFAULTS[key]}
    assert changed <= set(TECHNIQUES[name].model_fields)
    assert changed or name == "clean"


def test_some_recipes_have_phases_with_their_own_objective() -> None:
    own = {name: len(load_recipe(FLAT / f"{name}.yaml").objectives) - 1 for name in HASHES}
    assert {name for name, count in own.items() if count} == {"pgd", "crown_ibp", "mixtrain"}


@pytest.mark.parametrize(("name", "key"), PAIRS)
def test_a_changed_key_of_another_technique_is_refused(name: str, key: str, tmp_path: Path) -> None:
    values = flat_values(name)
    values["objective"][key] = 0.125 if DEFAULTS[key] is not None else "1/8"
    with pytest.raises(
        RecipeError, match=rf"recipe\.yaml: objective\.{key} = .*: a key of .*, not of {name}, which has"
    ):
        load_recipe(write_recipe(tmp_path, values))


def test_only_the_complete_flat_form_may_hold_another_techniques_defaults(tmp_path: Path) -> None:
    values = flat_values("pgd")
    partial = {key: value for key, value in values["objective"].items() if key != "noise_samples"}
    with pytest.raises(RecipeError, match=r"objective\.beta = 6.0: a key of trades, stability, not of pgd"):
        load_recipe(write_recipe(tmp_path, values | {"objective": partial}))
    with pytest.raises(RecipeError, match=r"^\S+: objective\.beta = 6.0: a key of trades, stability, not of pgd"):
        load_recipe(FLAT / "pgd.yaml", ["objective.beta=6.0"])
    earlier = {key: value for key, value in values["objective"].items() if key not in ("replays", "overfitting_guard")}
    assert recipe_hash(load_recipe(write_recipe(tmp_path, values | {"objective": earlier}))) == HASHES["pgd"]


@pytest.mark.parametrize(
    "recipe", [{}, {"objective": None}, {"objective": "pgd", "phases": 3}, {"phases": {"prune": 1}}]
)
def test_anything_but_an_objective_is_left_to_validation(recipe: dict[str, Any]) -> None:
    assert from_flat(recipe) == recipe
    nameless = {"objective": {**DEFAULTS}}
    assert from_flat(nameless) == nameless


def test_a_run_with_a_flat_recipe_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A recipe in today's format continues it, `status` shows it, and a report takes it with a run of another seed."""
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(FLAT / "mixtrain.yaml", ["data.train_file=/data/a.beton", "data.test_file=/data/b.beton"])
    folder = run_folder.open_or_create(recipe, "run", {})
    hashed = read_json(folder / "provenance.json")["recipe_sha256"]
    today = (folder / "recipe.yaml").read_text(encoding="utf-8")
    write_recipe(folder, to_flat(yaml.safe_load(today)))
    assert (folder / "recipe.yaml").read_text(encoding="utf-8").count("noise_samples") == 2

    assert main(["status", str(folder)]) == 0
    assert "cannot be shown" not in capsys.readouterr().out
    other = run_folder.open_or_create(recipe.model_copy(update={"seed": 1}), "other", {})
    assert [run.recipe.seed for run in read_runs([folder, other])] == [0, 1]
    (folder / "pretrain" / "step-00000001").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"objective.robust_samples: 2 -> 4\); choose a new --name"):
        run_folder.open_or_create(load_recipe(folder / "recipe.yaml", ["objective.robust_samples=4"]), "run", {})

    assert run_folder.open_or_create(recipe, "run", {}) == folder
    assert read_json(folder / "provenance.json")["recipe_sha256"] == hashed == recipe_hash(recipe)
    assert (folder / "recipe.yaml").read_text(encoding="utf-8") == today
