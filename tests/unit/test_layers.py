"""Imports go one way, every vendor has its doors, and a login node needs neither torch nor Ray to read a recipe."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]

LAYERS = """
architectures recipe_fields recipe_objective recipe_attacks recipe_sections recipe_slurm recipe recipe_file progress
schedules keys disk files disclosed processor phases committed stopping overfitting

models.initialisation models.pooling models.small_cnn models.verified_cnn models.vgg_cifar models.wide_resnet
models.ra_resnet models.from_torchvision models.network models masks masked score_init allocation sparsity drift
averaging device attacks
bounds.operations bounds.layers bounds.graph bounds.propagation bounds
objectives.outcome objectives.adversarial objectives.free objectives.trades objectives.smoothing objectives.certified
objectives.mixtrain objectives
data data.order data.manifest data.images data.source data.pickles data.cifar data.svhn data.imagenet data.extra
data.datasets data.verify data.scan data.watch data.write_worker data.write
data.area data.decoder data.prefetch data.loader data.listed_images data.verified_copy data.staging
recorded wandb_ids mirror tracking export load import_weights checkpoint lease
evaluate evaluate.statistics evaluate.measure evaluate.pgd evaluate.probed evaluate.certify evaluate.verified
evaluate.autoattack evaluate.transfer evaluate.resampling evaluate.noises evaluate.blurs evaluate.weather
evaluate.digital evaluate.corruptions evaluate.probes evaluate.honesty evaluate.exported
group evaluate.chunks judging looking snip compiled engine batch_statistics replays
stopwatch system loop job feeding health evaluation scrutiny hardware tracked rollback stage
results further leaderboards.rules leaderboards.robustbench leaderboards.adversarial_pruning leaderboards
page.history page.svg page.verdict figures page.charts page.examples page.pictures page report showcase
worker driver
"""
"""Every module of pipeline/; each imports only from those before it. The first paragraph loads no torch."""
ORDER = tuple(LAYERS.split())
WITHOUT_TORCH = LAYERS.split("\n\n")[0].split()

DOORS = {
    "ray": {"pipeline.training.worker", "pipeline.training.driver", "launch.ray_cluster.connect"},
    "deepspeed": {"pipeline.training.engine"},
    "ffcv": {"pipeline.data.loading.decoder", "pipeline.data.writing.worker"},
    "wandb": {
        "pipeline.run.tracking.wandb_history",
        "pipeline.run.tracking.wandb_mirror",
        "pipeline.report.wandb_report",
    },
    "matplotlib": {"pipeline.report.figures"},
    "jinja2": {"pipeline.report.page"},
    "psutil": {"pipeline.training.hardware"},
    "pyautoattack": {"pipeline.evaluation.measures.autoattack", "pipeline.evaluation.honesty.probes"},
    "submitit": {"launch.slurm.submit", "launch.slurm.sbatch", "launch.slurm.node_task"},
}
"""vendor -> the modules that import it"""


def module_name(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


MODULES = {module_name(path): path for folder in ("pipeline", "launch") for path in (ROOT / folder).rglob("*.py")}


@functools.cache
def imports_of(path: Path) -> tuple[str, ...]:
    """Full names of what a file imports anywhere in it: modules, or names inside them."""
    return tuple(_imports_of(path))


def _imports_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str))


def module_of(name: str) -> str:
    """'pipeline.run.files.read_json' -> 'pipeline.run.files'."""
    while name not in MODULES:
        name = name.rpartition(".")[0]
        assert name, "an import of a module that is not there"
    return name


def own_imports(module: str) -> set[str]:
    """The modules of this project that a module imports."""
    ours = (name for name in imports_of(MODULES[module]) if name.split(".")[0] in ("pipeline", "launch"))
    return {module_of(name) for name in ours} - {"pipeline", "launch"}


def test_the_order_names_every_module_once() -> None:
    assert sorted(ORDER) == sorted(m.removeprefix("pipeline.") for m in MODULES if m.startswith("pipeline."))


@pytest.mark.parametrize("module", ORDER)
def test_a_module_imports_only_from_those_before_it(module: str) -> None:
    before = {f"pipeline.{name}" for name in ORDER[: ORDER.index(module)]}
    assert own_imports(f"pipeline.{module}") <= before


def test_the_package_itself_imports_nothing() -> None:
    assert imports_of(MODULES["pipeline"]) == ()


@pytest.mark.parametrize("vendor", DOORS)
def test_vendors_are_imported_at_their_doors_only(vendor: str) -> None:
    found = {m for m, path in MODULES.items() if vendor in {name.split(".")[0] for name in imports_of(path)}}
    assert found == DOORS[vendor]


def test_modules_are_small() -> None:
    lengths = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in MODULES.items()}
    assert {name: lines for name, lines in lengths.items() if lines > 300} == {}


def test_modules_begin_with_what_they_are() -> None:
    undocumented = [
        m for m, path in MODULES.items() if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert undocumented == []


def test_a_login_node_reads_recipes_without_torch_and_ray() -> None:
    modules = ", ".join(f"pipeline.{name}" for name in WITHOUT_TORCH)
    heavy = sorted(["torch", *DOORS])
    code = f"import sys, launch.__main__, {modules}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout == "[]\n"


def test_evaluating_again_needs_neither_ray_nor_deepspeed() -> None:
    code = "import sys, launch.commands.judge, pipeline.evaluation.runner; print([n for n in ('ray', 'deepspeed') if n in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout == "[]\n"
