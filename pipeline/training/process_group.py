"""The process group of a run's workers, open to nobody else where that is possible.

torch's TCPStore and gloo have no token: anyone who can connect can read and write keys. Ray Train's own set-up has them
listen on every network of the machine. Here the workers of one machine meet in a file and talk over loopback; those of
several machines listen on the address that Ray uses, and on no other.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import ray
import torch.distributed as dist
from ray.train.torch import TorchConfig
from ray.train.torch.config import _set_torch_distributed_env_vars, _TorchBackend
from torch._C._distributed_c10d import FileStore, Store, TCPStore

from pipeline.training.hardware import interface_of


@dataclass
class GroupConfig(TorchConfig):
    """Ray Train's configuration of the process group, with our way to make it."""

    store: str | None = None
    """A file that does not exist yet, in a private folder of the only machine; None for several machines."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _GroupBackend


class _GroupBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        assert isinstance(backend_config, GroupConfig)
        worker_group.execute(_set_torch_distributed_env_vars)
        address = None if backend_config.store else worker_group.execute_single(0, _free_address)
        world = len(worker_group)
        ray.get(
            [
                worker_group.execute_single_async(rank, join_group, backend_config, address, rank, world)
                for rank in range(world)
            ]
        )


def _free_address() -> tuple[str, int]:
    """Address by which Ray knows this machine, and a port that is free there."""
    host = ray.util.get_node_ip_address()
    with _listener(host, 0) as probe:
        return host, probe.getsockname()[1]


def _listener(host: str, port: int) -> socket.socket:
    return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)


def join_group(config: GroupConfig, address: tuple[str, int] | None, rank: int, world: int) -> None:
    """Make this process rank `rank` of the process group. `address`: where rank 0 is to listen, without a file."""
    timeout = timedelta(seconds=config.timeout_s)
    if config.store is not None:
        os.environ.update(_interface("lo"))
        store: Store = FileStore(config.store, world)
    else:
        assert address is not None
        for name, value in _interface(interface_of(ray.util.get_node_ip_address())).items():
            os.environ.setdefault(name, value)  # a cluster may have a faster network for NCCL
        store = _tcp_store(address, rank, world, timeout)
    # As Ray Train's own set-up does: a collective that times out ends the process.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
    dist.init_process_group(config.backend, store=store, rank=rank, world_size=world, timeout=timeout)


def _interface(name: str) -> dict[str, str]:
    """Variables that make gloo and NCCL use one interface. NCCL takes a name without = for a prefix."""
    return {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": f"={name}"}


def _tcp_store(address: tuple[str, int], rank: int, world: int, timeout: timedelta) -> TCPStore:
    host, port = address
    if rank > 0:
        return TCPStore(host, port, world, is_master=False, timeout=timeout)
    # TCPStore itself would listen on all interfaces, whatever host it is given.
    descriptor = _listener(host, port).detach()
    return TCPStore(
        host, port, world, is_master=True, timeout=timeout, wait_for_workers=False, master_listen_fd=descriptor
    )
