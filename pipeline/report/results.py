"""Reads the results of runs: accuracies, intervals, kept connections, paired comparisons."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.evaluation.chunks import read_verdicts
from pipeline.evaluation.result import EvaluationResult, Kind
from pipeline.evaluation.saved import read_evaluation
from pipeline.evaluation.statistics import McNemar, certified_curve, mcnemar
from pipeline.models.exported_counts import check_exported
from pipeline.recipe.fields import canonical_decimal
from pipeline.recipe.file import recipe_hash
from pipeline.recipe.schema import Recipe
from pipeline.recipe.stages import stages_of
from pipeline.run.files import read_json
from pipeline.run.layout import RunFolder, StageFolder
from pipeline.run.provenance import load_run_recipe
from pipeline.run.records import KeptCount, StageResult, TrialResult

ATTACK_FACTS = ("attack", "chunk", "images", "data_sha256")
"""Fields that must agree, in addition to the attack's settings, for two accuracies to be comparable."""
CHECK_KEYS = ("name", "verdict", "figure", "meaning")
VERDICTS = ("pass", "warn")


@dataclass(frozen=True)
class NetworkResult:
    """One network of a run, evaluated or not yet."""

    folder: Path
    stage: str
    name: str
    """Title of its method."""
    keep_fraction: Decimal
    evaluation: EvaluationResult | None
    """By the stage's own measure (for example evaluate/pgd.json), or None until it is evaluated."""
    layers: tuple[KeptCount, ...]
    """name, kept and total per masked layer; empty while the stage is unfinished."""

    model_sha256: str | None = None
    """Of the exported network; None while the stage is unfinished."""
    tuned: tuple[TrialResult, ...] = ()
    """The trials that it was chosen from; empty without `sparsity.tune`, and while the stage is unfinished."""

    @property
    def pruned(self) -> str:
        return pruned_text(self.keep_fraction)

    @property
    def label(self) -> str:
        return self.name if self.name == "dense" else f"{self.name}, {self.pruned} pruned"


@dataclass(frozen=True)
class RunResult:
    folder: Path
    recipe: Recipe
    networks: list[NetworkResult]

    @property
    def baselines(self) -> list[str]:
        """Names of the baselines, in the recipe's order."""
        return [baseline.title for baseline in self.recipe.sparsity.baselines]

    def find(self, name: str, keep_fraction: Decimal) -> NetworkResult | None:
        return next((n for n in self.networks if (n.name, n.keep_fraction) == (name, keep_fraction)), None)


def read_runs(folders: list[Path]) -> list[RunResult]:
    """Read comparable runs: one recipe with different seeds, evaluated by one attack on one test set.

    Errors: ValueError for a folder that is not a run, for runs of different recipes or equal seeds, for evaluations
    that differ in attack or images, and for an evaluation of a model other than the stage's.
    """
    if not folders:
        raise ValueError("no run given; name at least one folder under runs/")
    runs = [_read_run(folder) for folder in folders]
    first = runs[0]
    for run in runs[1:]:
        if _hash_without_seed(run.recipe) != _hash_without_seed(first.recipe):
            raise ValueError(
                f"{first.folder} and {run.folder} are runs of different recipes, whose mean is meaningless; "
                "report them one by one"
            )
    seeds = [run.recipe.seed for run in runs]
    if len(set(seeds)) != len(seeds):
        raise ValueError(f"the runs have the seeds {seeds}; give each seed once")
    _refuse_equal_networks(runs)
    _check_one_attack(runs)
    return runs


def compare(run: RunResult, keep_fraction: Decimal, baseline: str) -> McNemar | None:
    """McNemar's test of HYDRA against a baseline; None until both are evaluated.

    Errors: ValueError if their verdicts are on different images."""
    verdicts = []
    for name in ("HYDRA", baseline):
        network = run.find(name, keep_fraction)
        if network is None or network.evaluation is None:
            return None
        path = StageFolder(network.folder).evaluations / f"{network.evaluation.attack}.parquet"
        columns = read_verdicts(path)
        verdicts.append((path, columns["sample_id"], columns["robust_correct"]))
    (path, ids, hydra), (other_path, other_ids, other) = verdicts
    if not np.array_equal(ids, other_ids):
        raise ValueError(f"{path} and {other_path} hold different images; evaluate both networks again")
    return mcnemar(hydra, other)


