"""Loader workers that die at any moment, or have an error of their own."""

import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from clipmini.data import workers
from clipmini.data.workers import read_batches
from clipmini.errors import UserError

# Torch says the second where it looks at its workers before the signal comes.
HOW = r"(is killed by signal: Killed\.|exited unexpectedly)"
LOST = rf"the data did not come: DataLoader worker \(pid.* \d+\) {HOW} \(num_workers=1; .* goes on"


class Numbers(Dataset):
    """Large batches, so that one is in the pipe at almost any time."""

    def __getitem__(self, index: int) -> torch.Tensor:
        if index == 7_777:
            raise RuntimeError("wrong in here")
        return torch.full((1_000,), index)


def load(first: int = 0) -> DataLoader:
    sampler = range(first, 100_000)
    return DataLoader(Numbers(), sampler=sampler, batch_size=None, num_workers=1)  # type: ignore[arg-type]


def test_a_death_is_told_where_a_batch_is_waited_for_and_only_there() -> None:
    batches = read_batches(load(), "num_workers=1")
    assert int(next(batches)[0]) == 0
    (worker,) = multiprocessing.active_children()
    worker.kill()
    deadline = time.monotonic() + 20
    while Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline
    time.sleep(0.1)  # here the signal comes, and nothing is raised
    with pytest.raises(UserError, match=LOST):
        next(batches)
    os.kill(os.getpid(), signal.SIGCHLD)  # nor here
    assert signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL


@pytest.mark.parametrize("delay", [0.0, 0.003, 0.01, 0.03, 0.06])
def test_a_death_at_any_moment_is_one_message(delay: float) -> None:
    batches = read_batches(load(), "num_workers=1")
    next(batches)
    (worker,) = multiprocessing.active_children()
    threading.Timer(delay, worker.kill).start()
    with pytest.raises(UserError, match=LOST):
        list(batches)


def test_an_error_of_the_data_set_stays_what_it_is() -> None:
    with pytest.raises(RuntimeError, match=r"Caught RuntimeError in DataLoader worker(.*\n)*.*wrong in here"):
        list(read_batches(load(7_770), "num_workers=1"))


def test_a_pipe_that_ends_without_a_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    def break_off(_: object) -> None:
        raise ConnectionResetError("Connection reset by peer")

    monkeypatch.setattr(workers, "SIGNAL_SECONDS", 0.1)  # as with a fork server, whose children the workers are
    monkeypatch.setattr(_MultiProcessingDataLoaderIter, "__next__", break_off)
    with pytest.raises(
        UserError, match=r"did not come: DataLoader worker died while it sent a batch \(Connection reset"
    ):
        next(read_batches(load(), "num_workers=1"))
