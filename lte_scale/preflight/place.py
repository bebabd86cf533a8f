"""This node among the others, by its environment, and the store at node 0 where they meet."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

_POLL_SECONDS = 0.02


class Unreachable(RuntimeError):
    """Nodes cannot meet. One line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Node `node` of `nodes`, each of `ranks` ranks, meeting at address:port. `names` is empty where not known."""

    nodes: int
    node: int
    ranks: int
    address: str
    port: int
    names: tuple[str, ...] = ()

    def name(self, node: int) -> str:
        return self.names[node] if self.names else f"node {node}"


def from_environment(device: str, environ: Mapping[str, str] = os.environ) -> Place:
    """The place of this process from the variables of launchers/torchrun.sh; without them the only node.

    Args:
        device: `train.device`; with "cpu" the GPUs of the node do not count.

    Raises:
        ValueError: naming the variable that is none or contradicts another.
    """
    nodes = _number(environ, "NNODES", 1, 1, 1 << 20)
    names = tuple(environ.get("NODE_NAMES", "").split())
    if names and len(names) != nodes:
        raise ValueError(f"NODE_NAMES: names {len(names)} nodes, NNODES is {nodes}; name every node once, in order")
    gpus = torch.cuda.device_count() if device != "cpu" and not environ.get("NPROC") else 0
    return Place(
        nodes=nodes,
        node=_number(environ, "NODE_RANK", 0, 0, nodes - 1),
        ranks=_number(environ, "NPROC", max(1, gpus), 1, 1 << 10),
        address=environ.get("MASTER_ADDR") or "127.0.0.1",
        port=_number(environ, "MASTER_PORT", 29500, 1, 65535),
        names=names,
    )


def _number(environ: Mapping[str, str], name: str, default: int, least: int, most: int) -> int:
    text = environ.get(name) or str(default)
    if not text.isdecimal() or not least <= int(text) <= most:
        raise ValueError(f"{name}: {text!r}; set it to a whole number from {least} to {most}, or not at all")
    return int(text)


def open_store(place: Place, seconds: float) -> TCPStore:
    """The store of all nodes, which node 0 hosts.

    Raises:
        Unreachable: if node 0 cannot host it, or this node does not reach it within so many seconds.
    """
    timeout = timedelta(seconds=seconds)
    if place.node == 0:
        try:
            return TCPStore("127.0.0.1", place.port, is_master=True, wait_for_workers=False, timeout=timeout)
        except RuntimeError as error:
            raise Unreachable(
                f"cannot listen at MASTER_PORT={place.port} ({first_line(error)}); set another port on all nodes"
            ) from error
    return connect(place.address, place.port, seconds)


def connect(address: str, port: int, seconds: float) -> TCPStore:
    """A client of the store.

    Raises:
        Unreachable: if it is not reached within so many seconds.
    """
    until = time.monotonic() + seconds
    while True:  # TCPStore itself tries again without a word of why
        try:
            socket.create_connection((address, port), timeout=2).close()
            break
        except OSError as error:
            if time.monotonic() > until:
                raise Unreachable(
                    f"cannot reach node 0 at {address}:{port} within {seconds:.0f} s ({error.strerror or error}); "
                    "check MASTER_ADDR and MASTER_PORT, the firewall, and that node 0 runs"
                ) from error
            time.sleep(0.2)
    return TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=seconds))


def wait_for(
    store: TCPStore, keys: list[str], until: float, found: Callable[[str, bytes], None] = lambda key, value: None
) -> list[str]:
    """Take every key as it is set, until the moment `until` of the monotonic clock; returns the keys that were not.

    Looks again and again: a wait of the store's own would hold up Ctrl-C.
    """
    left = list(keys)
    while left:
        for key in [key for key in left if store.check([key])]:
            found(key, store.get(key))
            left.remove(key)
        if time.monotonic() > until:
            break
        if left:
            time.sleep(_POLL_SECONDS)
    return left


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
