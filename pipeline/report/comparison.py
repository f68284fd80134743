"""Comparisons in words: whether HYDRA is ahead of a baseline, behind it, or within noise."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from statistics import fmean

from pipeline.evaluation.statistics import McNemar, paired_interval
from pipeline.report.results import Comparisons, RunResult, accuracies, budget_unit, claim, p_text, pruned_text

SIGNIFICANT = 0.05
"""A difference is significant if McNemar's p is below this level, and within noise otherwise."""
AHEAD, BEHIND, NOISE, MISSING = "HYDRA ahead", "HYDRA behind", "within noise", "missing"


def within_noise(test: McNemar) -> bool:
    return test.p_value >= SIGNIFICANT


def near_hydra(runs: list[RunResult], comparisons: Comparisons, name: str, keep: Decimal) -> list[bool]:
    """For each accuracy in `results.accuracies`, whether its difference from HYDRA's robust accuracy is within noise;
    False for HYDRA and the dense network."""
    networks = [(i, run.find(name, keep)) for i, run in enumerate(runs)]
    tests = [comparisons.get((i, name, keep)) for i, network in networks if network is not None and network.evaluation]
    return [test is not None and within_noise(test) for test in tests]


@dataclass(frozen=True)
class Difference:
    """HYDRA against one baseline on the same images of one run."""

    run: RunResult
    baseline: str
    keep_fraction: Decimal
    test: McNemar | None
    """None until both are evaluated."""
    low: float = 0.0
    high: float = 0.0
    """95 % interval of the difference, as fractions."""

    @property
    def outcome(self) -> str:
        if self.test is None:
            return MISSING
        if within_noise(self.test):
            return NOISE
        return AHEAD if self.test.difference > 0 else BEHIND


def differences(runs: list[RunResult], comparisons: Comparisons) -> list[Difference]:
    """All comparisons, by increasing sparsity."""
    rows = []
    for (i, baseline, keep), test in sorted(comparisons.items(), key=lambda item: -item[0][2]):
        network = runs[i].find("HYDRA", keep)
        interval = (0.0, 0.0)
        if test is not None and network is not None and network.evaluation is not None:
            interval = paired_interval(test.only_first, test.only_second, network.evaluation.images)
        rows.append(Difference(runs[i], baseline, keep, test, *interval))
    return rows


def headline(runs: list[RunResult], rows: list[Difference]) -> str:
    """One sentence: HYDRA's accuracy at the largest evaluated sparsity, and its lead over a baseline."""
    keeps = [n.keep_fraction for run in runs for n in run.networks if n.name == "HYDRA" and n.evaluation]
    if not keeps:
        return "No pruned network is evaluated yet."
    keep = min(keeps)
    values = [100 * accuracy["value"] for accuracy in accuracies(runs, "HYDRA", keep, "robust")]
    start = f"With {pruned_text(keep)} of its {budget_unit(runs)} pruned, HYDRA has {fmean(values):.1f} % "
    start += f"{claim(runs)} accuracy"
    if len(values) == 1:
        (accuracy,) = accuracies(runs, "HYDRA", keep, "robust")
        start += f" (95 % interval {100 * accuracy['low']:.1f} to {100 * accuracy['high']:.1f})"
    else:
        start += f" on average over {len(values)} seeds ({min(values):.1f} to {max(values):.1f})"
    at_keep = [d for d in rows if d.keep_fraction == keep and d.test is not None]
    names = [d.baseline for d in at_keep]
    name = "magnitude" if "magnitude" in names else next(iter(names), None)
    if name is None:
        return f"{start}; there is no baseline at this sparsity."
    return f"{start}; {_lead_text([d for d in at_keep if d.baseline == name], name)}."


def _lead_text(rows: list[Difference], name: str) -> str:
    tests = [(d, d.test) for d in rows if d.test is not None]
    if len(tests) == 1:
        (row, test), *_ = tests
        size, p = abs(100 * test.difference), p_text(test.p_value).replace(" ", "\N{NO-BREAK SPACE}")
        if row.outcome == NOISE:
            return f"its difference of {size:.1f} percentage points from {name} pruning is within noise (McNemar's {p})"
        side = "ahead of" if row.outcome == AHEAD else "behind"
        interval = f"95 % interval of the difference {signed(100 * row.low)} to {signed(100 * row.high)}, McNemar's {p}"
        return f"it is significantly {side} {name} pruning, by {size:.1f} percentage points ({interval})"
    leads = [100 * test.difference for _, test in tests]
    counts = {outcome: sum(d.outcome == outcome for d, _ in tests) for outcome in (AHEAD, BEHIND, NOISE)}
    words = {AHEAD: "significantly ahead", BEHIND: "significantly behind", NOISE: "within noise"}
    summary = ", ".join(f"{words[outcome]} in {count}" for outcome, count in counts.items() if count)
    span = f"{signed(min(leads))} to {signed(max(leads))} percentage points"
    return f"its lead over {name} pruning is {span}: {summary} of {len(tests)} seeds by McNemar's test"


def signed(points: float, digits: int = 1) -> str:
    return f"{points:+.{digits}f}".replace("-", "\N{MINUS SIGN}")
