"""Recipes: refusals and their messages, overrides, and lossless files."""

from __future__ import annotations

import json
import os
import re
import string
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from launch import run_folder
from launch.__main__ import main
from pipeline.recipe.errors import sections_in, shown
from pipeline.recipe.fields import canonical_decimal
from pipeline.recipe.file import (
    apply_overrides,
    deciding_values,
    dump_recipe,
    dump_yaml,
    load_recipe,
    parse_yaml,
    recipe_hash,
)
from pipeline.recipe.objective import TECHNIQUES, Clean, Pgd
from pipeline.recipe.schema import Recipe, RecipeError, parse_recipe
from pipeline.recipe.sections import Batch
from pipeline.recipe.stages import stages_of

RECIPES = sorted((Path(__file__).parents[3] / "recipes").glob("*.yaml"))
DEMO = next(path for path in RECIPES if path.stem == "fashion_mnist")


unhurried = settings(suppress_health_check=[HealthCheck.too_slow])


def demo_values() -> dict[str, Any]:
    return parse_yaml(DEMO.read_text(encoding="utf-8"), "the demo")


def refusal(*overrides: str) -> str:
    """The message that refuses the demo's recipe with these overrides."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(DEMO, list(overrides))
    return str(caught.value)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_survive_a_round_trip(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    resolved = tmp_path / "recipe.yaml"
    resolved.write_text(dump_recipe(recipe), encoding="utf-8")
    again = load_recipe(resolved)
    assert again == recipe
    assert recipe_hash(again) == recipe_hash(recipe)
    assert dump_recipe(again) == dump_recipe(recipe)


pixels = st.fractions(min_value=Fraction(1, 10**6), max_value=Fraction(99, 100), max_denominator=10**6)
keep = st.decimals(min_value=Decimal("0.0001"), max_value=1, places=4).filter(lambda k: k > 0)
positive = st.floats(min_value=1e-30, max_value=1e30)


@settings(unhurried, max_examples=30)
@given(
    eps=pixels,
    step_size=pixels,
    keeps=st.lists(keep, min_size=1, max_size=4, unique=True),
    lr=positive,
    weight_decay=positive,
    name=st.text(string.ascii_letters + string.digits, min_size=1, max_size=64),
)
def test_a_dump_loses_no_digit(
    eps: Fraction, step_size: Fraction, keeps: list[Decimal], lr: float, weight_decay: float, name: str
) -> None:
    values = demo_values()
    values["name"] = name
    values["threat_model"]["eps"] = str(eps)
    values["objective"]["step_size"] = str(step_size)
    values["sparsity"]["keep_fractions"] = [str(k) for k in keeps]
    values["phases"]["prune"] = {"epochs": 1, "lr": lr, "weight_decay": weight_decay}
    recipe = parse_recipe(values, "here")
    again = parse_recipe(parse_yaml(dump_recipe(recipe), "the dump"), "there")
    assert again == recipe
    assert recipe.threat_model is not None
    assert isinstance(recipe.objective, Pgd)
    assert (recipe.threat_model.eps, recipe.objective.step_size) == (eps, step_size)
    assert recipe.phases.prune.lr == lr
    assert list(recipe.sparsity.keep_fractions) == keeps


@pytest.mark.parametrize(("text", "lr"), [("1e-4", 1e-4), ("1E-4", 1e-4), ("5.0e-4", 5e-4), ("2", 2.0), (".1", 0.1)])
def test_learning_rates_are_floats_however_they_are_written(text: str, lr: float) -> None:
    value = load_recipe(DEMO, [f"phases.prune.lr={text}"]).phases.prune.lr
    assert type(value) is float
    assert value == lr


@pytest.mark.parametrize("spelling", ["0.10", "0.1", "1e-1", "'0.100'"])
def test_a_keep_fraction_has_one_spelling(spelling: str) -> None:
    (keep_fraction,) = load_recipe(DEMO, [f"sparsity.keep_fractions=[{spelling}]"]).sparsity.keep_fractions
    assert canonical_decimal(keep_fraction) == "0.1"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["phases.prune.epoch=3"], "phases.prune.epoch = 3: unknown key; did you mean 'epochs'?"),
        (["threat_model.colour=1"], "threat_model.colour = 1: unknown key; known keys: norm, eps"),
        (["zzz=1"], "zzz = 1: unknown key; known keys: name, seed, data, "),
        (["phases.prune.epochs=true"], "phases.prune.epochs = True: no key of a recipe takes true or false"),
        (["phases.prune.lr=.inf"], "phases.prune.lr = .inf: Input should be a finite number"),
        (["phases=null"], "phases = None: expected a section with the keys pretrain, prune, finetune"),
        (["threat_model=linf"], "threat_model = 'linf': expected a section with the keys norm, eps"),
        (["phases.prune={lr: 0.1}"], "phases.prune.epochs: missing; add it"),
        (
            ["threat_model=null"],
            "objective.name pgd needs a threat_model; add threat_model: {norm: linf, eps: 4/255} or use "
            "objective={name: clean}",
        ),
        (
            ["threat_model=null", "objective={name: clean}", "phases.prune.objective={name: fgsm, step_size: 1/10}"],
            "phases.prune.objective.name fgsm needs a threat_model",
        ),
        (["phases.finetune=null"], "phases.finetune is null; set sparsity.baselines=[]"),
        (["sparsity.baselines=[magnitude, magnitude]"], "name one twice; remove the duplicate"),
        (["sparsity.baselines=magnitude"], "expected a list; write [magnitude]"),
        (
            ["sparsity.baselines=[flying_bird_plus]", "evaluation.validation_steps=0"],
            "evaluation.validation_steps 0 measures none; set evaluation.validation_steps=5 or use flying_bird",
        ),
        (
            ["sparsity.baselines=[flying_bird_plus]", "objective={name: clean}"],
            "objective clean measures none; use flying_bird",
        ),
        (["sparsity.score_weight_decay=-1"], "score_weight_decay = -1: Input should be greater than or equal to 0"),
        (
            ["sparsity.baselines=[grasp]"],
            "Input should be 'hydra', 's2ap', 'magnitude', 'random', 'snip', 'gradual', 'flying_bird' or "
            "'flying_bird_plus'",
        ),
        (["sparsity.baselines=[hydra]"], "hydra is the recipe's own method, which is always trained"),
        (["sparsity.baselines=[{name: hydra, allocation: uniform}]"], "hydra-uniform is the recipe's own method"),
        (["sparsity.baselines=[{name: snip, allocation: learned}]"], "snip has no prune phase that could learn"),
        (["sparsity.tune={finetune_lr: [0.1]}"], "sparsity.tune: finetune_lr [0.1] is no choice; name at least two"),
        (["sparsity.tune={finetune_lr: []}"], "sparsity.tune: finetune_lr [] is no choice; name at least two"),
        (
            ["sparsity.tune={prune_lr: [0.1, 0.2]}"],
            "sparsity.tune.finetune_lr: missing; add it, for example [0.01, 0.0",
        ),
        (["sparsity.tune=[0.1, 0.2]"], "expected a section with the keys finetune_lr, prune_lr"),
        (["sparsity.tune={finetune_lr: 0.1}"], "sparsity.tune.finetune_lr = 0.1: expected a list; write [0.1]"),
        (["sparsity.tune={finetune_lr: [0.1, 0]}"], "sparsity.tune.finetune_lr.1 = 0: Input should be greater than 0"),
        (
            ["sparsity.tune={finetune_lr: [0.1, 0.2], prune_lr: [0.1]}"],
            "sparsity.tune: finetune_lr [0.1, 0.2] and prune_lr [0.1] differ in length; each trial needs one of both, "
            "or set prune_lr to null",
        ),
        (["sparsity.tune={finetune_lr: [0.1, 0.2, 1e-1]}"], "two trials are the same: [0.1, 0.2, 0.1]; change or"),
        (
            ["sparsity.tune={finetune_lr: [0.1, 0.2, 0.1], prune_lr: [0.3, 0.3, 0.3]}"],
            "two trials are the same: [(0.1, 0.3), (0.2, 0.3), (0.1, 0.3)]; change or remove one",
        ),
        (
            ["sparsity.tune={finetune_lr: [0.1, 0.1], prune_lr: [0.3, 0.4]}"],
            "tune.finetune_lr [0.1, 0.1] has equal values, with which magnitude, without a prune phase, would "
            "repeat a trial and have fewer than HYDRA",
        ),
        (
            ["sparsity.tune={finetune_lr: [0.1, 0.2]}", "phases.finetune=null", "sparsity.baselines=[]"],
            "sparsity.tune chooses among finetuned networks, and phases.finetune is null; set sparsity.tune=null",
        ),
        (
            ["sparsity.tune={finetune_lr: [0.1, 0.2]}", "evaluation.validation_steps=0"],
            "evaluation.validation_steps 0 measures none; set evaluation.validation_steps=5 or sparsity.tune=null",
        ),
        (["sparsity.baselines=[{name: magnitude, allocation: harp}]"], "magnitude has no prune phase that could learn"),
        (["phases.finetune=null", "sparsity.baselines=[s2ap]"], "set sparsity.baselines=[]"),
        (
            ["sparsity.structure=3:4"],
            "sparsity.structure = '3:4': Input should be 'unstructured', '2:4', '1:4', '4:8',",
        ),
        (
            ["sparsity.structure=2:4", "sparsity.keep_fractions=[0.5, 0.1]"],
            "sparsity: structure 2:4, which keeps 0.5 of every layer, and keep_fractions ['0.5', '0.1'] ask for others"
            "; set keep_fractions to [0.5], or give it to a baseline, {name: hydra, structure: 2:4}, which has",
        ),
        (
            ["sparsity.baselines=[{name: hydra, structure: 1:4}]"],
            "baselines: hydra-1of4 has structure 1:4, which keeps 0.25 of every layer, and keep_fractions ['0.1', "
            "'0.01'] lack that; add 0.25, or remove it",
        ),
        (
            [
                "sparsity.keep_fractions=[0.5]",
                "sparsity.allocation=erk",
                "sparsity.baselines=[{name: s2ap, structure: 4:8}]",
            ],
            "s2ap-4of8 has structure 4:8, which keeps 0.5 of every layer, and allocation erk does not; use allocation "
            "uniform",
        ),
        (
            ["sparsity.keep_fractions=[0.5]", "sparsity.structure=2:4", "sparsity.baselines=[flying_bird_plus]"],
            "flying_bird_plus has structure 2:4, which keeps 0.5 of every layer: flying_bird_plus exchanges "
            "connections of a whole layer, which would not stay 2:4; give it a structure of blocks, or unstructured",
        ),
        (
            ["sparsity.structure=1x4", "sparsity.baselines=[{name: hydra, structure: 1x4}]"],
            "hydra-1x4 is the recipe's own method, which is always trained; give it another allocation than "
            "sparsity.allocation or another structure than sparsity.structure, or remove it",
        ),
        (
            ["sparsity.structure=channel", "sparsity.allocation=harp"],
            "hydra has structure channel, whose budget is of multiply-accumulates, and allocation harp shares "
            "connections among layers; use allocation global, or uniform",
        ),
        (
            ["sparsity.structure=channel", "sparsity.baselines=[flying_bird]"],
            "baselines: flying_bird has structure channel: flying_bird exchanges connections within a layer, and a "
            "channel is of several layers; give it a structure of blocks, or unstructured",
        ),
        (["sparsity.round_to=8"], "round_to 8 is of structure channel alone, which no method has; remove it"),
        (["threat_model.eps=4"], "eps 4 lets every pixel take any value; pixels are in [0, 1]: write 4/255, not 4"),
        (["threat_model.eps=0"], "eps 0 must be positive; use objective={name: clean}"),
        (["threat_model.eps=1/0"], "threat_model.eps = '1/0': expected a number or a fraction such as 4/255"),
        (["threat_model.norm=l1"], "threat_model.norm = 'l1': Input should be 'linf' or 'l2'"),
        (["objective.step_size=null"], "objective.step_size = None: expected a number or a fraction such as 4/255"),
        (["objective.step_size=-1/255"], "objective.step_size = -1/255: Input should be greater than 0"),
        (
            ["objective.name=fgsm"],
            "objective.steps = 3: a key of pgd, trades, smoothadv, not of fgsm, which has step_size, eps_warmup, "
            "label_smoothing, overfitting_guard; remove it, or override the section as a whole: "
            "objective={name: fgsm, ...}",
        ),
        (["objective.name=nfgsm"], "objective.steps = 3: a key of pgd, trades, smoothadv, not of nfgsm, which has"),
        (["objective.stepz=3"], "objective.stepz = 3: unknown key; did you mean 'steps'?"),
        (
            ["objective.colour=1"],
            "objective.colour = 1: unknown key of pgd, which has steps, step_size, eps_warmup, la",
        ),
        (
            ["objective={name: clean, colour: 1}"],
            "objective.colour = 1: unknown key of clean, which has label_smoothing",
        ),
        (
            ["phases.prune.objective={name: clean, beta: 6.0}"],
            "phases.prune.objective.beta = 6.0: a key of trades, stability, not of clean, which has label_smoothing; "
            "remove it, or override the section as a whole: phases.prune.objective={name: clean, ...}",
        ),
        (["objective.name=grasp"], f"objective.name = 'grasp': expected one of {', '.join(TECHNIQUES)}"),
        (["phases.prune.objective={name: 3}"], "phases.prune.objective.name = 3: expected one of clean, pgd, fgsm"),
        (["objective.name=true"], "objective.name = True: expected one of clean, pgd, fgsm, nfgsm, fgsm_pgi, free"),
        (["objective.name=null"], "objective.name = None: expected one of clean, pgd, fgsm, nfgsm, fgsm_pgi, free"),
        (["objective={steps: 3}"], "objective.name: missing; add it, one of clean, pgd, fgsm, nfgsm, fgsm_pgi, free"),
        (["objective=pgd"], "objective = 'pgd': expected a section whose name is one of clean, pgd, fgsm"),
        (["objective.steps=true"], "objective.steps = True: no key of a recipe takes true or false"),
        (
            ["objective={name: nfgsm, step_size: 1/10}", "threat_model={norm: l2, eps: 1/2}"],
            "nfgsm is defined for linf, and threat_model.norm is l2; use objective.name=fgsm",
        ),
        (
            ["objective={name: fgsm_pgi, step_size: 1/10}", "threat_model={norm: l2, eps: 1/2}"],
            "fgsm_pgi is defined for linf, and threat_model.norm is l2; use objective.name=fgsm",
        ),
        (
            ["phases.prune.objective={name: fgsm_pgi, step_size: 1/10}", "data.augmentation=random_resized_crop"],
            "phases.prune.objective.name fgsm_pgi starts from the image's perturbation of its last epoch, and "
            "data.augmentation random_resized_crop shows another part of it at another scale; use pad_crop, "
            "pad_crop_flip or none, or use phases.prune.objective.name=fgsm",
        ),
        (
            ["objective={name: fgsm_pgi, step_size: 1/10}", "data.extra_fraction=0.5"],
            "data.extra_fraction 0.5 an extra image may occur twice in an epoch, on different workers; set "
            "data.extra_fraction=null or use objective.name=fgsm",
        ),
        (["objective.name=free"], "objective.steps = 3: a key of pgd, trades, smoothadv, not of free, which has"),
        (["objective={name: free}"], "objective.step_size: missing; add it, for example 1/255"),
        (["objective={name: free, step_size: 1/10, replays: 0}"], "objective.replays = 0: Input should be greater"),
        (
            ["objective={name: fgsm, step_size: 1/10}", "evaluation.validation_steps=1"],
            "objective.overfitting_guard 0.5 compares PGD with one step on the held-out images, and "
            "evaluation.validation_steps 1 is no more than one; set evaluation.validation_steps=5 or "
            "objective.overfitting_guard=null",
        ),
        (
            ["phases.prune.objective={name: free, step_size: 1/10}", "evaluation.validation_steps=0"],
            "phases.prune.objective.overfitting_guard=null",
        ),
        (
            ["objective={name: fgsm, step_size: 1/10, overfitting_guard: 0}"],
            "objective.overfitting_guard = 0: Input should be greater than 0",
        ),
        (["objective.eps_warmup=1"], "objective.eps_warmup = 1: Input should be less than 1"),
        (["objective={name: clean, eps_warmup: 0.1}"], "objective.eps_warmup = 0.1: a key of pgd, fgsm,"),
        (["objective={name: noise}"], "objective.sigma: missing; add it, for example 1/4"),
        (["objective={name: noise, sigma: 0}"], "objective.sigma = 0: Input should be greater than 0"),
        (["objective={name: smoothadv, sigma: 1/4}"], "objective.step_size: missing; add it, for example 1/255"),
        (
            ["objective={name: stability, sigma: 1/4}"],
            "which certifies l2 radii, and threat_model.norm is linf; set threat_model={norm: l2, eps: 1/4}",
        ),
        (
            ["objective={name: noise, sigma: 1/4}", "threat_model=null"],
            "threat_model.norm is None; set threat_model={norm: l2, eps: 1/4}",
        ),
        (["evaluation.step_size=0"], "evaluation: step_size 0 must be positive, for example 1/255"),
        (["evaluation.attacks=[{name: apg}]"], "evaluation.attacks.0.name = 'apg': Input should be 'pgd', 'apgd',"),
        (["evaluation.attacks=[{name: apgd, image: 9}]"], "attacks.0.image = 9: unknown key; did you mean 'images'?"),
        (["evaluation.attacks=[{name: apgd, steps: 9}]"], "steps 9: apgd is run as its authors set it; remove this"),
        (["evaluation.attacks=[{name: pgd, step_size: 0}]"], "step_size 0 must be positive, for example 1/255"),
        (
            ["evaluation.attacks=[{name: pgd}]"],
            "evaluation.attacks: pgd is evaluated already, and its files would",
        ),
        (
            ["evaluation.attacks=[{name: apgd}, {name: apgd, images: 9}]"],
            "evaluation.attacks: apgd is evaluated already",
        ),
        (["evaluation.attacks=[apgd]"], "evaluation.attacks.0 = 'apgd': expected a section with the keys name, images"),
        (
            ["evaluation.attacks=[{name: square}]", "objective={name: clean}", "threat_model=null"],
            "evaluation.attacks square needs a threat_model",
        ),
        (
            [
                "evaluation.attacks=[{name: square}]",
                "objective={name: noise, sigma: 1/4}",
                "threat_model={norm: l2, eps: 1/4}",
            ],
            "evaluation.attacks square would evaluate the network without its noise",
        ),
        (
            ["evaluation.attacks=[{name: autoattack}]", "model.num_classes=3"],
            "evaluation.attacks autoattack needs 4 classes for its targeted loss, and there are 3; use square",
        ),
        (
            ["evaluation.attacks=[{name: pgd}]", "evaluation.step_size=null", "objective={name: ibp}"],
            "evaluation.attacks pgd has no step size; give it one, for example step_size: 1/255",
        ),
        (["sparsity.keep_fractions=[0.1,1.5]"], "sparsity.keep_fractions.1 = 1.5: a keep_fraction is kept / all"),
        (["sparsity.keep_fractions=[0]"], "it must lie in (0, 1]; write 0.1 for 90 % pruned"),
        (["sparsity.keep_fractions=[nan]"], "expected a decimal such as 0.1"),
        (["sparsity.keep_fractions=[a]"], "sparsity.keep_fractions.0 = 'a': expected a decimal such as 0.1"),
        (["sparsity.keep_fractions=[0.1,0.10]"], "name one fraction twice; remove the duplicate"),
        (["sparsity.keep_fractions=0.1"], "sparsity.keep_fractions = 0.1: expected a list; write [0.1]"),
        (["sparsity.keep_fractions=[]"], "sparsity: keep_fractions is empty; name at least one, for example [0.1]"),
        (["batch.micro_batch=48"], "legal micro_batch values: [1, 2, 4, 8, 16, 32, 64, 128]"),
        (["workers.count=3", "batch.micro_batch=16"], "does not divide the 8 micro-batches of a step (batch_per_step"),
        (["workers.count=3", "batch.micro_batch=16"], "legal counts: [1, 2, 4, 8]"),
        (["phases.prune.warmup_epochs=9"], "must be less than epochs"),
        (["engine.zero_stage=3"], "zero_stage 3 is refused"),
        (["engine.mode=compiled", "objective={name: crown_ibp}"], "compiled one has no layers; set engine.mode=eager"),
        (["engine.precision=fp16"], "engine.precision = 'fp16': Input should be 'fp32' or 'bf16'"),
        (["deepspeed.train_batch_size=8"], "train_batch_size = 8: batch.batch_per_step decides it; remove this key"),
        (["deepspeed.bf16.enabled=true"], "bf16 = {'enabled': True}: engine.precision decides it; remove this key"),
        (["deepspeed.gradient_clipping=1.0"], "gradient_clipping = 1.0: gradients are not clipped here"),
        (["deepspeed.zero_optimization.stage=2"], "stage 2 contradicts engine.zero_stage 1; set engine.zero_stage"),
        (["deepspeed.zero_optimization.allgather_bucket_size=7"], "allgather_bucket_size = 7: ZeRO expects an even"),
        (["deepspeed.zero_optimization=true"], "zero_optimization = True: expected a section"),
        (
            ["select=best_validation_robust", "evaluation.validation_steps=0"],
            "set evaluation.validation_steps=5 or select=last",
        ),
        (
            ["phases.prune.resolution={smallest: 32, full_from: 1}"],
            "phases.prune.resolution.smallest 32 must be less than data.image_size 28",
        ),
        (
            ["data.image_size=64", "data.augmentation=none", "phases.prune.resolution={smallest: 32, full_from: 1}"],
            "phases.prune.resolution: data.augmentation none does not resize images; "
            "use random_resized_crop or remove phases.prune.resolution",
        ),
        (
            [
                "data.image_size=64",
                "data.augmentation=random_resized_crop",
                "phases.finetune.objective={name: free, step_size: 1/10}",
                "phases.prune.resolution={smallest: 32, full_from: 1}",
            ],
            "phases.prune.resolution: free training carries its perturbation over to the next images",
        ),
        (
            ["phases.prune.resolution={smallest: 50, full_from: 1}"],
            "phases.prune.resolution.smallest = 50: Input should be a multiple of 32",
        ),
        (["phases.prune.resolution={smallest: 32}"], "phases.prune.resolution.full_from: missing; add it"),
        (
            ["phases.prune.resolution={smallest: 32, grows_from: 1, full_from: 1}"],
            "full_from 1 must be a later epoch than grows_from 1",
        ),
        (
            ["phases.prune.epochs=4", "phases.prune.resolution={smallest: 32, full_from: 4}"],
            "resolution.full_from 4 must be one of the phase's epochs, 1 to 3",
        ),
        (["data.dataset=svhn", "data.augmentation=pad_crop_flip"], "svhn's digits must not be mirrored; use pad_crop"),
        (["data.dataset=svhn", "data.augmentation=random_resized_crop"], "random_resized_crop mirrors images"),
        (["data.extra_fraction=0.3"], "data.extra_fraction 0.3 of a micro-batch of 64 is 19.2 images"),
        (["data.extra_fraction=0.3"], "it must be a whole number: a multiple of 1/64"),
        (["data.extra_fraction=1"], "an extra_fraction is extra / all images of a step: it must lie in (0, 1)"),
        (["data.extra_fraction=half"], "data.extra_fraction = 'half': expected a decimal such as 0.5"),
        (["data.test_file=x", "data.train_file=x"], "data.train_file and data.test_file are both x"),
        (["model.std=[0.1,0,1]"], "std [0.1, 0.0, 1.0] must be positive in every channel"),
        (["name=../elsewhere"], "name = '../elsewhere'"),
        (["seed=-1"], "seed = -1: Input should be greater than or equal to 0"),
        (
            ["seed=18446744073709551616"],
            "seed = 18446744073709551616: PyTorch takes no seed above 18446744073709551615",
        ),
        (["batch.batch_per_step=1000000000000"], "batch.batch_per_step = 1000000000000: Input should be less than or"),
        (["slurm.nodes=[1.5, 2]"], "slurm.nodes = [1.5, 2]: expected a number of nodes, or a range such as 1-4"),
        (
            ["deepspeed.zero_optimisation.stage=1"],
            "deepspeed: zero_optimisation: unknown to DeepSpeed; did you mean 'zero_optimization'?",
        ),
        (
            ["deepspeed.zero_optimization.overlap_com=true"],
            "deepspeed: zero_optimization.overlap_com: unknown to DeepSpeed; did you mean 'overlap_comm'?",
        ),
        (
            ["phases.prune.schedule=linear"],
            "phases.prune.schedule.name = 'linear': expected one of cosine, hydra, onecycle, constant, step",
        ),
        (["phases.prune.schedule={name: step}"], "phases.prune.schedule.milestones: missing; add it, for example [0.5"),
        (
            ["phases.prune.schedule={name: step, milestones: [30, 60]}"],
            "must be fractions of the phase, between 0 and 1",
        ),
        (["phases.prune.schedule={name: step, milestones: []}"], "phases.prune.schedule.milestones = []: "),
        (["phases.prune.schedule={name: cosine, factor: 0.1}"], "a key of step, not of cosine, which has final_lr"),
        (
            ["phases.prune.schedule={name: hydra, final_lr_fraction: 0.1}"],
            "cosine, onecycle, not of hydra, which has none",
        ),
        (
            ["phases.prune.schedule={name: cosine, final_lr_fraction: 1}"],
            "phases.prune.schedule.final_lr_fraction = 1: Input should be less than 1",
        ),
        (
            ["phases.prune.schedule=hydra", "phases.prune.epochs=2", "phases.prune.warmup_epochs=0.5"],
            "schedule hydra needs two epochs after the warm-up, as it is zero in the only one of a phase: epochs 2, "
            "warmup_epochs 0.5; use more epochs or schedule=cosine",
        ),
        (
            ["phases.prune.schedule=onecycle", "phases.prune.warmup_epochs=0.5"],
            "phases.prune: warmup_epochs 0.5: schedule onecycle has its own warm-up; set warmup_epochs=0",
        ),
        (
            ["phases.prune.ema_epochs=0.5", "phases.prune.ema_decay=0.99"],
            "phases.prune: ema_epochs 0.5 and ema_decay 0.99 are two horizons of one average; remove ema_decay",
        ),
        (["phases.prune.ema_epochs=0"], "phases.prune.ema_epochs = 0: Input should be greater than 0"),
        (
            ["objective={name: trades, step_size: 1/10, label_smoothing: 0.1}"],
            "label_smoothing = 0.1: a key of clean, ",
        ),
        (["objective={name: ibp, label_smoothing: 0.1}"], "not of ibp, which has"),
        (["data.train_file=''"], "data.train_file = '': expected the path of a file or folder"),
        (["model.weights=a/" + 300 * "x"], "a path has at most 4,000 bytes, and each part of it 255"),
        (['data.stage_to="/a\\0b"'], "data.stage_to = '/a\\x00b': expected the path of a file or folder"),
        (["deepspeed.bfloat16.enabled=true"], "deepspeed: bfloat16 = {'enabled': True}: engine.precision decides it"),
        (["deepspeed.aio.block_size=1e999"], "deepspeed: aio.block_size = 1e999: a number is 0 or between 1e-30 and"),
    ],
)
def test_refusals_name_key_value_and_fix(overrides: list[str], words: str) -> None:
    message = refusal(*overrides)
    assert message.startswith(f"{DEMO}: ")
    assert words in message
    assert "\n" not in message


EXACT = ["threat_model.eps", "objective.step_size", "sparsity.keep_fractions.0", "phases.prune.weight_decay"]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("key", [*EXACT, "phases.prune.epochs", "model.mean.0", "evaluation.attacks.0.steps"])
@pytest.mark.parametrize("text", ["1e999999999", "1e-999999999", f"0.{'9' * 32}", "9" * 5000, f"1e{'9' * 90}"])
@pytest.mark.parametrize("quote", ["", "'"], ids=["number", "text"])
def test_numbers_that_do_not_fit_are_refused_at_once(key: str, text: str, quote: str) -> None:
    """None is computed with, becomes zero or infinity, or is rounded to another value."""
    values = {"model.mean.0": "model.mean=[{}, 0, 0]", "sparsity.keep_fractions.0": "sparsity.keep_fractions=[{}]"}
    values["evaluation.attacks.0.steps"] = "evaluation.attacks=[{{name: pgd, steps: {}}}]"
    message = refusal(values.get(key, f"{key}={{}}").format(f"{quote}{text}{quote}"))
    named = f"{key} = " if len(text) < 100 or quote else "not YAML: a number of 5,000 characters, line 1"
    assert named in message
    assert len(message) < 500
    assert "\n" not in message


def _bare_numbers(annotation: Any) -> bool:
    """Whether an annotation has a number that is read by pydantic alone."""
    if get_origin(annotation) is Annotated:
        return False
    return annotation in (int, float) or any(map(_bare_numbers, get_args(annotation)))


def _sections_below(section: type[BaseModel]) -> set[type[BaseModel]]:
    inner = {one for field in section.model_fields.values() for one in sections_in(field.annotation)}
    return {section}.union(*map(_sections_below, inner))


def test_every_number_is_read_by_the_types_that_bound_it() -> None:
    sections = _sections_below(Recipe)
    assert len(sections) > 20
    for section in sections:
        hints = get_type_hints(section, include_extras=True)
        assert [key for key in section.model_fields if _bare_numbers(hints[key])] == [], section


def bomb(level: str) -> str:
    """50 levels, each with the one before it twice."""
    return "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {level.format(i - 1)}\n" for i in range(1, 50))


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("text", "words"),
    [
        (bomb("[*a{0}, *a{0}]"), "with its aliases it has more than 20,000 values"),
        (bomb("{{<<: [*a{0}, *a{0}]}}"), "with its aliases it has more than 20,000 values"),
        ("- " * 20000, "nested too deep"),
        ("[" * 10000, "nested too deep"),
        ("a: " + "x" * 60000, "more than 50,000 characters; is it a recipe?"),
    ],
    ids=["aliases", "merges", "lists in lists", "flow lists", "long"],
)
def test_recipes_that_would_fill_memory_are_refused(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError, match=words):
        load_recipe(path)


def test_a_pipe_or_folder_is_no_recipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(RecipeError, match=r"not a file\); shipped recipes are in recipes/"):
            load_recipe(path)


def test_the_largest_seed_stays_exact() -> None:
    assert load_recipe(DEMO, ["seed=18446744073709551615"]).seed == 2**64 - 1
    assert load_recipe(DEMO, ["seed=9007199254740993.0"]).seed == 2**53 + 1


@pytest.mark.parametrize("key", ["seed", "phases.prune.epochs"])
def test_a_leading_zero_is_no_octal_number(key: str) -> None:
    recipe = load_recipe(DEMO, [f"{key}=010"])
    assert {"seed": recipe.seed, "phases.prune.epochs": recipe.phases.prune.epochs}[key] == 10


def test_every_problem_is_listed_at_once() -> None:
    lines = refusal("seed=-1", "model.arch=vgg", "phases.prune.lr=0").splitlines()
    keys = [line.removeprefix(f"{DEMO}: ").partition(" = ")[0] for line in lines]
    assert keys == ["seed", "model.arch", "phases.prune.lr"]


@pytest.mark.parametrize("threat_model", ["null", "{norm: l2, eps: 128/255}"])
def test_networks_of_clean_training_may_be_attacked_or_not(threat_model: str) -> None:
    recipe = load_recipe(DEMO, ["objective={name: clean}", f"threat_model={threat_model}", "evaluation.attacks=[]"])
    assert recipe.objective == Clean()
    assert (recipe.threat_model is None) == (threat_model == "null")


def test_deepspeed_options_that_contradict_nothing_are_passed_through() -> None:
    overrides = ["deepspeed.zero_optimization={stage: 1, overlap_comm: false}", "deepspeed.wall_clock_breakdown=true"]
    expected = {"zero_optimization": {"stage": 1, "overlap_comm": False}, "wall_clock_breakdown": True}
    assert load_recipe(DEMO, overrides).deepspeed == expected


@unhurried
@given(batch_per_step=st.integers(1, 300), micro_batch=st.integers(1, 300))
def test_the_legal_micro_batches_of_the_message_are_the_legal_ones(batch_per_step: int, micro_batch: int) -> None:
    try:
        batch = Batch(batch_per_step=batch_per_step, micro_batch=micro_batch)
    except ValueError as error:
        legal = json.loads(re.findall(r"\[[\d, ]+\]", str(error))[0])
        assert micro_batch not in legal
        for divisor in legal:
            assert Batch(batch_per_step=batch_per_step, micro_batch=divisor).micro_batch == divisor
    else:
        assert batch.micro_batches_per_step * micro_batch == batch_per_step


def test_extra_images_of_a_step_are_counted_exactly() -> None:
    assert load_recipe(DEMO).extra_per_step == 0
    for fraction, images in (("0.5", 64), ("0.25", 32), ("0.015625", 2), ("0.984375", 126)):
        assert load_recipe(DEMO, [f"data.extra_fraction={fraction}"]).extra_per_step == images
    almost = "0.5" + "0" * 20 + "1"
    assert "is 32.0" in refusal(f"data.extra_fraction='{almost}'")
    tenth = load_recipe(DEMO, ["data.extra_fraction=0.1", "batch={batch_per_step: 100, micro_batch: 10}"])
    assert tenth.extra_per_step == 10, "the float 0.1 is a little more than a tenth"


def test_overrides_reach_into_sections_and_leave_the_rest() -> None:
    values = demo_values()
    changed = apply_overrides(values, ["phases.prune.epochs=7", "sparsity.keep_fractions=[0.5]", "deepspeed.a.b=1"])
    assert changed["phases"]["prune"] == {**values["phases"]["prune"], "epochs": 7}
    assert changed["sparsity"]["keep_fractions"] == [0.5]
    assert changed["deepspeed"] == {"a": {"b": 1}}
    assert values == demo_values()
    assert apply_overrides(changed, ["threat_model=null", "threat_model.eps=1/2"])["threat_model"] == {"eps": "1/2"}


def test_an_override_of_one_phase_does_not_reach_the_alias_of_another() -> None:
    same = {"epochs": 3}
    shared = {"phases": {"prune": same, "finetune": same}}
    for values in (shared, parse_yaml("phases: {prune: &same {epochs: 3}, finetune: *same}", "here")):
        assert apply_overrides(values, ["phases.prune.epochs=1"])["phases"]["finetune"] == {"epochs": 3}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seed", "expected key=value, for example phases.prune.epochs=3"),
        ("=1", "expected key=value"),
        ("seed.x=1", "seed = 0 is a value, not a section"),
        ("seed=[1", "not YAML: "),
    ],
)
def test_bad_overrides_are_named(override: str, words: str) -> None:
    message = refusal(override)
    assert message.startswith(f"override {override!r}: ")
    assert words in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- a\n- b\n", "a recipe is a mapping of sections, got list"),
        ("", "a recipe is a mapping of sections, got NoneType"),
        ("a: [1\nb: 2\n", "not YAML: "),
        ("seed: 1\nname: x\nseed: 2\n", "duplicate key 'seed', line 3"),
        ("phases:\n  prune: {lr: 1}\n  prune: {lr: 2}\n", "duplicate key 'prune', line 3"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(path)
    with pytest.raises(RecipeError, match=r"cannot be read .*No such file"):
        load_recipe(tmp_path / "absent.yaml")


BOTH_WAYS = pytest.mark.parametrize("way", ["file", "override"])


def load_with(way: str, folder: Path, key: str, text: str) -> Recipe:
    """The demo's recipe with one top-level key or section, written into the file or given as an override."""
    if way == "override":
        return load_recipe(DEMO, [f"{key}={text}"])
    plain = DEMO.read_text(encoding="utf-8")
    rest = re.sub(rf"^{key}:.*\n(?:[ ].*\n)*", "", plain, flags=re.MULTILINE)
    path = folder / "recipe.yaml"
    path.write_text(f"{rest}\n{key}: {text}\n", encoding="utf-8")
    return load_recipe(path)


