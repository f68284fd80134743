"""Network names: which are legal, and the messages for those that are not."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from pipeline.recipe.architectures import OWN, TORCHVISION, known_architecture
from pipeline.recipe.sections import Model


@pytest.mark.parametrize("name", OWN + TORCHVISION)
def test_legal_names_are_accepted(name: str) -> None:
    assert known_architecture(name) == name


def test_names_are_unique() -> None:
    assert len({*OWN, *TORCHVISION}) == len(OWN) + len(TORCHVISION)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("resnet81", "unknown network; did you mean resnet"),
        ("wrn-28-4", "unknown network; did you mean wrn_28_4. docs"),
        ("vgg16_bn_cifar10", "unknown network; did you mean vgg16_bn_cifar"),
        ("transformer", "unknown network; docs/recipes.md lists them all"),
        ("", "unknown network; docs/recipes.md lists them all"),
    ],
)
def test_unknown_names_are_refused_with_near_ones(name: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        known_architecture(name)
    assert str(caught.value).endswith("docs/recipes.md lists them all")


def test_a_recipe_reports_an_unknown_network_once() -> None:
    with pytest.raises(ValidationError) as caught:
        Model(arch="resnet81", num_classes=10)
    (problem,) = caught.value.errors()
    assert problem["loc"] == ("arch",)
    assert "did you mean resnet18" in problem["msg"]


def test_a_keep_fraction_of_weights_needs_the_weights() -> None:
    with pytest.raises(ValidationError, match="weights_keep_fraction is set without weights; name the file"):
        Model.model_validate({"arch": "resnet18", "num_classes": 10, "weights_keep_fraction": 0.1})
