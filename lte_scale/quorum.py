"""Which nodes are there: torchft's lighthouse and managers, for nodes that are jobs of their own and outlive another.

The lighthouse (one small server, `torchft_lighthouse`) knows who is alive. Before a merge the nodes *gather*: those
that are there form a group, and one that has missed merges is told so. Then they add up what they bring, and *agree*
whether that has worked; where a node was lost on the way it has not, and they gather again without it. Every rank has
a group of its own, with the ranks of its local number on the other nodes.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from lte_scale.collectives import Collectives, Group, all_reduce_bytes
from lte_scale.config.checks import lighthouse_address
from lte_scale.config.schema import FaultToleranceConfig

_CONNECT = timedelta(seconds=10)
_FOR_EVER = timedelta(days=1)
"""The others come to a merge when they have trained their window: no time is too long to wait for them."""
_RETRIES = 1_000_000
"""The lighthouse may be started anew; until then its nodes wait."""
_LOOK_EVERY_SECONDS = 0.1


class Interrupted(Exception):
    """This node was told to end while it waited for the others."""


def check_installed() -> None:
    """Raises ValueError with the way to torchft, if it is not there."""
    if importlib.util.find_spec("torchft") is None:
        raise ValueError(
            "fault_tolerance.enabled: needs torchft; install it with: pip install 'lte-scale[fault-tolerance]'"
        )


class Quorum:
    """The nodes that merge together, from one merge to the next.

    Attributes:
        nodes: how many there were at the last merge, this one included.
    """

    def __init__(self, config: FaultToleranceConfig, collectives: Collectives, device: torch.device) -> None:
        """Collective in the node.

        Raises:
            ValueError: if the lighthouse does not answer.
        """
        _silence()
        from torchft.manager import Manager
        from torchft.process_group import ProcessGroupGloo, ProcessGroupNCCL

        self.collectives, self.device, self.nodes = collectives, device, 0
        self._behind = False
        topology = collectives.topology
        self._peers = Group((topology.whole.rank,), "inter_node", None)
        own = self._own_address(config)
        # torchrun's own store outlives a restart of the ranks, and with it the address of a manager that is gone.
        self._store = TCPStore(own, 0, is_master=True, wait_for_workers=False) if topology.local_rank == 0 else None
        store_port = collectives.broadcast_object(self._store.port if self._store else 0)
        timeout = timedelta(seconds=config.timeout_seconds)
        self._group = ProcessGroupNCCL(timeout) if device.type == "cuda" else ProcessGroupGloo(timeout)
        self._manager = Manager(
            pg=self._group,
            load_state_dict=self._has_missed,
            state_dict=dict,
            checkpoint_transport=_Told(),
            min_replica_size=1,
            use_async_quorum=False,
            init_sync=False,  # all nodes draw the same weights
            timeout=timeout,
            quorum_timeout=_FOR_EVER,
            quorum_retries=_RETRIES,
            connect_timeout=_CONNECT,
            rank=topology.local_rank,
            world_size=topology.ranks_per_node,
            store_addr=own,
            store_port=store_port,
            lighthouse_addr=config.lighthouse,
            replica_id=f"node{config.node}",
            hostname=own,
        )

    def _own_address(self, config: FaultToleranceConfig) -> str:
        """This node's address on the network to the lighthouse. Collective in the node."""
        found = refusal = ""
        if self.collectives.topology.local_rank == 0:
            try:
                with socket.create_connection(lighthouse_address(config), _CONNECT.total_seconds()) as probe:
                    found = str(probe.getsockname()[0])
            except OSError as error:
                refusal = f"{config.lighthouse} does not answer ({error}); start torchft_lighthouse there"
        found, refusal = self.collectives.broadcast_object((found, refusal))
        if refusal:
            raise ValueError(f"fault_tolerance.lighthouse: {refusal}")
        return found

    @property
    def merges(self) -> int:
        """Merges so far that nodes have agreed on: of two nodes the one with fewer is healed by the other."""
        return int(self._manager.current_step())

    @merges.setter
    def merges(self, merges: int) -> None:
        self._manager.load_state_dict({"step": merges, "batches_committed": 0})

    def gather(self, interrupted: Callable[[], bool]) -> bool:
        """Wait until all nodes that are alive are there. Collective in the node.

        Args:
            interrupted: asked all the time whether to wait no longer.

        Returns:
            Whether this node has missed merges that others have seen.

        Raises:
            Interrupted: on all ranks of the node, if one of them was to wait no longer. The others go on without it.
        """
        self._behind = stop = False
        failures: list[BaseException] = []
        waiting = threading.Thread(target=self._gather, args=(failures,), daemon=True)
        waiting.start()
        while waiting.is_alive() and not stop:
            stop = interrupted()
            waiting.join(_LOOK_EVERY_SECONDS)
        flag = torch.tensor([int(stop)])
        if self.collectives.all_reduce(flag, self.collectives.node, "control", maximum=True).item():
            self.close()
            raise Interrupted
        if failures:
            raise failures[0]
        self.nodes = int(self._manager.num_participants())
        return self._behind

    def _gather(self, failures: list[BaseException]) -> None:
        if self.device.type == "cuda":  # of this thread
            torch.cuda.set_device(self.device)
        try:
            self._manager.start_quorum()
        except BaseException as error:
            failures.append(error)

    def _has_missed(self, nothing: object) -> None:
        self._behind = True

    def reject(self, reason: str) -> None:
        """Let this merge fail: `agree` will say so."""
        self._manager.report_error(RuntimeError(reason))

    @property
    def failed(self) -> bool:
        """Whether a sum since the gathering has failed on this rank, or the merge was rejected: no sum follows."""
        return self._manager.errored() is not None

    def sum(self, tensor: Tensor, purpose: str) -> Tensor:
        """Sum over the nodes that are there, in place. Whether it has worked is known from `failed` and `agree`."""
        with self.collectives.call(self._peers, purpose, all_reduce_bytes(self.nodes, tensor.nbytes)):
            self._manager.allreduce(tensor, reduce_op=dist.ReduceOp.SUM).wait()
        return tensor

    def agree(self, *, counts: bool) -> bool:
        """Whether all sums since the gathering have worked on all ranks of this node. Collective in the node.

        Args:
            counts: it was a merge: nodes that have missed it are to be healed.
        """
        before = self.merges
        agreed = bool(self._manager.should_commit())
        if agreed and not counts:
            self.merges = before
        return agreed

    def close(self) -> None:
        """Leave the others; they go on."""
        with suppress(Exception):  # a server that has ended already
            self._manager.shutdown(wait=False)
            self._group.shutdown()


class _Told:
    """Stands where torchft would fetch the state of a live node over HTTP, as pickles: here it comes by a sum."""

    def metadata(self) -> str:
        return ""

    def send_checkpoint(self, *_: object, **__: object) -> None:
        """What others miss is not sent here."""

    def recv_checkpoint(self, *, step: int, **_: object) -> dict[str, Any]:
        return {"user": {"default": None}, "torchft": {"step": step, "batches_committed": 0}}

    def disallow_checkpoint(self) -> None:
        """There is none."""

    def shutdown(self, wait: bool = True) -> None:
        """There is no server."""


def _silence() -> None:
    """Keep torchft's own words out of the log, before it is imported: what matters is told by those who call."""
    os.environ.setdefault("RUST_LOG", "error")
    for name in ("torchft", "torchft_quorums", "torchft_commits", "torchft_errors"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