@BOTH_WAYS
@pytest.mark.parametrize(
    ("text", "seed"), [("010", 10), ("08", 8), ("0o17", 15), ("0x1F", 31), ("1_000", 1000), ("+7", 7), ("!!int 3", 3)]
)
def test_integers_are_those_of_yaml_1_2(way: str, text: str, seed: int, tmp_path: Path) -> None:
    """YAML 1.1 reads 010 as eight and 08 as text."""
    value = load_with(way, tmp_path, "seed", text).seed
    assert type(value) is int
    assert value == seed


@BOTH_WAYS
@pytest.mark.parametrize(
    "text", ["0123", "0x1F", "1_000", "5e-4", "1.50", "007", "yes", "on", "n", "2026-11-30", "20261130"]
)
def test_text_stays_as_written(way: str, text: str, tmp_path: Path) -> None:
    recipe = load_with(way, tmp_path, "name", text)
    assert type(recipe.name) is str
    assert recipe.name == text
    (tmp_path / "again.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(tmp_path / "again.yaml") == recipe
    nested = load_with(way, tmp_path, "slurm", f"{{account: {text}, options: {{comment: {text}}}, setup: [{text}]}}")
    assert nested.slurm is not None
    assert (nested.slurm.account, nested.slurm.options, nested.slurm.setup) == (text, {"comment": text}, (text,))


@BOTH_WAYS
@pytest.mark.parametrize("text", ["5e-4", "5E-4", "5.0e-4", "0.0005", "+.5e-3"])
def test_a_float_needs_no_dot(way: str, text: str, tmp_path: Path) -> None:
    """Also in sections of any type: YAML 1.1 would pass the text 5e-4 to DeepSpeed."""
    recipe = load_with(way, tmp_path, "deepspeed", f"{{timers: {{a: {text}, b: [{text}, 010]}}}}")
    timers = recipe.deepspeed["timers"]
    assert timers == {"a": 5e-4, "b": [5e-4, 10]}
    assert [type(timers["a"]), *map(type, timers["b"])] == [float, float, int]
    assert str(timers["a"]) == "0.0005"


@BOTH_WAYS
def test_there_are_no_sexagesimal_numbers(way: str, tmp_path: Path) -> None:
    recipe = load_with(way, tmp_path, "slurm", "{time: 12:00:00, account: 1:30}")
    assert recipe.slurm is not None
    assert (recipe.slurm.time, recipe.slurm.account) == (720, "1:30")


@BOTH_WAYS
def test_yes_and_no_are_text(way: str, tmp_path: Path) -> None:
    assert load_with(way, tmp_path, "deepspeed", "{log_level: yes, checkpoint: off, compile: true}").deepspeed == {
        "log_level": "yes",
        "checkpoint": "off",
        "compile": True,
    }


@BOTH_WAYS
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{wandb: disabled, wandb: online}", "duplicate key 'wandb'"),
        ("{<<: {wandb_project: x}, wandb: disabled, 'wandb': online}", "duplicate key 'wandb'"),
        ("{<<: {wandb: online}, <<: {wandb: disabled}}", "duplicate key '<<'"),
        ("{[1]: 2}", "a key must be a scalar"),
        ("{<<: 3}", "expected a mapping or list of mappings for merging"),
        ("&a {wandb: *a}", "an alias inside its own anchor, or nested too deep"),
        ("[" * 600, "an alias inside its own anchor, or nested too deep"),
        ("*nothing", "found undefined alias 'nothing'"),
        ("!!python/object/apply:os.getcwd []", "could not determine a constructor for the tag"),
        ("!!binary aGVsbG8=", "could not determine a constructor for the tag"),
        ("!!set {a, b}", "could not determine a constructor for the tag"),
        ("!!int x", "invalid literal"),
        ("\t{wandb: disabled}", "found character '\\t' that cannot start any token"),
        ("@x", "found character '@' that cannot start any token"),
        ("'x", "found unexpected end of stream"),
        ("\x07", "unacceptable character"),
    ],
)
def test_ambiguous_or_unsafe_yaml_is_refused(way: str, text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load_with(way, tmp_path, "tracking", text)
    message = str(caught.value)
    origin = tmp_path / "recipe.yaml" if way == "file" else f"override {shown(f'tracking={text}')}"
    assert message.startswith(f"{origin}: not YAML: ")
    assert words in message
    assert "\n" not in message
    if "duplicate" in words:
        line = len(DEMO.read_text(encoding="utf-8").splitlines()) + 1 if way == "file" else 1
        assert re.search(r"duplicate key .*, line (\d+)$", message)[1] == str(line)  # type: ignore[index]


def read_text(text: str, folder: Path) -> Recipe:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8", newline="")
    return load_recipe(path)


def test_byte_order_mark_line_ends_and_document_markers_change_nothing(tmp_path: Path) -> None:
    plain = DEMO.read_text(encoding="utf-8")
    expected = load_recipe(DEMO)
    for text in (
        "\ufeff" + plain,
        plain.replace("\n", "\r\n"),
        f"---\n{plain}...\n",
        f"%YAML 1.2\n---\n{plain}",
        f"%YAML 1.1\n---\n{plain}",
    ):
        assert read_text(text, tmp_path) == expected
    assert read_text(f"%YAML 1.1\n---\n{plain.replace('seed: 0', 'seed: 010')}", tmp_path).seed == 10


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("seed: 0", "seed: 0\n---\nseed: 1"), "expected a single document in the stream but found another document"),
        (("seed: 0", "\tseed: 0"), "found character '\\t' that cannot start any token, line 6"),
        (("name: fashion_mnist", "name: fashion_mnist\t# a tab"), "cannot start any token, line 5"),
        (("  arch:", "\tarch:"), "found character '\\t' that cannot start any token, line 16"),
        (("# The demo", "%YAML 2.0\n---\n# The demo"), "version"),
    ],
    ids=["two documents", "a tab before a key", "a tab before a comment", "a tab as indentation", "another YAML"],
)
def test_files_other_than_one_yaml_document_are_named(change: tuple[str, str], words: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        read_text(DEMO.read_text(encoding="utf-8").replace(*change, 1), tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}/recipe.yaml: not YAML: ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_sections_may_be_shared_and_merged(tmp_path: Path) -> None:
    plain = DEMO.read_text(encoding="utf-8")
    start, end = plain.index("  prune: {"), plain.index("sparsity: ")
    merged = """  prune: &prune {epochs: 2, lr: 0.1, schedule: constant, ema_epochs: 0.3}
  finetune: {<<: *prune, epochs: 3, lr: 1e-1}
"""
    text = plain[:start] + merged + plain[end:]
    assert read_text(text, tmp_path) == load_recipe(DEMO)
    changed = load_recipe(tmp_path / "recipe.yaml", ["phases.prune.epochs=7"])
    assert (changed.phases.prune.epochs, changed.phases.finetune and changed.phases.finetune.epochs) == (7, 3)
    two = "{<<: [{epochs: 1, lr: 0.5}, {lr: 0.7, weight_decay: 1e-3}], lr: 0.2}"
    assert parse_yaml(two, "here") == {"epochs": 1, "lr": 0.2, "weight_decay": 1e-3}
    nested = "k: &k {a: 1}\np:\n  m: &m {<<: *k, a: 2}\ny: {<<: *m}"
    assert parse_yaml(nested, "here") == {"k": {"a": 1}, "p": {"m": {"a": 2}}, "y": {"a": 2}}


def test_a_cluster_profile_is_read_by_the_same_rules(tmp_path: Path) -> None:
    profile = tmp_path / "cluster.yaml"
    profile.write_text("account: 0123\ntime: 1:30:00\nnodes: 1-4\n", encoding="utf-8")
    slurm = load_recipe(DEMO, cluster=profile).slurm
    assert slurm is not None
    assert (slurm.account, slurm.time, slurm.nodes) == ("0123", 90, (1, 4))
    profile.write_text("account: a\naccount: b\n", encoding="utf-8")
    with pytest.raises(RecipeError, match=rf"^{profile}: not YAML: duplicate key 'account', line 2$"):
        load_recipe(DEMO, cluster=profile)


@unhurried
@given(
    values=st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False)
        | st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"], include_characters="\n\t")),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(string.ascii_letters + "01 :<=~-", min_size=1), inner),
        max_leaves=8,
    )
)
def test_dumped_values_are_read_back(values: Any) -> None:
    assert parse_yaml(dump_yaml(values), "here") == values


