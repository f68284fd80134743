"""Training techniques in recipes: each accepts its own keys and refuses those of others, in files and overrides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.__main__ import main
from pipeline.recipe.file import apply_overrides, dump_recipe, load_recipe
from pipeline.recipe.objective import TECHNIQUES
from pipeline.recipe.schema import Recipe, RecipeError, parse_recipe
from pipeline.recipe.technique import Attacking, Bounding, MultiStep, OneStep, Smoothing

DEMO = Path(__file__).parents[3] / "recipes" / "fashion_mnist.yaml"
FIELDS = {key: field for technique in TECHNIQUES.values() for key, field in technique.model_fields.items()}
KEYS = [key for key in FIELDS if key != "name"]
PAIRS = [(name, key) for name in TECHNIQUES for key in KEYS]
OWN = [(name, key) for name, key in PAIRS if key in TECHNIQUES[name].model_fields]
FOREIGN = [pair for pair in PAIRS if pair not in OWN]


def value_of(key: str) -> Any:
    """A legal value of a key for the techniques that have it: its default, which is the easiest to overlook."""
    field = FIELDS[key]
    return field.examples[0] if field.examples else field.default


def values_with(name: str) -> dict[str, Any]:
    """The demo's recipe with another technique and its required keys."""
    values = yaml.safe_load(DEMO.read_text(encoding="utf-8"))
    required = {key for key, field in TECHNIQUES[name].model_fields.items() if field.is_required()}
    values["objective"] = {"name": name, **{key: value_of(key) for key in required}}
    values["threat_model"] = {"norm": "l2" if issubclass(TECHNIQUES[name], Smoothing) else "linf", "eps": "1/10"}
    values["evaluation"] |= {"attacks": [], "validation_steps": 3}
    return values


def refusal(values: dict[str, Any]) -> str:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(values, "here")
    return str(caught.value)


def test_every_key_belongs_to_some_technique_and_not_to_all() -> None:
    assert len(FOREIGN) > len(OWN) > len(TECHNIQUES)
    assert {key for _, key in OWN} == {key for _, key in FOREIGN} == set(KEYS)


@pytest.mark.parametrize(("name", "key"), OWN)
def test_a_technique_accepts_its_own_keys(name: str, key: str) -> None:
    recipe = parse_recipe(apply_overrides(values_with(name), [f"objective.{key}={value_of(key)}"]), "here")
    assert type(recipe.objective) is TECHNIQUES[name]
    assert key in recipe.objective.model_dump()
    nested = values_with(name)
    nested["phases"]["prune"]["objective"] = {**nested["objective"], key: value_of(key)}
    assert parse_recipe(nested, "here").phases.prune.objective == recipe.objective


@pytest.mark.parametrize(("name", "key"), FOREIGN)
def test_a_technique_refuses_the_keys_of_others(name: str, key: str) -> None:
    value, fields = value_of(key), TECHNIQUES[name].model_fields
    owners = ", ".join(other for other, technique in TECHNIQUES.items() if key in technique.model_fields)
    own = ", ".join(one for one in fields if one != "name") or "none"
    why = f"{key} = {value!r}: a key of {owners}, not of {name}, which has {own}; remove it, or override"

    in_file = values_with(name)
    in_file["objective"][key] = value
    assert refusal(in_file).startswith(f"here: objective.{why} the section as a whole: objective={{name: {name}")

    with_override = apply_overrides(values_with(name), [f"objective.{key}={yaml.safe_dump(value)}"])
    assert refusal(with_override) == refusal(in_file)

    nested = values_with(name)
    nested["phases"]["finetune"]["objective"] = in_file["objective"]
    assert refusal(nested).startswith(f"here: phases.finetune.objective.{why} the section as a whole: phases.finetune.")


def test_a_key_of_another_technique_ends_with_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(DEMO), "--dry-run", "objective.beta=99"]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith(
        f"error: {DEMO}: objective.beta = 99: a key of trades, stability, not of pgd, which has "
    )
    assert output.err.count("\n") == 1


@pytest.mark.parametrize("name", TECHNIQUES)
def test_a_resolved_recipe_shows_the_techniques_own_keys(name: str, tmp_path: Path) -> None:
    recipe = parse_recipe(values_with(name), "here")
    resolved = tmp_path / "recipe.yaml"
    resolved.write_text(dump_recipe(recipe), encoding="utf-8")
    assert set(yaml.safe_load(resolved.read_text())["objective"]) == set(TECHNIQUES[name].model_fields)
    assert load_recipe(resolved) == recipe


def test_a_technique_refuses_threat_models_that_it_does_not_support() -> None:
    """Every technique with every threat model, and the message of each refusal."""

    def answer(name: str, threat_model: dict[str, Any] | None) -> str:
        try:
            parse_recipe(values_with(name) | {"threat_model": threat_model}, "here")
        except RecipeError as error:
            return str(error)
        return "trains"

    for name, technique in TECHNIQUES.items():
        without = answer(name, None)
        linf, l2 = (answer(name, {"norm": norm, "eps": "1/10"}) for norm in ("linf", "l2"))
        if name == "clean":
            assert without == linf == l2 == "trains"
        elif issubclass(technique, Smoothing):
            assert l2 == "trains"
            assert f"objective.name {name} is for randomized smoothing" in linf
            assert "threat_model.norm is None" in without
        else:
            assert linf == "trains"
            assert f"objective.name {name} needs a threat_model" in without
            assert (l2 == "trains") == (name not in ("nfgsm", "fgsm_pgi", "ibp", "crown_ibp", "mixtrain"))


def test_properties_of_the_techniques() -> None:
    def names_with(mixin: type) -> list[str]:
        return [name for name, technique in TECHNIQUES.items() if issubclass(technique, mixin)]

    assert names_with(Attacking) == ["pgd", "fgsm", "nfgsm", "fgsm_pgi", "free", "trades", "smoothadv"]
    assert names_with(MultiStep) == ["pgd", "trades", "smoothadv"]
    assert names_with(OneStep) == ["fgsm", "nfgsm", "fgsm_pgi", "free"]
    assert names_with(Smoothing) == ["noise", "stability", "smoothadv"]
    assert names_with(Bounding) == ["ibp", "crown_ibp", "mixtrain"]
    recipes: dict[str, Recipe] = {name: parse_recipe(values_with(name), "here") for name in TECHNIQUES}
    measures = {name: recipe.objective.measure for name, recipe in recipes.items()}
    assert [name for name, measure in measures.items() if measure == "certified"] == names_with(Smoothing)
    assert [name for name, measure in measures.items() if measure == "verified"] == names_with(Bounding)
    assert [name for name, recipe in recipes.items() if recipe.objective.guarded] == names_with(OneStep)
    assert [name for name, recipe in recipes.items() if recipe.objective.carries_noise] == ["free"]
    assert {name: recipe.objective.steps_per_batch for name, recipe in recipes.items()} == {
        name: 4 if name == "free" else 1 for name in TECHNIQUES
    }
    assert (
        TECHNIQUES["fgsm"].model_validate({"name": "fgsm", "step_size": 1, "overfitting_guard": None}).guarded is False
    )
