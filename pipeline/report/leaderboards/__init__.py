"""Leaderboard entries for a run's networks, from saved AutoAttack verdicts, or why there are none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.report.leaderboards.adversarial_pruning import pruning_entry
from pipeline.report.leaderboards.robustbench import model_info
from pipeline.report.leaderboards.rules import NotAccepted, Paper
from pipeline.report.results import RunResult
from pipeline.run.files import atomic_write_json, atomic_write_text, make_folder

__all__ = ["NotAccepted", "Paper", "write_leaderboards"]


def write_leaderboards(run: RunResult, paper: Paper, folder: Path) -> tuple[list[Path], list[str]]:
    """Write leaderboard entries of `run` below `folder`; return the files, and what is not accepted with reasons.

    Errors: NotAccepted if there are none; ValueError for damaged verdicts, or a folder that cannot be written.
    """
    files: dict[Path, Any] = {}
    refusals: dict[str, list[str]] = {}
    for network in run.networks:
        try:
            name, content = model_info(run, network, paper)
        except NotAccepted as error:
            refusals.setdefault(str(error), []).append(network.stage)
        else:
            files[folder / "robustbench" / name] = content
    notes = [f"RobustBench, {', '.join(stages)}: {reason}" for reason, stages in refusals.items()]
    try:
        entry = pruning_entry(run, paper)
    except NotAccepted as error:
        notes.append(f"adversarial pruning benchmark: {error}")
    else:
        files |= {folder / "adversarial_pruning_benchmark" / name: content for name, content in entry.items()}
    if not files:
        raise NotAccepted("\n  ".join([f"no leaderboard accepts {run.folder}:", *notes]))
    try:
        for path, content in files.items():
            make_folder(path.parent)
            write = atomic_write_text if isinstance(content, str) else atomic_write_json
            write(path, content)
    except OSError as error:
        raise ValueError(f"{folder} cannot be written: {error}; make a copy of the run") from None
    return list(files), notes
