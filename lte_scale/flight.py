"""Exchanges between nodes under way beside the training."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor


class Flight:
    """Jobs run one after another in a thread of their own, on an accelerator in a stream of their own.

    Their collectives must be in process groups that nobody else uses meanwhile (`Collectives.aside`), and what they
    read must not change until they have arrived.
    """

    def __init__(self, jobs: list[Callable[[], Tensor]], device: torch.device) -> None:
        self._jobs, self._device = jobs, device
        self._results: list[Tensor] = []
        self._error: BaseException | None = None
        self._ready = torch.cuda.current_stream().record_event() if device.type == "cuda" else None
        # A daemon: a run that ends with an error does not wait for a message that will never come.
        self._thread = threading.Thread(target=self._run, name="merge exchange", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            if self._ready is None:
                self._work()
                return
            stream = torch.cuda.Stream(self._device)
            with torch.cuda.device(self._device), torch.cuda.stream(stream):
                stream.wait_event(self._ready)
                self._work()
                stream.synchronize()  # this thread waits, so that nothing else has to
        except BaseException as error:  # raised where it is waited for
            self._error = error

    @torch.no_grad()
    def _work(self) -> None:
        while self._jobs:  # what a job read is let go when it is done
            self._results.append(self._jobs.pop(0)())

    def arrived(self) -> list[Tensor]:
        """What the jobs found, in their order; waits for it.

        Raises:
            Exception: what a job has raised, as a collective whose peer is gone.
        """
        self._thread.join()
        if self._error is not None:
            raise self._error
        if self._ready is not None:
            for result in self._results:
                result.record_stream(torch.cuda.current_stream())
        return self._results