Comparisons = dict[tuple[int, str, Decimal], McNemar | None]
"""(index of the run, baseline, keep_fraction) -> test of HYDRA against the baseline."""


def compare_all(runs: list[RunResult]) -> Comparisons:
    """Compare HYDRA with every baseline of every run at every sparsity that it has. Errors: those of `compare`."""
    return {
        (i, name, keep): compare(run, keep, name)
        for i, run in enumerate(runs)
        for name in run.baselines
        for keep in run.recipe.sparsity.keep_fractions
        if run.find(name, keep) is not None
    }


def pruned_text(keep: Decimal) -> str:
    return f"{canonical_decimal((1 - keep) * 100)} %"


def p_text(p: float) -> str:
    if p >= 0.001:
        return f"p = {p:.3f}"
    return f"p = {p:.1e}" if p > 0 else "p < 1e-300"


def accuracies(runs: list[RunResult], name: str, keep: Decimal, kind: Kind) -> list[dict[str, float]]:
    """value, low and high of each run in which the network is evaluated."""
    networks = [run.find(name, keep) for run in runs]
    return [n.evaluation.accuracy(kind).to_json() for n in networks if n is not None and n.evaluation is not None]


CURVE_POINTS = 101
CertifiedCurves = dict[tuple[int, str, Decimal], list[dict[str, float]]]
"""(index of the run, network name, keep_fraction) -> points of `statistics.certified_curve`."""


def certified_curves(runs: list[RunResult]) -> CertifiedCurves:
    """Certified accuracies at CURVE_POINTS radii from 0 to the largest certificate; empty without certificates."""
    columns_by_network = {}
    for i, run in enumerate(runs):
        for network in run.networks:
            path = StageFolder(network.folder).evaluation("certified").with_suffix(".parquet")
            if network.evaluation is not None and network.evaluation.attack == "certified" and path.exists():
                columns = read_verdicts(path, "radius")
                columns_by_network[i, network.name, network.keep_fraction] = columns["clean_correct"], columns["radius"]
    if not columns_by_network:
        return {}
    largest = max(float(radius.max()) for _, radius in columns_by_network.values())
    radii = np.linspace(0.0, largest, CURVE_POINTS).tolist()
    return {key: certified_curve(correct, radius, radii) for key, (correct, radius) in columns_by_network.items()}


def claim(runs: list[RunResult]) -> str:
    """The kind of robust accuracy: "robust" (to an attack), "certified" or "verified"."""
    attacks = {n.evaluation.attack for run in runs for n in run.networks if n.evaluation}
    return next(iter(attacks & {"certified", "verified"}), "robust")


def budget_unit(runs: list[RunResult]) -> str:
    """What keep fractions are fractions of: connections, or multiply-accumulates where channels are pruned."""
    return "multiply-accumulates" if runs[0].recipe.sparsity.structure == "channel" else "connections"


def honesty_checks(network: NetworkResult) -> list[dict[str, str]]:
    """name, verdict (pass or warn), figure and meaning of each check; empty if the checks are of another model.

    Errors: ValueError naming the file.
    """
    path = StageFolder(network.folder).honesty
    if not network.evaluation or not path.exists():
        return []
    fix = f"delete it and {network.folder / 'evaluate'}, and resume the run to check and evaluate again"
    content = read_json(path)
    checks = content.get("checks") if isinstance(content, dict) else None
    if not isinstance(checks, list):
        raise ValueError(f"{path} has no list of checks; {fix}")
    for check in checks:
        if not isinstance(check, dict) or any(not isinstance(check.get(key), str) for key in CHECK_KEYS):
            raise ValueError(f"{path}: {check!r} lacks one of {', '.join(CHECK_KEYS)}; {fix}")
        if check["verdict"] not in VERDICTS:
            raise ValueError(f"{path}: verdict {check['verdict']!r} is neither {' nor '.join(VERDICTS)}; {fix}")
    return checks if content.get("model_sha256") == network.evaluation.model_sha256 else []


