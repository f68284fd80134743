"""Every objective, allocation and average: a run that is stopped within an epoch and resumed equals one that is not."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest

from pipeline.distributed import Group
from pipeline.recipe.file import dump_recipe, load_recipe, recipe_hash
from pipeline.recipe.schema import Recipe
from pipeline.recipe.stages import stages_of
from pipeline.recipe.technique import MultiStep
from pipeline.run.files import atomic_write_text, read_json, read_rows
from pipeline.run.layout import StageFolder
from pipeline.run.lease import Leases
from pipeline.run.stop import StopRequested
from pipeline.training.context import RunContext
from pipeline.training.stage import run_stages
from tests.fault.final_state import differences, final_state
from tests.support.processes import run_group
from tests.support.small_recipe import small_recipe
from tests.support.techniques import own_values

pytestmark = pytest.mark.timeout(1900)
STOPS = (2, 5, 9)
"""Steps after which the run is stopped: within an epoch of each phase. A phase has 4, an epoch 2. With free they are
twice as many, and the last two stops fall between the replays of a batch. A variant may have stops of its own."""
ATTACK = {"steps": 2, "step_size": "1/15"}
LINF, L2 = {"norm": "linf", "eps": "1/10"}, {"norm": "l2", "eps": "1/4"}
AVERAGED = {phase: {"ema_epochs": 5} for phase in ("pretrain", "prune", "finetune")}
ADAM = {phase: {"optimizer": "adam", "lr": 0.001} for phase in ("pretrain", "prune", "finetune")}
VARIANTS: dict[str, dict[str, Any]] = {
    "pgd, averaged": {"objective": {"name": "pgd", **ATTACK}, "phases": AVERAGED},
    "fgsm, eps warm-up": {"objective": {"name": "fgsm", "step_size": "1/10", "eps_warmup": 0.7}},
    "fgsm, averaged, growing images": {
        "objective": {"name": "fgsm", "step_size": "1/10", "eps_warmup": 0.5},
        "phases": {phase: {"ema_decay": 0.9, "resolution": {"smallest": 32, "full_from": 1}} for phase in AVERAGED},
        "data": {"augmentation": "random_resized_crop", "image_size": 64},
    },
    "nfgsm, learned, every baseline": {
        "objective": {"name": "nfgsm", "step_size": "1/10"},
        "sparsity": {
            "allocation": "learned",
            "score_init": "kaiming_normal",
            "score_weight_decay": 0.0,
            "batchnorm": "frozen",
            "baselines": ["magnitude", "random", "snip"],
            "baseline_epochs": "finetune_epochs",
        },
    },
    "fgsm_pgi, averaged, crops": {
        "objective": {"name": "fgsm_pgi", "step_size": "1/10"},
        "phases": AVERAGED,
        "data": {"augmentation": "pad_crop_flip"},
    },
    "pgd, averaged, masks that change": {
        "objective": {"name": "pgd", **ATTACK},
        "phases": AVERAGED,
        "sparsity": {
            "baselines": [
                "gradual",
                "flying_bird",
                {"name": "flying_bird_plus", "allocation": "erk", "structure": "1x4"},
            ]
        },
    },
    "free, averaged": {
        "objective": {"name": "free", "step_size": "1/10", "replays": 2},
        "phases": AVERAGED,
    },
    "trades, global, blocks": {
        "objective": {"name": "trades", **ATTACK},
        "sparsity": {"allocation": "global", "structure": "16x16"},
    },
    "pgd, harp, averaged": {
        "objective": {"name": "pgd", **ATTACK},
        "sparsity": {"allocation": "harp"},
        "phases": AVERAGED,
    },
    "trades, s2ap": {
        "objective": {"name": "trades", **ATTACK},
        "sparsity": {"baselines": [{"name": "s2ap", "allocation": "harp"}]},
        "stops": (13, 14, 18),
    },
    "noise": {"objective": {"name": "noise", "sigma": "1/4"}, "threat_model": L2},
    "stability, erk": {
        "objective": {"name": "stability", "sigma": "1/4"},
        "threat_model": L2,
        "sparsity": {"allocation": "erk"},
    },
    "smoothadv, 2:4": {
        "objective": {"name": "smoothadv", "sigma": "1/4", "noise_samples": 2, **ATTACK},
        "threat_model": L2,
        "sparsity": {"keep_fractions": [0.5], "structure": "2:4"},
    },
    "crown_ibp": {"objective": {"name": "crown_ibp"}},
    "mixtrain, adam": {"objective": {"name": "mixtrain"}, "phases": ADAM},
    "search, ibp": {
        "objective": {"name": "ibp"},
        "phases": {"pretrain": {"objective": {"name": "clean"}}, "finetune": None},
    },
}
WITH_HONESTY = ("pgd, averaged", "smoothadv, 2:4")
"""One per norm: these checks do not depend on how a network was trained, and take a quarter of the time."""

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
TINY = [
    "name=tiny",
    "data.dataset=fashion_mnist",
    "data.extra_fraction=null",
    "data.validation_images=2",
    "data.train_images=8",
    "batch={batch_per_step: 4, micro_batch: 4}",
    "model.num_classes=10",
    "sparsity.keep_fractions=[0.1]",
    "sparsity.baselines=[]",
    "workers={count: 1, device: cpu}",
    "engine.precision=fp32",  # bf16 takes minutes on a processor that has no instructions for it
    "evaluation.images=2",
    "evaluation.chunk=2",
    "evaluation.steps=2",
    "evaluation.restarts=1",
    "evaluation.n0=5",
    "evaluation.n=10",
    "evaluation.validation_steps=1",
    "evaluation.attacks=[]",  # their budgets are not for choosing, and take minutes
    "tracking.wandb=disabled",
]
"""What makes a shipped recipe take two steps of each phase on a few images, or two batches with replays.

