"""Passes through a block that wait at its steps, so that no matrix is passed twice.

A forward pass cannot be left in the middle and taken up again, but a thread can wait: every batch has one,
and only one of them, or their owner, ever runs. Memory: what a pass holds where it waits, for every batch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch

from compressor.model.listen import Ears, Enough, Heard, Layout, Listening, check_heard

Wanted = TypeVar("Wanted")

# Passes that wait at once, and threads of the system that they may keep: each has its own team of OpenMP's.
_MOST_PASSES = 64
_MOST_THREADS = 512


def most_waiting() -> int:
    """How many passes may wait at once."""
    return min(_MOST_PASSES, max(1, _MOST_THREADS // torch.get_num_threads()))


class PausedPasses(Generic[Wanted]):
    """The passes of all batches through one block.

    Args:
        ears: of the block; put up here, until ``close``.
        layout: the block's.
        run: the output of the block for a batch.
        heard: what ears are told of what somebody wants to hear.
    """

    def __init__(
        self,
        ears: Ears,
        layout: Layout,
        run: Callable[[int], torch.Tensor],
        heard: Callable[[Wanted | None], Heard],
    ) -> None:
        self._ears = ears
        self._layout = layout
        self._run = run
        self._heard = heard
        self._passes: dict[int, _Pass] = {}
        ears.__enter__()

    def go_on(self, batch: int, until: int | None = None, hear: Wanted | None = None) -> torch.Tensor | None:
        """Computes until a step was heard, or with None to the end, for the output.

        Steps may be left out, but none can come again. A matrix counts as it is when the pass comes to it;
        those of the step are still to come.

        Raises:
            CheckpointError: a layer that the rehearsal used was not used now.
        """
        going = self._passes.get(batch)
        if going is None:
            going = self._passes[batch] = _Pass(lambda: self._run(batch))
        self._ears.listening = going.listening or Listening(self._layout, going.tell, until, going.wait)
        going.listening = self._ears.listening
        return going.go_on(until, self._heard(hear))

    def close(self) -> None:
        """Leaves the block."""
        for going in self._passes.values():
            going.stop()
        self._passes = {}
        self._ears.__exit__()


class _Pass:
    """One batch on its way."""

    def __init__(self, run: Callable[[], torch.Tensor]) -> None:
        self.listening: Listening | None = None
        self._run = run
        self._until: int | None = None
        self._heard: Heard = _nothing
        self._output: torch.Tensor | None = None
        self._fault: BaseException | None = None
        self._stopped = self._over = False
        self._may_go, self._has_stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._threads = torch.get_num_threads()
        self._thread = threading.Thread(target=self._work, name="paused-pass", daemon=True)
        self._thread.start()

    def go_on(self, until: int | None, heard: Heard) -> torch.Tensor | None:
        assert not self._over, "the pass has come to its end"
        self._until, self._heard = until, heard
        self._may_go.release()
        self._has_stopped.acquire()
        if self._fault is not None:
            raise self._fault
        return self._output

    def stop(self) -> None:
        self._stopped = True
        self._may_go.release()
        self._thread.join()

    def tell(self, *heard: Any) -> None:
        self._heard(*heard)

    def wait(self) -> int | None:
        """Lets the owner run until it says how far to go on."""
        self._has_stopped.release()
        self._may_go.acquire()
        if self._stopped:
            raise Enough
        return self._until

    def _work(self) -> None:
        torch.set_num_threads(self._threads)  # each thread has its own number of OpenMP's
        try:
            self._may_go.acquire()
            if self._stopped:
                return
            assert self.listening is not None
            with torch.no_grad(), self.listening.routers():
                self._output = self._run()
            check_heard(self.listening)
        except Enough:
            pass
        except BaseException as fault:
            self._fault = fault
        self._over = True
        self._has_stopped.release()


def _nothing(*_: object) -> None:
    pass
