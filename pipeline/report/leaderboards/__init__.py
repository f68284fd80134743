"""A run's networks in the formats of leaderboards, from kept AutoAttack verdicts; or the reason why not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.report.leaderboards.adversarial_pruning import pruning_entry
from pipeline.report.leaderboards.robustbench import model_info
from pipeline.report.leaderboards.rules import NotAccepted, Paper
from pipeline.report.results import RunResult
from pipeline.run.files import atomic_write_json, atomic_write_text

__all__ = ["NotAccepted", "Paper", "write_leaderboards"]


def write_leaderboards(run: RunResult, paper: Paper, folder: Path) -> tuple[list[Path], list[str]]:
    """Write what the leaderboards take of `run` below `folder`; return the files, and what is not taken and why.

    Errors: NotAccepted if nothing is; ValueError for damaged verdicts, or a folder that cannot be written.
    """
    files: dict[Path, Any] = {}
    refused: dict[str, list[str]] = {}
    for network in run.networks:
        try:
            name, content = model_info(run, network, paper)
        except NotAccepted as error:
            refused.setdefault(str(error), []).append(network.stage)
        else:
            files[folder / "robustbench" / name] = content
    left_out = [f"RobustBench, {', '.join(stages)}: {reason}" for reason, stages in refused.items()]
    try:
        entry = pruning_entry(run, paper)
    except NotAccepted as error:
        left_out.append(f"adversarial pruning benchmark: {error}")
    else:
        files |= {folder / "adversarial_pruning_benchmark" / name: content for name, content in entry.items()}
    if not files:
        raise NotAccepted("\n  ".join([f"no leaderboard takes {run.folder}:", *left_out]))
    try:
        for path, content in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            write = atomic_write_text if isinstance(content, str) else atomic_write_json
            write(path, content)
    except OSError as error:
        raise ValueError(f"{folder} cannot be written: {error}; make a copy of the run") from None
    return list(files), left_out
