"""`python -m launch evaluate`: attack a finished network again, with another strength or on fewer images."""

from __future__ import annotations

import argparse
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

from launch import run_folder
from pipeline.phases import stages_of
from pipeline.recipe_fields import parse_fraction
from pipeline.recipe_file import load_recipe

EXAMPLE = """\
  python -m launch evaluate runs/demo/keep-0.01/finetune/model.safetensors --steps 50 --restarts 5 --images 1000
  python -m launch evaluate demo --images all          (every finished network of the run)
"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "evaluate",
        help="clean and PGD accuracy of finished networks, printed as JSON",
        description=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("target", metavar="RUN|FILE", help="a run, or a model.safetensors inside one")
    parser.add_argument("--attack", default="pgd", choices=["pgd"], help="the attack (default: pgd)")
    parser.add_argument("--images", default="all", help="how many test images, in file order, or all (default)")
    parser.add_argument("--steps", type=int, help="attack steps (default: the recipe's)")
    parser.add_argument("--restarts", type=int, help="random restarts (default: the recipe's)")
    parser.add_argument("--step-size", type=_pixels, help="for example 1/255 (default: the recipe's)")
    parser.set_defaults(handler=_evaluate)


def _pixels(text: str) -> Fraction:
    try:
        return parse_fraction(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _run_of(path: Path) -> Path:
    for folder in path.resolve().parents:
        if (folder / "recipe.yaml").exists():
            return folder
    raise ValueError(f"{path} is not inside a run: no recipe.yaml above it names its threat model and data")


def _evaluate(arguments: argparse.Namespace) -> int:
    target = Path(arguments.target)
    if target.suffix == ".safetensors":
        if not target.is_file():
            raise ValueError(f"{target} does not exist")
        folder, files = _run_of(target), [target]
    else:
        folder = run_folder.find(arguments.target)
        stages = [stage for stage in stages_of(load_recipe(folder / "recipe.yaml")) if stage.measure is not None]
        files = [path for stage in stages if (path := folder / stage.name / "model.safetensors").exists()]
        if not files:
            raise ValueError(f"{folder} has no finished network yet; python -m launch resume {folder}")
    run_folder.check_same_data(folder)
    recipe = load_recipe(folder / "recipe.yaml")

    import numpy as np

    from pipeline.data.loader import Loader
    from pipeline.data.order import evaluation_crops
    from pipeline.evaluate.chunks import evaluate
    from pipeline.evaluate.measure import summarise
    from pipeline.evaluate.pgd import Pgd
    from pipeline.export import load_model
    from pipeline.group import Group, make_repeatable, pick_device

    given = {"steps": arguments.steps, "restarts": arguments.restarts, "step_size": arguments.step_size}
    strength = recipe.evaluation.model_copy(update={key: value for key, value in given.items() if value is not None})
    if strength.step_size is None:
        raise ValueError(f"{folder}: its recipe has no step size for PGD; give one, for example --step-size 1/255")
    if min(strength.steps, strength.restarts, strength.step_size) <= 0:
        raise ValueError("--steps, --restarts and --step-size must be positive")
    attack = Pgd.of(recipe.threat_model, strength, recipe.seed)
    device = pick_device(recipe.workers.device)
    with Loader(
        Path(recipe.data.test_file), image_size=recipe.data.image_size, threads=recipe.workers.threads
    ) as loader:
        make_repeatable(recipe.workers.threads)  # also back to the thread count that importing FFCV changed
        count = loader.num_samples
        if arguments.images != "all":
            if not arguments.images.isdigit() or not 0 < int(arguments.images) <= count:
                raise ValueError(f"--images {arguments.images}: expected all or a number from 1 to {count}")
            count = int(arguments.images)
        data = recipe.data
        crops = evaluation_crops(data.augmentation, loader.heights, loader.widths, data.image_size)
        for path in files:
            network = load_model(path).to(device)
            chunk, group = recipe.evaluation.chunk, Group(0, 1, device)
            verdicts = evaluate(network, loader, np.arange(count), lambda ids: crops[ids], attack, chunk, group)
            print(json.dumps({"file": str(path), **{k: str(v) for k, v in given.items() if v}, **summarise(verdicts)}))
    return 0
