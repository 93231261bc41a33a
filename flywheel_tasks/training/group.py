"""The workers' process group, without a socket that strangers can reach.

Ray Train's own set-up has torch's rendezvous listen on every interface. Here it listens on the address by which Ray
knows the first worker's node, which is the loopback on one machine, and one worker needs none at all.
"""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from typing import Any

import psutil
import ray
import torch.distributed as dist
from ray.train.torch import TorchConfig
from ray.train.torch.config import _set_torch_distributed_env_vars, _TorchBackend

_listening: socket.socket | None = None


class GroupConfig(TorchConfig):
    @property
    def backend_cls(self) -> type[Group]:
        return Group


class Group(_TorchBackend):  # type: ignore[misc]  # Ray ships no types for it
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        workers = len(worker_group)
        address, port = worker_group.execute_single(0, listen) if workers > 1 else ("", 0)
        worker_group.execute(_set_torch_distributed_env_vars)
        ray.get([
            worker_group.execute_single_async(
                rank, join, backend=backend_config.backend, place=rank, workers=workers, address=address, port=port,
                timeout=timedelta(seconds=backend_config.timeout_s),
            )
            for rank in range(workers)
        ])  # fmt: skip


def listen() -> tuple[str, int]:
    """A port of the first worker's, open before anybody is told of it."""
    global _listening
    address = ray.util.get_node_ip_address()
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    _listening = socket.create_server((address, 0), family=family)
    return address, _listening.getsockname()[1]


def join(backend: str, place: int, workers: int, address: str, port: int, timeout: timedelta) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", _interface(ray.util.get_node_ip_address()))
    if workers == 1:
        store: dist.Store = dist.HashStore()
    elif place == 0:
        if _listening is None:
            raise RuntimeError("the first worker was restarted while its process group was made: start again")
        store = dist.TCPStore(
            address, port, workers, is_master=True, timeout=timeout, wait_for_workers=False, use_libuv=True,
            master_listen_fd=_listening.detach(),
        )  # fmt: skip
    else:
        store = dist.TCPStore(address, port, workers, is_master=False, timeout=timeout, use_libuv=True)
    dist.init_process_group(backend, store=store, rank=place, world_size=workers, timeout=timeout)


def _interface(address: str) -> str:
    """Gloo would take the one that the host's name leads to."""
    for name, known in psutil.net_if_addrs().items():
        if any(one.address.partition("%")[0] == address for one in known):
            return name
    raise RuntimeError(f"no network interface of this machine has the address {address} by which Ray knows it")