Some are then the same, and run once."""
SMALLER = {"vgg16_bn_cifar": "vgg4_bn_cifar", "wrn_28_4": "resnet18_w16_cifar", "resnet50": "resnet18_w16_cifar"}
"""Networks that stand for large ones, which take up to 30 s of CPU time for a recipe."""


@functools.cache
def one_per_architecture() -> set[Path]:
    """Shipped recipes that have their own network, with honesty checks, which take a third of the time of large ones.

    The recipe of tests/end_to_end/test_imagenet_shape.py is that of ResNet-50.
    """
    recipes = {path: load_recipe(path, []) for path in RECIPES}
    chosen = {r.model.arch: path for path, r in recipes.items() if r.objective.measure == "pgd"}
    return {path for arch, path in chosen.items() if arch != "resnet50"}


def shipped(data: Path, path: Path) -> Recipe:
    chosen = [*TINY, *(f"data.{part}_file={data / part}.beton" for part in ("train", "test"))]
    recipe = load_recipe(path)
    few = {"replays": "2", "overfitting_guard": "null"}
    chosen += [f"objective.{key}={value}" for key, value in own_values(recipe.objective.name, few).items()]
    if path not in one_per_architecture():
        arch = recipe.model.arch
        chosen += ["evaluation.honesty_images=0", f"model.arch={SMALLER.get(arch, arch)}"]
    if recipe.model.arch == "wrn_28_10":
        chosen.append("model.arch=wrn_28_4")  # its 36 million parameters took a third of the time of all recipes
    if recipe.data.augmentation == "random_resized_crop":
        chosen.append("data.image_size=28")
    else:  # pad crops are of images that have data.image_size
        chosen += [f"data.image_size={16 if recipe.model.arch.startswith('vgg') else 8}", "data.augmentation=none"]
    for phase in ("pretrain", "prune", "finetune"):
        if getattr(recipe.phases, phase) is not None:
            # Their learning rates are for large batches: four images at 0.4 make a network's gradients overflow.
            chosen += [f"phases.{phase}.{key}" for key in ("epochs=1", "warmup_epochs=0", "lr=0.01", "resolution=null")]
    if recipe.phases.pretrain is None:  # tests/distributed/test_imported_run.py has a dense network from a file
        chosen += ["model.weights=null", "phases.pretrain={epochs: 1, lr: 0.01}"]
    if isinstance(recipe.objective, MultiStep) and recipe.objective.steps > 2:
        chosen.append("objective.steps=2")
    return load_recipe(path, chosen)


def variant(data: Path, name: str) -> Recipe:
    chosen = VARIANTS[name]
    phase = {"epochs": 2, "lr": 0.05, "weight_decay": 1.0e-4}
    phases = dict.fromkeys(("pretrain", "prune", "finetune"), phase)
    for one, values in chosen.get("phases", {}).items():
        phases[one] = values and phase | values
    return small_recipe(
        data,
        phases=phases,
        objective=chosen.get("objective", {"name": "pgd", **ATTACK}),
        threat_model=chosen.get("threat_model", LINF),
        sparsity={"baselines": [], **chosen.get("sparsity", {})},
        data={"train_images": 64, "validation_images": 50, **chosen.get("data", {})},
        batch={"batch_per_step": 32, "micro_batch": 8},
        evaluation={
            **{"validation_steps": 2, "images": 40, "chunk": 20, "n0": 10, "n": 50, "noise_batch": 50},
            "honesty_images": 10 if name in WITH_HONESTY else 0,
        },
        tracking={"log_every_steps": 1},
    )


def _run(group: Group, recipe: Recipe, folder: Path, token: str, stops: tuple[int, ...]) -> int:
    """Run all stages, restarting after each stop; returns how often it was stopped."""
    left, done, stopped = list(stops), 0, 0

    def observe(event: str, facts: dict[str, Any]) -> None:
        nonlocal done
        done += event == "step"

    def stop_requested() -> bool:
        return bool(left) and done >= left[0]

    while True:
        try:
            run_stages(RunContext(recipe, folder, token, group, observe, stop_requested), stages_of(recipe))
            return stopped
        except StopRequested:
            left.pop(0)
            stopped += 1


def _run_all(group: Group, jobs: list[tuple[Recipe, Path, str, tuple[int, ...]]]) -> list[int]:
    return [_run(group, *job) for job in jobs]


@pytest.fixture(scope="module")
def runs(fashion_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `<variant>/straight`, `<variant>/stopped` and, for what is shipped, `<recipe's hash>`.

    Two processes, of one worker each, run them all: what takes time is the start of one, and then the engines.
    """
    root = tmp_path_factory.mktemp("objectives")
    jobs, leases = [], []
    for name in VARIANTS:
        recipe = variant(fashion_data, name)
        for way, stops in (("straight", ()), ("stopped", VARIANTS[name].get("stops", STOPS))):
            folder = root / name / way
            folder.mkdir(parents=True)
            atomic_write_text(folder / "recipe.yaml", dump_recipe(recipe))
            leases.append(Leases([folder / stage.name for stage in stages_of(recipe)]))
            jobs.append((recipe, folder, leases[-1].token, stops))
    for digest, recipe in {recipe_hash(r): r for r in (shipped(fashion_data, path) for path in RECIPES)}.items():
        folder = root / digest
        folder.mkdir()
        atomic_write_text(folder / "recipe.yaml", dump_recipe(recipe))
        leases.append(Leases([folder / stage.name for stage in stages_of(recipe)]))
        jobs.append((recipe, folder, leases[-1].token, ()))
    try:
        with ThreadPoolExecutor(2) as pool:
            halves = pool.map(lambda half: run_group(1, _run_all, half, deadline_s=1800)[0], (jobs[::2], jobs[1::2]))
            stopped = [count for pair in zip_longest(*halves) for count in pair if count is not None]
    finally:
        for lease in leases:
            lease.release()
    phases = [len(stages_of(recipe)) for recipe, *_ in jobs]
    assert stopped == [min(len(stops), count) for (*_, stops), count in zip(jobs, phases, strict=True)]
    return root


