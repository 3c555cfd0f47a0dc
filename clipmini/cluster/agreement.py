"""What any process of a run wants, done by all of them at the same step, without one waiting for another."""

import time
from collections.abc import Callable, Sequence

from clipmini import distributed


class Agreement:
    """Has the processes of a run act on requests at the same step.

    Now and then the requests of all processes are put together: the exchange begins at the end of a step, and its
    result is looked at one step later. It is a few numbers on the CPU, and nothing waits for a GPU. At all other steps
    nothing is sent. When the next exchange begins follows from the time that steps took, which is exchanged as well.

    Args:
        names: of the requests.
        every_seconds: about how often they are exchanged.
    """

    def __init__(self, names: Sequence[str], *, every_seconds: float) -> None:
        self.names = list(names)
        self.every_seconds = every_seconds
        self.wanted: set[str] = set()
        self.exchange: Callable[[], list[int]] | None = None
        self.next_step = 0
        self.last_step: int | None = None
        self.last_time = 0.0

    def want(self, name: str) -> None:
        """Ask for something; it is agreed on once."""
        self.wanted.add(name)

    def at_start(self, step: int) -> set[str]:
        """Return what any process wants before the first step; here they wait for one another."""
        return self.finish(self.begin(step)()) if distributed.is_distributed() else self.take()

    def at_step(self, step: int) -> set[str]:
        """Return what all processes are to do after this step; every process must call it after every step."""
        if not distributed.is_distributed():
            return self.take()
        if self.exchange is not None:
            numbers = self.exchange()
            self.exchange = None
            self.next_step = step + self.steps_between(numbers[-1])
            return self.finish(numbers)
        if step >= self.next_step:
            self.exchange = self.begin(step)
        return set()

    def at_end(self) -> None:
        """Wait for an exchange that has begun."""
        if self.exchange is not None:
            self.exchange()
            self.exchange = None

    def take(self) -> set[str]:
        wanted, self.wanted = self.wanted, set()
        return wanted

    def begin(self, step: int) -> Callable[[], list[int]]:
        now, wanted = time.monotonic(), self.take()
        steps = 0 if self.last_step is None else step - self.last_step
        microseconds = int(1e6 * (now - self.last_time) / steps) if steps else 0
        self.last_step, self.last_time = step, now
        return distributed.begin_all_reduce_max([*(int(name in wanted) for name in self.names), microseconds])

    def finish(self, numbers: Sequence[int]) -> set[str]:
        return {name for name, is_wanted in zip(self.names, numbers, strict=False) if is_wanted}

    def steps_between(self, microseconds: int) -> int:
        """Return after how many steps the next exchange begins, given the time of a step."""
        return max(1, int(1e6 * self.every_seconds / microseconds)) if microseconds else 1