def test_a_recipe_by_a_yaml_1_1_writer_is_read_as_meant() -> None:
    """PyYAML's output: quotes where YAML 1.1 needs them, none around what YAML 1.1 reads as text."""
    texts = {"name": "1e5", "dot": "._5", "octal": "0o17", "eight": "08"}
    text = "name: 1e5\ndot: ._5\noctal: 0o17\neight: 08\n"
    assert {key: str(value) for key, value in parse_yaml(text, "here").items()} == texts
    assert parse_yaml("lr: 1.0e-05\ntime: '12:00:00'\non: 'yes'", "here") == {
        "lr": 1e-05,
        "time": "12:00:00",
        "on": "yes",
    }
    assert dump_yaml({"lr": 1e-05, "wd": 2.5e-06, "big": 1e300}) == "lr: 1.0e-05\nwd: 2.5e-06\nbig: 1.0e+300\n"


OF_THE_FIRST_DEMO = (
    "phases.pretrain={epochs: 5, lr: 0.1, weight_decay: 5.0e-4, warmup_epochs: 0.5}",
    "phases.prune={epochs: 2, lr: 0.1}",
    "phases.finetune={epochs: 3, lr: 0.01}",
)
"""Overrides with which the demo's recipe is what it was when the hashes below were computed."""


