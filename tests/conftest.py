"""Shared by all tests: a controlled environment, a small real data set, and the check that no process is left."""

from __future__ import annotations

import gzip
import hashlib
import os
import secrets
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import psutil
import pytest

from tests.run_all import LONGEST
from tests.support.commands import processes_with, wait_for_end
from tests.support.shared import made_once, shared_folder

if TYPE_CHECKING:
    from pipeline.recipe.schema import Recipe

MARK = "HYDRA_TEST_SESSION"
"""Every process that a test starts inherits it, so that orphans are found too."""
LINGER_S = 20
"""How long after the last test a process has to end."""
TRAIN_IMAGES, TEST_IMAGES = 3000, 500
NOTHING_SKIPPED = "HYDRA_TEST_NOTHING_SKIPPED"
"""Set where tests must not be skipped because a program is not installed, as in CI."""
NEEDS_PROGRAMS = ("test_page_in_browser.py",)

# Set before torch, wandb and Ray are imported, here and in every process that tests start.
os.environ |= {
    MARK: secrets.token_hex(8),
    "OMP_NUM_THREADS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    # torch.compile would start compilers for GPUs, and in every process compile and load a probe for each of the
    # processor's instruction sets, to check that the compiler supports them.
    "TORCH_WARM_POOL": "0",
    "TORCHINDUCTOR_VEC_ISA_OK": "1",
    "WANDB_MODE": "offline",
    "WANDB_SILENT": "true",
}


# No deadline: the time of an example depends on what else runs. The same examples every time: a failure comes of the
# change. `pytest --hypothesis-profile=explore` tries others.
hypothesis.settings.register_profile("tests", deadline=None, derandomize=True)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=1000)
hypothesis.settings.load_profile("tests")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the longest files first, so that processes that share the tests finish at about the same time."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and NOTHING_SKIPPED in os.environ and item.path.name in NEEDS_PROGRAMS:
        report.outcome, report.longrepr = "failed", f"skipped, though {NOTHING_SKIPPED} is set: {report.longrepr}"
    return report


def _session_processes() -> list[psutil.Process]:
    """Living descendants of this session, without Python's own, which end with it: resource trackers, and the server
    from which workers are forked, whose children have its command line."""
    processes = []
    for process in processes_with({MARK: os.environ[MARK]}):
        try:
            command = " ".join(process.cmdline())
            server = "multiprocessing.forkserver" in command and process.ppid() == os.getpid()
            if not server and "multiprocessing.resource_tracker" not in command:
                processes.append(process)
        except psutil.NoSuchProcess:
            continue
    return processes


@pytest.fixture(scope="session", autouse=True)
def no_process_is_left() -> Iterator[None]:
    """Fails the session if processes outlive the tests that started them; names and kills them."""
    yield
    leftovers = wait_for_end(_session_processes, LINGER_S)
    assert not leftovers, "tests left processes behind:\n" + "\n".join(leftovers)


@pytest.fixture
def no_wandb_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Isolates a test from wandb keys, settings and modes, of the user and of other tests; ends wandb's service."""
    import wandb
    from wandb.sdk.lib import wbauth

    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb_config"))
    yield
    wbauth.unauthenticate_session()
    wandb.teardown()


def _write_idx_slice(source: Path, target: Path, name: str, count: int, dimensions: int) -> None:
    from pipeline.data.sources.fashion_mnist import read_idx

    values = read_idx(source, name, dimensions)[:count]
    header = bytes([0, 0, 8, dimensions]) + b"".join(size.to_bytes(4, "big") for size in values.shape)
    (target / f"{name}.gz").write_bytes(gzip.compress(header + values.tobytes(), compresslevel=1))


def write_fashion_data(folder: Path) -> None:
    """Write train.beton and test.beton into a folder: the first 3,000 and 500 images of Fashion-MNIST."""
    from pipeline.data.sources.fashion_mnist import IDX_FILES, find_fashion_mnist
    from pipeline.data.writing.write import WriteOptions, write_dataset

    folder.mkdir(exist_ok=True)
    source, slices = find_fashion_mnist(None), folder / "idx"
    slices.mkdir()
    for (image_file, label_file), count in zip(IDX_FILES.values(), (TRAIN_IMAGES, TEST_IMAGES), strict=True):
        _write_idx_slice(source, slices, image_file, count, 3)
        _write_idx_slice(source, slices, label_file, count, 1)
    write_dataset("fashion_mnist", slices, folder, WriteOptions(workers=1), False, lambda stage, done, total: None)


@pytest.fixture(scope="session")
def fashion_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with train.beton and test.beton of `write_fashion_data`. Tests must not change it."""
    return made_once(shared_folder(tmp_path_factory) / "fashion", write_fashion_data)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Recipe], Path]:
    """Recipe -> the folder of its complete run, without Ray and without faults. Tests must not change it."""
    from pipeline.recipe.file import dump_recipe
    from tests.support.undisturbed_run import calm_run

    def run_of(recipe: Recipe) -> Path:
        name = hashlib.sha256(dump_recipe(recipe).encode()).hexdigest()[:16]
        return made_once(shared_folder(tmp_path_factory) / f"run-{name}", lambda folder: calm_run(folder, recipe))

    return run_of
