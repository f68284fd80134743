"""Workers find each other without a socket that others reach, in real processes and without Ray."""

from __future__ import annotations

import multiprocessing
import os
import socket
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch.distributed as dist

from pipeline.training import process_group
from pipeline.training.hardware import interface_of
from pipeline.training.process_group import GroupConfig, join_group
from tests.support.commands import listening_addresses

DEADLINE_S = 120


def _meet(config: GroupConfig, address: tuple[str, int] | None, rank: int, out: Any) -> None:
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.pop(name, None)
    if address is not None:
        process_group.ray.util.get_node_ip_address = lambda: address[0]
    join_group(config, address, rank, 2)
    ranks: list[Any] = [None, None]
    dist.all_gather_object(ranks, rank)
    listens = listening_addresses(psutil.Process())
    dist.barrier()
    dist.destroy_process_group()
    out.put((ranks, listens, os.environ["NCCL_SOCKET_IFNAME"]))


def _addresses_of_two(config: GroupConfig, address: tuple[str, int] | None) -> tuple[set[str], str]:
    """Where two workers listen while they are in a group, and the interface that NCCL is given."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    out = context.Queue()
    workers = [context.Process(target=_meet, args=(config, address, rank, out)) for rank in range(2)]
    for worker in workers:
        worker.start()
    try:
        answers = [out.get(timeout=DEADLINE_S) for _ in workers]
    finally:
        for worker in workers:
            worker.join(30)
            worker.kill()
    assert [ranks for ranks, _, _ in answers] == [[0, 1], [0, 1]]
    return answers[0][1] | answers[1][1], answers[0][2]


def _address_on_a_network() -> str:
    for addresses in psutil.net_if_addrs().values():
        for one in addresses:
            if one.family == socket.AF_INET and not ip_address(one.address).is_loopback:
                return one.address
    pytest.skip("this machine has no network")


def test_on_one_machine_nothing_listens_on_a_network(tmp_path: Path) -> None:
    config = GroupConfig("gloo", timeout_s=60, store=str(tmp_path / "a store"))
    assert _addresses_of_two(config, None) == ({"127.0.0.1"}, "=lo")


def test_on_several_machines_they_listen_at_rays_address_only() -> None:
    host = _address_on_a_network()
    with socket.create_server((host, 0)) as probe:
        port = probe.getsockname()[1]
    config = GroupConfig("gloo", timeout_s=60)
    assert _addresses_of_two(config, (host, port)) == ({host}, f"={interface_of(host)}")


def test_an_address_of_no_interface_is_named() -> None:
    with pytest.raises(ValueError, match=r"no network interface of .* has the address 192\.0\.2\.77"):
        interface_of("192.0.2.77")
