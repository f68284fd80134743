"""`python -m launch logs`: the last lines of all logs of a run; with -f also what is appended, like tail -F.

Only the run directory is read, so a run can be followed from any machine that sees it. Files may appear, be replaced or
truncated at any moment; a line is shown once it is complete.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from launch import run_folder
from launch.slurm.submit import read_jobs, stages_by_job
from pipeline.recipe.file import load_resolved_recipe
from pipeline.regular_file import open_regular
from pipeline.run.layout import RunFolder, is_done
from pipeline.run.printable import printable

POLL_S = 0.5
BLOCK = 64 * 1024
MARK = 64
"""Bytes before the read position that must be unchanged; otherwise the file was replaced or truncated."""


def add_parser(commands: Any) -> None:
    logs = commands.add_parser(
        "logs",
        help="the last lines that the jobs and workers of a run have logged",
        description="Print the last lines of every log of a run: SLURM jobs, workers, restarts.",
    )
    logs.add_argument("run", metavar="RUN", help="name of a run under runs/, or its folder")
    logs.add_argument(
        "-f", "--follow", action="store_true", help="keep printing new lines until the run is finished, or Ctrl-C"
    )
    logs.add_argument("-n", "--lines", type=int, default=20, help="lines of each log (default: %(default)s)")
    logs.set_defaults(handler=_logs)


def _logs(arguments: argparse.Namespace) -> int:
    folder = run_folder.find_run(arguments.run)
    try:
        print_logs(folder, arguments.follow, arguments.lines, sys.stdout, threading.Event())
    except KeyboardInterrupt:
        if not arguments.follow:  # the normal way to end -f while the run is unfinished
            raise
    return 0


def print_logs(folder: Path, follow: bool, lines: int, stream: TextIO, stop: threading.Event) -> None:
    """Print the last lines of each log under its path; with `follow`, also new ones until it ends or `stop` is set.

    Errors: ValueError if there is nothing to print or wait for, or a file cannot be read.
    """
    if lines < 1:
        raise ValueError(f"--lines {lines}: expected 1 or more")
    logs = _Logs(folder, stream)
    logs.add_new_files(lines)
    finished = logs.run_is_finished()
    news = logs.print_new_lines(partial=finished or not follow)
    if not news and (finished or not follow):
        hint = "it is finished" if finished else f"python -m launch resume {folder} starts it, -f waits for it"
        raise ValueError(f"{folder} has no logs; {hint}")
    if not news:
        print(f"waiting for the first log of {folder}", file=stream, flush=True)
    while follow and not (finished and not news) and not stop.wait(POLL_S):
        finished = logs.run_is_finished()  # before the logs are read, so that the last lines are included
        logs.add_new_files()
        news = logs.print_new_lines(partial=False)
    logs.print_new_lines(partial=True)


class _Logs:
    """All logs of a run; a file, once added, stays."""

    def __init__(self, folder: Path, stream: TextIO) -> None:
        self.files: dict[Path, _Log] = {}
        self._folder = folder
        self._stream = stream
        self._stages_by_job = stages_by_job(load_resolved_recipe(RunFolder(folder).recipe))
        self._last_printed: Path | None = None

    def run_is_finished(self) -> bool:
        return not any(self._is_unfinished(name) for name in self._stages_by_job)

    def _is_unfinished(self, name: str) -> bool:
        return not all(is_done(self._folder, stage) for stage in self._stages_by_job[name])

    def add_new_files(self, lines: int | None = None) -> None:
        """Add files that have appeared, with all their lines, or with only the last `lines`."""
        for path in [*self._of_jobs(), *self._of_workers()]:
            if path not in self.files:
                self.files[path] = _Log(path)
                if lines is not None:
                    self.files[path].skip_to_last(lines)

    def _of_jobs(self) -> list[Path]:
        """submitit's logs of the newest job of each name; of the unfinished jobs only, if there are any."""
        newest = {job.job_name: job.id for job in read_jobs(self._folder)}
        unfinished = {
            job for name, job in newest.items() if name not in self._stages_by_job or self._is_unfinished(name)
        }
        paths = sorted((self._folder / "jobs").glob("*_*_log.*"), key=_in_order)
        job_of = {path: path.name.rsplit("_", 2)[0] for path in paths}  # 12_0_log.err; in an array 12_3_0_log.err
        active = [path for path, job in job_of.items() if job in unfinished]
        return active or [path for path, job in job_of.items() if job in newest.values()]

    def _of_workers(self) -> list[Path]:
        folder = RunFolder(self._folder).logs
        return [*sorted(folder.glob("worker-*.log"), key=_in_order), *folder.glob("restarts.log")]

    def print_new_lines(self, partial: bool) -> bool:
        """Print the lines added since the last call, each file under its path; returns whether there were any."""
        news = False
        for path, log in self.files.items():
            text = log.read(partial)
            if not text:
                continue
            if path != self._last_printed or log.restarted:
                gap = "" if self._last_printed is None else "\n"
                print(f"{gap}==> {printable(str(path))} <=={' (replaced)' if log.restarted else ''}", file=self._stream)
            text = printable(text)
            print(text, end="" if text.endswith("\n") else "\n", file=self._stream, flush=True)
            self._last_printed, log.restarted, news = path, False, True
        return news


class _Log:
    """One file, read incrementally. Errors: ValueError if it cannot be read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.restarted = False
        """Whether it was replaced or truncated after lines of it were printed."""
        self._inode = -1
        self._offset = 0
        self._mark = b""

    def skip_to_last(self, lines: int) -> None:
        """Skip all but the last `lines` complete lines and what follows them."""
        stream = self._open()
        if stream is None:
            return
        with stream:
            start = end = stream.seek(0, os.SEEK_END)
            length, tail = BLOCK, b""
            while start > 0 and tail.count(b"\n") <= lines:
                start = stream.seek(max(0, end - length))
                length, tail = 2 * length, stream.read(end - start)
        self._offset = end - len(b"\n".join(tail.split(b"\n")[-lines - 1 :]))

    def read(self, partial: bool) -> str:
        """The complete lines added since the last read; with `partial` also the unfinished last one."""
        stream = self._open()
        if stream is None:
            return ""
        with stream:
            inode = os.fstat(stream.fileno()).st_ino
            stream.seek(self._offset - len(self._mark))
            if self._inode not in (-1, inode) or stream.read(len(self._mark)) != self._mark:
                self._offset, self._mark, self.restarted = stream.seek(0), b"", True
            data = stream.read()
        if not partial:
            data = data[: data.rfind(b"\n") + 1]
        self._inode = inode
        self._offset += len(data)
        self._mark = (self._mark + data)[-MARK:]
        return data.decode(errors="replace")

    def _open(self) -> BinaryIO | None:
        try:
            return open_regular(self.path)
        except FileNotFoundError:  # it may reappear
            return None
        except OSError as error:
            raise ValueError(f"{self.path} cannot be read: {error.strerror or error}") from None


def _in_order(path: Path) -> tuple[int, str]:
    """worker-2.log before worker-10.log."""
    return len(path.name), path.name