def test_options_that_came_later_leave_the_hash_of_older_recipes() -> None:
    def load(*overrides: str) -> Recipe:
        return load_recipe(DEMO, [*OF_THE_FIRST_DEMO, *overrides])

    recipe = load()
    same = ["objective.label_smoothing=0", "phases.prune.optimizer=sgd", "phases.prune.ema_epochs=null"]
    same += ["phases.prune.schedule={name: cosine}", "phases.finetune.schedule={name: cosine, final_lr_fraction: 0}"]
    assert recipe_hash(load(*same)) == recipe_hash(recipe)
    earlier = {
        "5cf614e2a44aafa707c4ff36d4646fce98496e6cebfbcae824f7a9fa0d25eb89": "seed=0",
        "fba78328471bc76b8c51b0759ce75367e64a1b5c09084590a69b4e25c0a14506": "phases.pretrain.ema_decay=0.999",
        "a75e4daa28010c5b324c9eaee17e52ae19bd4026f94cb25c0d6e0e5307b61a6c": (
            "phases.prune.schedule={name: step, milestones: [0.5]}"
        ),
        "caa1821d594e8c094f7d75b1c7ef8e51d97f79218ae22831b2a8c77f116e1e2f": "phases.prune.schedule=constant",
    }
    """Hash as versions computed it that did not know the later keys -> override."""
    assert {recipe_hash(load(override)): override for override in earlier.values()} == earlier
    changes = ["objective.label_smoothing=0.1", "phases.prune.optimizer=adamw", "phases.prune.ema_epochs=2"]
    changes += ["phases.prune.schedule=hydra", "phases.prune.schedule=onecycle"]
    changes += [f"phases.prune.schedule={{name: {name}, final_lr_fraction: 0.1}}" for name in ("cosine", "onecycle")]
    hashes = {recipe_hash(load(change)) for change in changes}
    assert len(hashes | earlier.keys()) == len(changes) + len(earlier)


