"""The same work on many items, in several processes that end with the main one."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import resource_tracker
from multiprocessing.synchronize import Event
from typing import TypeVar

from clipmini.console import track
from clipmini.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")


class Stopped(Exception):
    """The main process wants no more of this."""


def count_cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_in_processes(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    *,
    description: str,
    num_workers: int | None = None,
    preload: Sequence[str] = (),
) -> Iterator[Result]:
    """Yield function(item) of each item, in order, with a bar on a terminal.

    Args:
        function: of a module; long ones call `check_stopped` now and then, so that Ctrl-C need not wait for them.
        description: for the bar.
        num_workers: processes; None takes all cores.
        preload: modules that are loaded once and not by each process.

    Raises:
        UserError: a process was killed.
    """
    num_workers = min(num_workers or count_cores(), len(items))
    if not items:
        return
    context = multiprocessing.get_context("forkserver")  # the main process may hold threads and a GPU
    context.set_forkserver_preload(list(preload))
    stop = context.Event()
    try:
        with ProcessPoolExecutor(num_workers, context, start_worker, (stop,)) as executor:
            try:
                with hold_ctrl_c():
                    futures = [executor.submit(function, item) for item in items]
                yield from track((future.result() for future in futures), len(futures), description)
            except BaseException:
                stop.set()
                executor.shutdown(cancel_futures=True)
                raise
    except (BrokenProcessPool, MemoryError) as error:
        raise UserError(
            f"{description}: one of {num_workers} processes was killed or ran out of memory; the same command tries "
            "again, with fewer processes (num_workers) it needs less"
        ) from error


@contextlib.contextmanager
def hold_ctrl_c() -> Iterator[None]:
    """Let Ctrl-C wait while processes are started: one that is started by half prints a traceback, or is waited for."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: held.append(number))
    resource_tracker.ensure_running()  # it would unblock the signal
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # what is started from here on inherits that
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, before)
        if held:
            raise KeyboardInterrupt


_stop: Event | None = None  # of a worker process


def start_worker(stop: Event) -> None:
    """Prepare a worker process."""
    global _stop
    _stop = stop
    leave_signals_to_main()
    threading.Thread(target=die_with_parent, daemon=True).start()


def leave_signals_to_main(_: int = 0) -> None:
    """Ignore what a terminal or a scheduler sends to all processes of a job: the main one decides what it means.

    As it is, a `worker_init_fn` of torch's DataLoader, which passes the number of the worker.

    A loader's worker that died would take the step down with it that the main process still wants to end.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def die_with_parent() -> None:
    """End this process when the main one was killed: it would wait for more work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def check_stopped() -> None:
    """End the work on an item when the main process wants no more.

    Raises:
        Stopped: it does not.
    """
    if _stop is not None and _stop.is_set():
        raise Stopped