@pytest.mark.parametrize("name", VARIANTS)
def test_stopped_and_resumed_equals_straight(runs: Path, fashion_data: Path, name: str) -> None:
    stages = [stage.name for stage in stages_of(variant(fashion_data, name))]
    straight, stopped = (final_state(runs / name / way, stages) for way in ("straight", "stopped"))
    assert differences(straight, stopped) == []


def test_rows_say_how_large_growing_images_were(runs: Path, fashion_data: Path) -> None:
    """An epoch has two steps, and a row one; the second of the stops is at step 1 of prune."""
    name = "fgsm, averaged, growing images"
    for stage in stages_of(variant(fashion_data, name)):
        for way in ("straight", "stopped"):
            rows = [
                row for row in read_rows(runs / name / way / stage.name / "metrics.jsonl") if row["kind"] == "train"
            ]
            assert [row["image_size"] for row in rows] == [32, 32, 64, 64]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_takes_two_steps_of_each_phase(runs: Path, fashion_data: Path, path: Path) -> None:
    recipe = shipped(fashion_data, path)
    for stage in stages_of(recipe):
        folder = runs / recipe_hash(recipe) / stage.name
        assert (
            read_json(folder / "result.json")["steps"]
            == 2 * stage.objective.steps_per_batch * stage.optimisation.epochs
        )
        assert stage.measure is None or read_json(StageFolder(folder).evaluation(stage.measure))["images"] == 2


@pytest.mark.parametrize("name", VARIANTS)
def test_networks_are_evaluated_with_the_measure_of_their_objective(runs: Path, fashion_data: Path, name: str) -> None:
    recipe = variant(fashion_data, name)
    for stage in stages_of(recipe):
        if stage.measure is not None:
            facts = read_json(StageFolder(runs / name / "straight" / stage.name).evaluation(stage.measure))
            assert facts["images"] == 40
            assert 0 <= facts["robust_correct"] <= facts["clean_correct"] <= 40
            assert facts["settings"]["norm"] == (recipe.threat_model.norm if recipe.threat_model else None)