def test_without_tuning_the_hash_is_as_before_it_and_each_choice_has_its_own() -> None:
    recipe = load_recipe(DEMO)
    assert recipe_hash(load_recipe(DEMO, ["sparsity.tune=null"])) == recipe_hash(recipe)
    tunes = ["{finetune_lr: [0.1, 0.2]}", "{finetune_lr: [0.2, 0.1]}", "{finetune_lr: [0.1, 0.2], prune_lr: [1, 1]}"]
    recipes = [recipe, *(load_recipe(DEMO, [f"sparsity.tune={tune}"]) for tune in tunes)]
    assert len({recipe_hash(each) for each in recipes}) == 4
    for each in recipes:
        assert parse_recipe(parse_yaml(dump_recipe(each), "the dump"), "there") == each
    same_rates = "sparsity.tune={finetune_lr: [0.1, 0.1], prune_lr: [0.1, 0.2]}"
    tuned = load_recipe(DEMO, [same_rates, "sparsity.baselines=[{name: hydra, allocation: erk}]"]).sparsity.tune
    assert tuned is not None
    assert tuned.trials == [(0.1, 0.1), (0.1, 0.2)], "for methods with a prune phase they differ"


def test_the_hash_covers_what_determines_the_result() -> None:
    recipe = load_recipe(DEMO)
    free = ["workers.count=1", "workers.threads=7", "checkpoint.every_steps=5", "tracking.wandb=disabled"]
    free += ["engine.zero_stage=2", "engine.mode=compiled", "slurm.nodes=1-4"]
    assert recipe_hash(load_recipe(DEMO, free)) == recipe_hash(recipe)
    deciding = ["seed=5", "phases.prune.lr=0.123", "threat_model.eps=1/11", "engine.precision=bf16", "select=last"]
    hashes = {recipe_hash(load_recipe(DEMO, [override])) for override in deciding[:-1]}
    assert len(hashes | {recipe_hash(recipe)}) == len(deciding)
    assert recipe_hash(load_recipe(DEMO, deciding[-1:])) == recipe_hash(recipe)  # the default, written out
    assert "workers" not in deciding_values(recipe)


