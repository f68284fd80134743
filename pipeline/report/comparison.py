"""What the numbers say, in words: whether HYDRA is ahead of a baseline, or the difference is within noise."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from statistics import fmean

from pipeline.evaluation.statistics import McNemar, paired_interval
from pipeline.report.results import Comparisons, RunResult, accuracies, claim, p_text, pruned_text

SIGNIFICANT = 0.05
"""McNemar's p below which a difference is more than noise."""
AHEAD, BEHIND, NOISE, MISSING = "HYDRA ahead", "HYDRA behind", "within noise", "missing"


def within_noise(test: McNemar) -> bool:
    return test.p_value >= SIGNIFICANT


def near_hydra(runs: list[RunResult], comparisons: Comparisons, name: str, keep: Decimal) -> list[bool]:
    """For each of a network's accuracies that `results.accuracies` finds: whether its difference from HYDRA's robust
    one is within noise. HYDRA and the dense network are compared with nothing."""
    found = [(i, run.find(name, keep)) for i, run in enumerate(runs)]
    tests = [comparisons.get((i, name, keep)) for i, network in found if network is not None and network.evaluation]
    return [test is not None and within_noise(test) for test in tests]


@dataclass(frozen=True)
class Difference:
    """HYDRA against one baseline on the same images of one run."""

    run: RunResult
    baseline: str
    keep_fraction: Decimal
    test: McNemar | None
    """None while one of the two is not evaluated."""
    low: float = 0.0
    high: float = 0.0
    """95 % interval of the difference, fractions."""

    @property
    def says(self) -> str:
        if self.test is None:
            return MISSING
        if within_noise(self.test):
            return NOISE
        return AHEAD if self.test.difference > 0 else BEHIND


def differences(runs: list[RunResult], comparisons: Comparisons) -> list[Difference]:
    """All of them, from the densest networks to the sparsest."""
    found = []
    for (i, baseline, keep), test in sorted(comparisons.items(), key=lambda item: -item[0][2]):
        network = runs[i].find("HYDRA", keep)
        interval = (0.0, 0.0)
        if test is not None and network is not None and network.evaluation is not None:
            interval = paired_interval(test.only_first, test.only_second, network.evaluation.images)
        found.append(Difference(runs[i], baseline, keep, test, *interval))
    return found


def headline(runs: list[RunResult], found: list[Difference]) -> str:
    """The verdict in one sentence: HYDRA at the largest sparsity that is evaluated, and its lead there."""
    judged = [n.keep_fraction for run in runs for n in run.networks if n.name == "HYDRA" and n.evaluation]
    if not judged:
        return "No pruned network is evaluated yet."
    keep = min(judged)
    values = [100 * accuracy["value"] for accuracy in accuracies(runs, "HYDRA", keep, "robust")]
    start = f"With {pruned_text(keep)} of its connections pruned, HYDRA's network has {fmean(values):.1f} % "
    start += f"{claim(runs)} accuracy"
    if len(values) == 1:
        (only,) = accuracies(runs, "HYDRA", keep, "robust")
        start += f" (95 % interval {100 * only['low']:.1f} to {100 * only['high']:.1f})"
    else:
        start += f" on average over {len(values)} seeds ({min(values):.1f} to {max(values):.1f})"
    here = [d for d in found if d.keep_fraction == keep and d.test is not None]
    names = [d.baseline for d in here]
    name = "magnitude" if "magnitude" in names else next(iter(names), None)
    if name is None:
        return f"{start}; there is no baseline at this sparsity to compare it with."
    return f"{start}; {_lead([d for d in here if d.baseline == name], name)}."


def _lead(here: list[Difference], name: str) -> str:
    tests = [(d, d.test) for d in here if d.test is not None]
    if len(tests) == 1:
        (one, test), *_ = tests
        size, p = abs(100 * test.difference), p_text(test.p_value).replace(" ", "\N{NO-BREAK SPACE}")
        if one.says == NOISE:
            return f"the {size:.1f} points between it and {name} pruning are a difference within noise (McNemar's {p})"
        side = "ahead of" if one.says == AHEAD else "behind"
        interval = f"95 % interval of the difference {signed(100 * one.low)} to {signed(100 * one.high)}, McNemar's {p}"
        return f"it is significantly {side} {name} pruning, by {size:.1f} points ({interval})"
    leads = [100 * test.difference for _, test in tests]
    counts = {says: sum(d.says == says for d, _ in tests) for says in (AHEAD, BEHIND, NOISE)}
    words = {AHEAD: "significantly ahead", BEHIND: "significantly behind", NOISE: "within noise"}
    outcome = ", ".join(f"{words[says]} in {count}" for says, count in counts.items() if count)
    between = f"{signed(min(leads))} to {signed(max(leads))}"
    return f"its lead over {name} pruning is {between} points: {outcome} of {len(tests)} seeds by McNemar's test"


def signed(points: float, digits: int = 1) -> str:
    return f"{points:+.{digits}f}".replace("-", "\N{MINUS SIGN}")
