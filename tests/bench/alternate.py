"""Ratios of the times of functions that run alternately in one process, and the files with the results."""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch

from pipeline.run.files import atomic_write_json, atomic_write_text
from pipeline.run.provenance import processor_model

Seconds = dict[str, list[float]]
"""Label -> one measurement per round; the i-th ones of all labels were taken in direct succession."""
UNITS = {"ms": 1e3, "MiB": 2.0**-20}
"""Unit of a table -> its number in a second, or in a byte."""
RESULTS = Path("docs/benchmarks")


def parse_folder(description: str | None) -> Path:
    """The folder from a benchmark's command line, whose `--help` shows the description."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(f"python -m {_module()}", description=description, formatter_class=raw)
    parser.add_argument(
        "folder", nargs="?", type=Path, default=RESULTS, help=f"for the JSON file and the table (default: {RESULTS})"
    )
    return parser.parse_args().folder


def device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _now(where: torch.device, wall_clock: bool) -> float:
    """Seconds of wall clock, after synchronizing the GPU; on a CPU this process's CPU time, which other load disturbs
    less."""
    if where.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() if wall_clock or where.type == "cuda" else time.process_time()


def alternate(
    functions: Mapping[str, Callable[[], object]], rounds: int, where: torch.device, wall_clock: bool = False
) -> Seconds:
    """Run each once to warm up, then all in turn, in reverse order every second round.

    `wall_clock` is for functions that wait, or use other processes.
    """
    for function in functions.values():
        function()
    seconds: Seconds = {label: [] for label in functions}
    for number in range(rounds):
        order = list(functions.items())
        for label, function in order if number % 2 else reversed(order):
            start = _now(where, wall_clock)
            function()
            seconds[label].append(_now(where, wall_clock) - start)
    return seconds


@dataclass(frozen=True)
class Ratio:
    """One line of the results: a ratio of two times as its median and extremes over rounds, and the required bound."""

    name: str
    median: float
    smallest: float
    largest: float
    bound: str
    """Such as '<= 1.05'; empty if there is none."""

    @property
    def holds(self) -> bool | None:
        """Whether the median is within the bound; None without one."""
        if not self.bound:
            return None
        sense, number = self.bound.split()
        return self.median <= float(number) if sense == "<=" else self.median >= float(number)


def ratio(name: str, seconds: Seconds, above: str, below: str, bound: str = "") -> Ratio:
    """Time of `above` / time of `below`, round by round."""
    values = [a / b for a, b in zip(seconds[above], seconds[below], strict=True)]
    return Ratio(name, statistics.median(values), min(values), max(values), bound)


def hardware(where: torch.device) -> str:
    return torch.cuda.get_device_name(where) if where.type == "cuda" else processor_model()


def facts_of(where: torch.device, setting: str) -> dict[str, str]:
    packages = [p for p in ("torch", "torchvision", "deepspeed", "ffcv", "numba") if find_spec(p)]
    return {
        "command": f"python -m {_module()} {' '.join(sys.argv[1:])}".strip(),
        "date": time.strftime("%Y-%m-%d"),
        "hardware": f"{hardware(where)}, {torch.get_num_threads()} thread(s)",
        "versions": ", ".join([f"python {platform.python_version()}", *(f"{p} {version(p)}" for p in packages)]),
        "setting": setting,
    }


def file_stem(where: torch.device) -> str:
    """`<date>-<hardware>`, with which the names of results begin."""
    slug = "-".join("".join(c if c.isalnum() else " " for c in hardware(where).lower()).split())
    return f"{time.strftime('%Y-%m-%d')}-{slug}"


def _format_ratio(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else f"{value:.5f}"


def _module() -> str:
    spec: Any = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if spec is not None else sys.argv[0]


def write_results(
    what: str,
    folder: Path,
    setting: str,
    seconds: Seconds,
    ratios: list[Ratio],
    where: torch.device,
    unit: Literal["ms", "MiB"] = "ms",
) -> None:
    """Write `<date>-<hardware>-<what>.json` and `.md` into the folder, and print the table.

    If the unit is MiB, `seconds` are bytes.
    """
    facts = facts_of(where, setting)
    rows = [
        f"| ratio of {'times' if unit == 'ms' else 'bytes'} | median | smallest to largest | bound | holds |",
        "|---|---|---|---|---|",
    ]
    for r in ratios:
        spread = f"{_format_ratio(r.smallest)} to {_format_ratio(r.largest)}"
        holds = {None: "", True: "yes", False: "no"}[r.holds]
        rows.append(f"| {r.name} | {_format_ratio(r.median)} | {spread} | {r.bound} | {holds} |")
    table = "\n".join(rows)
    rows = [f"| {label} | {UNITS[unit] * statistics.median(values):.0f} |" for label, values in seconds.items()]
    times = "\n".join([f"| what | median {unit} |", "|---|---|", *rows])
    head = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    text = f"# {what.capitalize()} on {hardware(where)}\n\n{head}\n\n{table}\n\n{times}\n"
    name = f"{file_stem(where)}-{what}"
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write_text(folder / f"{name}.md", text)
    lines = [{**vars(r), "holds": r.holds} for r in ratios]
    atomic_write_json(
        folder / f"{name}.json", {**facts, "ratios": lines, "seconds" if unit == "ms" else "bytes": seconds}
    )
    print(text)