@pytest.mark.parametrize("order", ["overrides first", "options first"])
def test_dry_run_prints_the_resolved_recipe_and_its_stages(
    order: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    overrides, options = ["phases.prune.epochs=9", "seed=4"], ["--dry-run", "--name", "other"]
    rest = [*overrides, *options] if order == "overrides first" else [*options, *overrides]
    assert main(["run", str(DEMO), *rest]) == 2  # there is no data
    printed = capsys.readouterr().out
    expected = load_recipe(DEMO, overrides)
    (tmp_path / "printed.yaml").write_text(printed, encoding="utf-8")  # the stages are comments
    assert load_recipe(tmp_path / "printed.yaml") == expected
    lines = [line.split() for line in printed.splitlines() if re.match(r"#   \S", line)]
    assert [(line[1], int(line[2])) for line in lines] == [
        (stage.name, stage.optimisation.epochs) for stage in stages_of(expected)
    ]
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        [str(DEMO), "phases.prune.epoch=3"],
        [str(DEMO), "--name", "../up"],
        ["absent.yaml"],
        [str(DEMO)],  # without data files
    ],
)
def test_wrong_recipes_end_with_code_2_and_one_line(
    arguments: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["run", *arguments]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert re.fullmatch(r"error: .+\n", output.err)
    assert "Traceback" not in output.err


@pytest.mark.parametrize("arguments", [["run"], ["nonsense"], ["resume", "x", "seed=1"], ["run", "x", "--bogus"], []])
def test_wrong_usage_ends_with_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["run", str(DEMO), "--name", "mine"],
            "checkpoints are kept; continue with: python -m launch resume runs/mine\n",
        ),
        (["resume", "mine"], "checkpoints are kept; continue with: python -m launch resume runs/mine\n"),
        (["data", "write", "fashion_mnist", "--out", "x"], "no unfinished file is left"),
        (["report", "x"], "nothing was changed"),
    ],
)
def test_an_interrupted_command_says_what_is_left(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("launch.run_folder.check_data", lambda recipe: {})
    if arguments[0] == "resume":
        run_folder.open_or_create(load_recipe(DEMO), "mine", {})

    def interrupt(*_: object) -> int:
        raise KeyboardInterrupt

    for handler in (
        "launch.commands.run.run_here",
        "launch.commands.report._report",
        "launch.commands.data._write",
    ):
        monkeypatch.setattr(handler, interrupt)
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
