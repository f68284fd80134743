"""Every row of the paper's tables has a recipe with the hyperparameters of the paper and its reference code.

The numbers are those of HYDRA's shell scripts and YAML files, unless the paper states another one (eps). Rows without a
script in the reference code take the numbers of the same objective on the other data set or network.
"""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest

from pipeline.recipe.file import load_recipe
from pipeline.recipe.objective import CrownIbp, Free, MixTrain, Stability, Trades
from pipeline.recipe.schema import Recipe

RECIPES = Path(__file__).parents[3] / "recipes"
NETWORKS = {"vgg16": "vgg16_bn_cifar", "wrn28_4": "wrn_28_4", "cnn_small": "cnn_small", "cnn_large": "cnn_large"}
SPARSITIES = tuple(map(Decimal, ("0.1", "0.05", "0.01")))
SGD = ("sgd", 0.9, 1e-4, (100, 20, 100), (0.1, 0.1, 0.01))
"""Optimizer, momentum, weight decay; epochs and learning rates of pretrain, prune and finetune."""
BATCH = {"trades": 128, "smoothing": 128, "mixtrain": 50, "crown_ibp": 128}
ROWS = [
    *[
        (data, net, how)
        for data in ("cifar10", "svhn")
        for net in ("vgg16", "wrn28_4")
        for how in ("trades", "smoothing")
    ],
    *[
        (d, net, how)
        for d in ("cifar10", "svhn")
        for net in ("cnn_small", "cnn_large")
        for how in ("mixtrain", "crown_ibp")
    ],
]


def optimisation(recipe: Recipe) -> tuple[str, float, float, tuple[int, ...], tuple[float, ...]]:
    phases = [phase for _, phase in recipe.phases if phase is not None]
    (shared,) = {(phase.optimizer, phase.momentum, phase.weight_decay) for phase in phases}
    return (*shared, tuple(phase.epochs for phase in phases), tuple(phase.lr for phase in phases))


@pytest.mark.parametrize(("data", "net", "how"), ROWS)
def test_every_row_of_the_papers_tables_has_its_recipe(data: str, net: str, how: str) -> None:
    recipe = load_recipe(RECIPES / f"{data}_{net}_{how}.yaml")
    assert (recipe.data.dataset, recipe.model.arch) == (data, NETWORKS[net])
    assert recipe.sparsity.keep_fractions == SPARSITIES
    assert (recipe.sparsity.allocation, recipe.sparsity.score_init) == ("uniform", "scaled")
    assert [method.label for method in recipe.sparsity.baselines] == ["magnitude"]
    assert recipe.sparsity.baseline_epochs == "finetune_epochs"
    assert recipe.threat_model is not None
    norm, eps, objective = recipe.threat_model.norm, recipe.threat_model.eps, recipe.objective

    # Where the reference uses --is-semisup, half of each CIFAR-10 batch is pseudo-labelled.
    extra = data == "cifar10" and how in ("trades", "smoothing")
    assert (recipe.data.extra_fraction == Decimal("0.5")) == extra
    assert recipe.batch.batch_per_step == BATCH[how] * (2 if extra else 1)
    assert recipe.data.augmentation == ("pad_crop_flip" if data == "cifar10" else "pad_crop")
    if how == "trades":
        assert optimisation(recipe) == SGD
        assert isinstance(objective, Trades)
        assert (norm, eps, objective.beta) == ("linf", Fraction(8, 255), 6)
        assert (objective.steps, objective.step_size) == (10, Fraction(2, 255))
    elif how == "smoothing":
        assert optimisation(recipe) == SGD
        assert isinstance(objective, Stability)
        assert (norm, objective.beta) == ("l2", 6)
        assert objective.sigma == Fraction(1, 4)
        assert (recipe.evaluation.n0, recipe.evaluation.n, recipe.evaluation.alpha) == (100, 10_000, 0.001)
    else:
        assert isinstance(objective, MixTrain if how == "mixtrain" else CrownIbp)
        assert (norm, eps) == ("linf", Fraction(2, 255))
        optimizer, _, decay, epochs, rates = optimisation(recipe)
        assert (optimizer, rates) == ("adam", (1e-3, 1e-5, 5e-4))
        ramp = objective.eps_ramp * epochs[0]
        if isinstance(objective, MixTrain):
            assert (epochs, ramp) == ((60, 20, 60), 15)
            assert (objective.robust_probability, objective.robust_samples) == (0.8, 5 if net == "cnn_small" else 1)
            assert (objective.robust_weight_start, objective.robust_weight_end) == (0.1, 50)
            assert decay == pytest.approx(1e-4 / 51, rel=0.03)  # the loss is divided by 1 + 50
        else:
            assert (epochs, ramp, decay) == ((200, 20, 100), 120, 1e-4)
            assert (objective.kappa_start, objective.kappa_end) == (0, 0)
            assert (objective.crown_start, objective.crown_end) == (1, 0)


def test_the_largest_network_and_the_smaller_ball_have_the_same_training() -> None:
    largest = load_recipe(RECIPES / "cifar10_wrn28_10_trades.yaml")
    assert optimisation(largest) == SGD
    assert (largest.model.arch, largest.sparsity.keep_fractions) == ("wrn_28_10", (Decimal("0.1"),))
    figure = load_recipe(RECIPES / "cifar10_vgg16_trades_eps2.yaml")
    assert optimisation(figure) == SGD
    assert figure.threat_model is not None
    assert figure.threat_model.eps == Fraction(2, 255)
    assert [float(1 / keep) for keep in figure.sparsity.keep_fractions] == [10, 25, 50, 100, 200]


def test_imagenet_has_the_references_free_training_in_actual_epochs() -> None:
    recipe = load_recipe(RECIPES / "imagenet_resnet50_free.yaml")
    assert isinstance(recipe.objective, Free)
    replays = recipe.objective.replays
    assert (recipe.model.arch, replays) == ("resnet50", 4)
    nominal = (90, 20, 100)
    assert optimisation(recipe) == (*SGD[:3], tuple(math.ceil(n / replays) for n in nominal), SGD[4])
    assert recipe.threat_model is not None
    assert recipe.threat_model.eps == recipe.objective.step_size == Fraction(4, 255)
    assert recipe.batch.batch_per_step == 256
    assert recipe.sparsity.keep_fractions == SPARSITIES


@pytest.mark.parametrize("name", ["cifar10_wrn28_4_search", "fashion_mnist_search"])
def test_the_search_prunes_half_of_a_clean_network_and_does_not_finetune(name: str) -> None:
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    assert recipe.sparsity.keep_fractions == (Decimal("0.5"),)
    assert recipe.phases.finetune is None
    assert recipe.phases.pretrain is not None
    assert recipe.phases.pretrain.objective is not None
    assert recipe.phases.pretrain.objective.name == "clean"
    assert recipe.objective.name != "clean"
