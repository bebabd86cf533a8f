"""DiLoCo by torchft, with a lighthouse and managers, one of those that `benchmarks/merge.py` compares."""

from __future__ import annotations

import os
import socket
import time
from contextlib import ExitStack
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from merge_methods import Peer, adamw
from torch import nn
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.optim import SGD
from torchft.coordination import LighthouseServer
from torchft.local_sgd import DiLoCo
from torchft.manager import Manager
from torchft.process_group import ProcessGroupGloo

from lte_scale.config import Config
from lte_scale.topology import Topology

# The outer optimizer of the DiLoCo paper (arXiv 2311.08105).
OUTER_LR, OUTER_MOMENTUM = 0.7, 0.9
PATIENCE = timedelta(seconds=600)


class TimedDiLoCo(DiLoCo):
    """Takes the time of what follows an inner step: nothing, or the exchange and the outer step."""

    seconds = 0.0

    def _step_post_hook(self, *words: Any) -> None:
        began = time.perf_counter()
        super()._step_post_hook(*words)
        self.seconds += time.perf_counter() - began


class TorchftDiLoCo(Peer):
    """Every rank a replica with its own AdamW; every `merge.every` steps Nesterov on their mean change, in fp32."""

    def __init__(self, model: nn.Module, config: Config, topology: Topology) -> None:
        self.model, self.optimizer, self.every = model, adamw(model, config), config.merge.every
        own = own_address()
        self.lighthouse, lighthouse_address = shared_lighthouse(own, topology)
        # The store that torchft looks for belongs to a replica: here that is one rank.
        self.store = TCPStore(own, 0, is_master=True, wait_for_workers=False)
        self.manager = Manager(
            pg=ProcessGroupGloo(timeout=PATIENCE),
            load_state_dict=self._load,
            state_dict=self._state,
            min_replica_size=topology.world_size,
            use_async_quorum=False,
            timeout=PATIENCE,
            quorum_timeout=PATIENCE,
            rank=0,
            world_size=1,
            store_addr=own,
            store_port=self.store.port,
            lighthouse_addr=lighthouse_address,
            replica_id=f"rank{topology.rank}",
            hostname=own,
            init_sync=False,  # all ranks draw the same weights
        )
        outer = SGD(model.parameters(), lr=OUTER_LR, momentum=OUTER_MOMENTUM, nesterov=True)
        self.diloco = TimedDiLoCo(self.manager, [model], self.optimizer, outer, sync_every=self.every)
        self.stack = ExitStack()
        self.stack.enter_context(self.diloco)

    def _state(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def _load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])

    @property
    def stalled_seconds(self) -> float:
        return self.diloco.seconds

    def finish(self, steps: int) -> None:
        """Ends torchft's servers. Raises a RuntimeError if outer steps were left out, as torchft does after errors."""
        self.stack.close()
        super().finish(steps)  # the lighthouse, and the stores that others use, must outlast the last exchange
        done = self.manager.current_step()
        self.manager.shutdown(wait=False)
        super().finish(steps)
        if self.lighthouse is not None:
            self.lighthouse.shutdown()
        if done != steps // self.every:
            raise RuntimeError(f"DiLoCo: {done} outer steps in {steps} steps of which every {self.every}th has one")


def own_address() -> str:
    """This node's address on the network to the first node."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])))
        return str(probe.getsockname()[0])


def shared_lighthouse(own: str, topology: Topology) -> tuple[LighthouseServer | None, str]:
    """torchft's lighthouse, which rank 0 runs (None elsewhere), and its address. Collective."""
    server = None
    address = [""]
    if topology.rank == 0:
        server = LighthouseServer(bind="[::]:0", min_replicas=topology.world_size)
        address = [f"http://{own}:{server.address().rpartition(':')[2]}"]
    dist.broadcast_object_list(address, src=0)
    return server, address[0]
