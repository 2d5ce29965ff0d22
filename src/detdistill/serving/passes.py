"""The teacher's passes for several students: a queue of images, and a thread that joins those of the same canvas."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from detdistill.serving.messages import joined, some_of
from detdistill.structures import Batch, Taught

Said = list[tuple[Taught, ...]]
"""For each image, the knowledge of each kind."""


class Stopping(Exception):
    """The server ends before the images were shown to the teacher."""


@dataclass(eq=False)
class _Waiting:
    """Images of one student that wait for a pass."""

    batch: Batch
    said: Future[Said] = field(default_factory=Future)

    @property
    def kind(self) -> tuple[object, ...]:
        """Images of equal kind can share a pass."""
        large = self.batch.large
        return self.batch.padding_hw, None if large is None else large.padding_hw, self.batch.enlarged


class Passes:
    """Runs the teacher in a thread of its own, with as many waiting images of one canvas in a pass as allowed."""

    def __init__(self, teach: Callable[[Batch], Said], most: int) -> None:
        """Prepare; ``start`` starts the thread.

        Args:
            teach: the teacher's pass on images of one canvas.
            most: largest number of images in a pass.
        """
        self.teach, self.most = teach, most
        self.passes = 0
        """Number of passes so far."""
        self.images = 0
        """Number of images in them."""
        self._queue: deque[_Waiting] = deque()
        self._changed = threading.Condition()
        self._ending = False
        self._thread = threading.Thread(target=self._run, name="teacher", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End after the pass that is running; whoever waits gets ``Stopping``."""
        with self._changed:
            self._ending = True
            left = list(self._queue)
            self._queue.clear()
            self._changed.notify_all()
        for one in left:
            one.said.set_exception(Stopping())
        if self._thread.is_alive():
            self._thread.join()

    def ask(self, batch: Batch) -> list[Future[Said]]:
        """Put images of one canvas into the queue, in parts of at most ``most``; the results come in their order.

        Raises:
            Stopping: the server ends.
        """
        starts = range(0, len(batch), self.most)
        parts = [_Waiting(_some(batch, first, self.most)) for first in starts]
        with self._changed:
            if self._ending:
                raise Stopping
            self._queue.extend(parts)
            self._changed.notify()
        return [part.said for part in parts]

    def _run(self) -> None:
        while chosen := self._next():
            self._pass(chosen)

    def _next(self) -> list[_Waiting]:
        """Wait for images, and take those of the next pass out of the queue; empty: the server ends."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._ending)
            if self._ending:
                return []
            chosen = [self._queue.popleft()]
            count = len(chosen[0].batch)
            for one in list(self._queue):
                if one.kind == chosen[0].kind and count + len(one.batch) <= self.most:
                    self._queue.remove(one)
                    chosen.append(one)
                    count += len(one.batch)
        return chosen

    def _pass(self, chosen: Sequence[_Waiting]) -> None:
        """Run the teacher, and hand the results to those who wait."""
        try:
            said = self.teach(joined([one.batch for one in chosen]))
        except Exception as error:  # whatever the teacher raises on these images; the server goes on
            if len(chosen) > 1:  # it may be the images of one student, so each is asked about alone
                for one in chosen:
                    self._pass([one])
                return
            chosen[0].said.set_exception(error)
            return
        self.passes += 1
        self.images += len(said)
        for one in chosen:
            mine, said = said[: len(one.batch)], said[len(one.batch) :]
            one.said.set_result(mine)


def _some(batch: Batch, first: int, most: int) -> Batch:
    return batch if len(batch) <= most else some_of(batch, range(first, min(first + most, len(batch))))
