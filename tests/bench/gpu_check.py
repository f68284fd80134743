"""Whether this project computes on a GPU as it does on a CPU, and how fast: `python -m tests.bench.gpu_check [FOLDER]`.

One process, of at most 8 minutes on a GPU, in the strict deterministic mode of training. It needs torch and
torchvision, and neither Ray nor FFCV nor wandb. Checks that need DeepSpeed, AutoAttack's library or CUDA are skipped
where that is missing, with a line that says so. Prints pass, FAIL or skip per check, and with a GPU writes
`<date>-<gpu>.md` into the folder. Exit code: 0 all passed, 1 one failed, 3 none failed and some were skipped.
"""

from __future__ import annotations

import faulthandler
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import torch

from pipeline.distributed import make_deterministic
from pipeline.run.files import atomic_write_text
from tests.bench.alternate import RESULTS, device, facts_of, file_stem, hardware, parse_folder
from tests.bench.gpu_checks import CHECKS
from tests.bench.gpu_engine import ENGINE_CHECKS
from tests.bench.gpu_timings import TIMINGS

LIMIT_S = 480
LATEST_START_S = 400
"""After this many seconds no further check starts."""
DONE, FAILED, SKIPPED = 0, 1, 3


@dataclass
class Report:
    """The lines printed so far, and whether any check failed or was skipped."""

    lines: list[tuple[str, str, str]] = field(default_factory=list)
    """(pass, FAIL or skip; the check; detail)."""

    def add(self, status: str, name: str, detail: str) -> None:
        self.lines.append((status, name, detail))
        print(f"{status:4}  {name}: {detail}", flush=True)

    @property
    def exit_code(self) -> int:
        statuses = {status for status, _, _ in self.lines}
        return FAILED if "FAIL" in statuses else SKIPPED if "skip" in statuses else DONE


def run_check(report: Report, name: str, needs: tuple[str, ...], check: Callable[[torch.device], str]) -> None:
    """Run one check, unless something that it needs is missing: 'cuda', or a package."""
    where = device()
    missing = [need for need in needs if (where.type != "cuda" if need == "cuda" else find_spec(need) is None)]
    if missing:
        report.add("skip", name, f"needs {' and '.join(missing)}")
        return
    start = time.monotonic()
    try:
        detail = check(where)
    except Exception as error:
        traceback.print_exc()
        report.add("FAIL", name, f"{type(error).__name__}: {str(error).partition(chr(10))[0][:300]}")
    else:
        report.add("pass", name, f"{detail} ({time.monotonic() - start:.1f} s)")
    if where.type == "cuda":
        torch.cuda.empty_cache()


def write_report(report: Report, folder: Path, where: torch.device) -> Path:
    head = "\n".join(f"- {name}: {value}" for name, value in facts_of(where, "strict deterministic mode").items())
    rows = "\n".join(f"| {name} | {status} | {detail.replace('|', '/')} |" for status, name, detail in report.lines)
    text = f"# GPU check on {hardware(where)}\n\n{head}\n\n| check | result | detail |\n|---|---|---|\n{rows}\n"
    path = folder / f"{file_stem(where)}.md"
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write_text(path, text)
    return path


def main() -> int:
    folder = parse_folder(__doc__)
    where = device()
    limited = where.type == "cuda"
    if limited:
        faulthandler.dump_traceback_later(LIMIT_S, exit=True)  # a kernel that hangs would otherwise be waited for
    make_deterministic(1)
    report, start = Report(), time.monotonic()
    for name, needs, check in [*CHECKS, *ENGINE_CHECKS, *TIMINGS]:
        if limited and time.monotonic() - start > LATEST_START_S:
            report.add("skip", name, f"no time left of {LIMIT_S} s")
        else:
            run_check(report, name, needs, check)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if where.type == "cuda" or folder != RESULTS:
        print(f"written: {write_report(report, folder, where)}")
    else:
        print("no GPU here, so nothing is written")
    return report.exit_code


if __name__ == "__main__":
    sys.exit(main())
