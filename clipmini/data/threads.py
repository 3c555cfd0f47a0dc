"""Actions in threads that can be given up: after some time, when nothing moves, or when the process ends."""

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Stalled(Exception):
    """Nothing came for too long."""


class Task:
    """Something that runs on its own: `done` is set at its end, `error` if it failed, `stop` gives it up."""

    def __init__(self, stop: Callable[[], None] = lambda: None) -> None:
        self.done = threading.Event()
        self.error: BaseException | None = None
        self.value: Any = None
        self.stop = stop

    def run(self, action: Callable[[], Any]) -> None:
        """Do it, and keep what comes of it."""
        try:
            self.value = action()
        except BaseException as error:  # it is raised where the task is waited for
            self.error = error
        self.done.set()

    def result(self) -> Any:
        """Wait, and return or raise what came of it."""
        self.done.wait()
        if self.error:
            raise self.error
        return self.value


def in_thread(action: Callable[[], Any], stop: Callable[[], None] = lambda: None, *, can_be_left: bool = True) -> Task:
    """Start an action in a thread.

    Args:
        can_be_left: it does not keep the process from ending; one that is in torch's code just then would abort it.
    """
    task = Task(stop)
    threading.Thread(target=task.run, args=(action,), daemon=can_be_left).start()
    return task


def within(seconds: float, action: Callable[[], Result], key: str) -> Result:
    """Do something that must not take longer.

    Args:
        key: that holds `stall_timeout` and `fetch_timeout`, for messages.

    Raises:
        Stalled: it did.
    """
    task = in_thread(action)
    if not task.done.wait(max(seconds, 0)):
        raise Stalled(f"no answer for {seconds:.0f} seconds ({key}.stall_timeout, {key}.fetch_timeout)")
    return task.result()


def watch(target: Path, task: Task, *, stall_timeout: float, deadline: float, key: str) -> None:
    """Wait for a task while its file grows.

    Args:
        stall_timeout: seconds without growth.
        deadline: on the monotonic clock.
        key: see `within`.

    Raises:
        Stalled: it did not grow for too long, or was not done in time.
    """
    size, changed = -1, time.monotonic()
    while not task.done.wait(0.05):
        now, found = time.monotonic(), target.stat().st_size if target.exists() else -1
        if found != size:
            size, changed = found, now
        if now - changed > stall_timeout:
            task.stop()
            raise Stalled(f"no byte for {stall_timeout:g} seconds ({key}.stall_timeout)")
        if now > deadline:
            task.stop()
            raise Stalled(f"only {max(size, 0)} bytes came in time ({key}.fetch_timeout)")
    task.result()


def map_in_threads(function: Callable[[Item], Result], items: Sequence[Item], num_threads: int) -> Iterator[Result]:
    """Yield function(item) of each item, in order; when it is given up, nothing that still runs is waited for."""
    tasks = [Task() for _ in items]
    waiting: queue.SimpleQueue[tuple[Task, Item]] = queue.SimpleQueue()
    for task, item in zip(tasks, items, strict=True):
        waiting.put((task, item))
    stopped = threading.Event()

    def work() -> None:
        while not stopped.is_set():
            try:
                task, item = waiting.get_nowait()
            except queue.Empty:
                return
            task.run(lambda item=item: function(item))  # type: ignore[misc]

    for _ in range(min(num_threads, len(items))):
        threading.Thread(target=work, daemon=True).start()
    try:
        for task in tasks:
            yield task.result()
    finally:
        stopped.set()