def honesty_text(runs: list[RunResult]) -> str | None:
    """Number of honesty checks that pass, and those that warn; None without checks."""
    passed, total, warnings = 0, 0, []
    for run in runs:
        for network in run.networks:
            checks = honesty_checks(network)
            total += len(checks)
            names = [check["name"] for check in checks if check["verdict"] == "warn"]
            warnings += [f"{run.folder.name}/{network.stage} warns of {', '.join(names)}"] if names else []
            passed += len(checks) - len(names)
    if not total:
        return None
    more = f"; {'; '.join(warnings)} (explained in the stage's honesty.json)" if warnings else ""
    return f"honesty: {passed} of {total} checks pass{more}"


def attack_text(runs: list[RunResult]) -> str:
    """The evaluation that all accuracies of `runs` share: attack and number of images."""
    first = next((n.evaluation for run in runs for n in run.networks if n.evaluation), None)
    if first is None:
        return "nothing is evaluated yet"
    return f"{first.title}, {first.images:,} test images"


def _read_run(folder: Path) -> RunResult:
    recipe_path = RunFolder(folder).recipe
    if not recipe_path.is_file():
        raise ValueError(f"{folder} is not a run (it has no recipe.yaml); give a run's name or its folder under runs/")
    recipe = load_run_recipe(folder)
    networks = []
    for stage in stages_of(recipe):
        if stage.measure is None:
            continue
        stage_folder = folder / stage.name
        path = StageFolder(stage_folder).evaluation(stage.measure)
        evaluation = read_evaluation(path) if path.exists() else None
        result = StageResult.read_if_there(StageFolder(stage_folder).result)
        if evaluation and evaluation.attack != stage.measure:
            raise ValueError(
                f"{path} is damaged: its attack is {evaluation.attack}, not {stage.measure}; "
                "delete it and resume the run to evaluate again"
            )
        if result is not None:
            check_exported(StageFolder(stage_folder).network, result)
        if evaluation and result and evaluation.model_sha256 != result.model_sha256:
            raise ValueError(
                f"{path} is of another model than {stage_folder / 'result.json'}; "
                "delete it and resume the run to evaluate again"
            )
        keep = Decimal(1) if stage.keep_fraction is None else stage.keep_fraction
        layers, model, tuned = (result.layers, result.model_sha256, result.tuned) if result else ((), None, ())
        networks.append(NetworkResult(stage_folder, stage.name, stage.title, keep, evaluation, layers, model, tuned))
    _check_same_layers([network for network in networks if network.layers])
    return RunResult(folder, recipe, networks)


def _check_same_layers(networks: list[NetworkResult]) -> None:
    for network in networks[1:]:
        first, other = ([(layer.name, layer.total) for layer in n.layers] for n in (networks[0], network))
        if first != other:
            raise ValueError(
                f"{networks[0].folder / 'result.json'} and {network.folder / 'result.json'} list different layers, so "
                "one of them is damaged; restore it"
            )


def _hash_without_seed(recipe: Recipe) -> str:
    return recipe_hash(recipe.model_copy(update={"seed": 0, "name": "any"}))


def _refuse_equal_networks(runs: list[RunResult]) -> None:
    """Another seed gives another network, so that equal ones are copies."""
    first: dict[str, NetworkResult] = {}
    for network in (network for run in runs for network in run.networks):
        twin = first.setdefault(network.model_sha256 or str(network.folder), network)
        if twin is not network:
            raise ValueError(
                f"{twin.folder} and {network.folder} have the same network, so one is a copy of the other; "
                "report one of them"
            )


def _check_one_attack(runs: list[RunResult]) -> None:
    facts_by_network = [
        (n, _attack_facts(n.evaluation)) for run in runs for n in run.networks if n.evaluation is not None
    ]
    for network, facts in facts_by_network[1:]:
        first, expected = facts_by_network[0]
        for fact in {**expected, **facts}:
            if expected.get(fact) != facts.get(fact):
                raise ValueError(
                    f"{first.folder} and {network.folder} were evaluated differently: {fact} is "
                    f"{expected.get(fact)!r} and {facts.get(fact)!r}; evaluate both the same way"
                )


def _attack_facts(evaluation: EvaluationResult) -> dict[str, Any]:
    return {fact: getattr(evaluation, fact) for fact in ATTACK_FACTS} | evaluation.settings
