"""A SLURM for the tests of launching: started once, as it was new for every test."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.support.slurm_cluster import SLURM_PREFIXES, SlurmCluster


@pytest.fixture(scope="package")
def slurm_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """Four nodes; SLURM's commands and submitit lead there while this folder's tests run."""
    with pytest.MonkeyPatch.context() as patch, SlurmCluster(tmp_path_factory.mktemp("slurm")) as cluster:
        for name in [name for name in os.environ if name.startswith(SLURM_PREFIXES)]:
            patch.delenv(name)
        for name, value in cluster.environment.items():
            patch.setenv(name, value)
        yield cluster


@pytest.fixture
def slurm(slurm_cluster: SlurmCluster) -> Iterator[SlurmCluster]:
    """The cluster with every node idle. Whatever the test leaves running there is cancelled."""
    yield slurm_cluster
    slurm_cluster.reset()
