"""Writes checkpoints beside the training: the state is copied, and a thread brings the copy to the disk."""

import copy
import functools
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from pytorch_lightning.plugins.io import CheckpointIO
from torch import Tensor

from clipmini import distributed
from clipmini.checkpoints import disk
from clipmini.data.threads import Task, in_thread

Result = TypeVar("Result")

log = logging.getLogger(__name__)

PARTS_SECONDS_AFTER_AN_ERROR = 20.0  # launchers kill what is left of a run after some 30


class Staging:
    """Copies a state to memory on the CPU that is kept for the next copy: memory that is new costs more than the copy.

    Of a GPU's tensors the copy is pinned, and they are copied side by side.
    """

    def __init__(self) -> None:
        self.buffers: dict[tuple, Tensor] = {}

    def copy(self, state: Any) -> Any:
        """Return a copy of nested dicts, lists and tuples of tensors and plain data; it is good until the next one."""
        copied = self._copy(state, ())
        if any(buffer.is_pinned() for buffer in self.buffers.values()):
            torch.cuda.synchronize()
        return copied

    def _copy(self, value: Any, key: tuple) -> Any:
        if isinstance(value, Tensor):
            return self._copy_tensor(value.detach(), key)
        if isinstance(value, dict):  # also OrderedDict, which need not be one again
            return {name: self._copy(inner, (*key, name)) for name, inner in value.items()}
        if isinstance(value, list | tuple):
            return type(value)([self._copy(inner, (*key, number)) for number, inner in enumerate(value)])
        return copy.deepcopy(value)

    def _copy_tensor(self, tensor: Tensor, key: tuple) -> Tensor:
        buffer = self.buffers.get(key)
        if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
            # In the same layout: fused optimizers go through state and parameter in the order of memory.
            buffer = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            self.buffers[key] = buffer
        return buffer.copy_(tensor, non_blocking=True)


class DurableCheckpointIO(CheckpointIO):
    """Writes one checkpoint at a time, in the background or not, and counts what fails.

    Args:
        background: copy the state and go on training while it is written; costs the state's size in memory.
        retries: how often a write that fails is tried again.
        retry_seconds: how long to wait before that.
        parts_timeout: seconds that the first process waits for the parts of the others, where these write some.
    """

    def __init__(self, *, background: bool, retries: int, retry_seconds: float, parts_timeout: float) -> None:
        self.background = background
        self.retries = retries
        self.retry_seconds = retry_seconds
        self.parts_timeout = parts_timeout
        self.staging = Staging()
        self.task: Task | None = None
        self.path = Path()  # of what it writes
        self.failures = 0
        self.committed: Callable[[], object] = lambda: None  # called after each commit, by the thread that writes

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Take the state as it is now, and begin to write it; what is still being written is waited for first.

        Where each process writes a part, every rank must call it.
        """
        self.wait()
        self.path = Path(path)
        if checkpoint["about"]["parts"] > 1 and (failure := distributed.from_first(self.begin)) is not None:
            self.task = Task()
            self.task.error = failure
            self.task.done.set()
            return
        state = self.staging.copy(checkpoint) if self.background else checkpoint
        write = functools.partial(self.write, state, self.path, distributed.rank())
        self.task = in_thread(write, can_be_left=False)
        if not self.background:
            self.task.done.wait()

    def begin(self) -> OSError | None:
        """Make the directory that all processes write their parts to; return why there is none: all must know it."""
        try:
            self.try_again(self.path, lambda: disk.begin_checkpoint(self.path))
        except OSError as error:
            return error
        return None

    def write(self, state: dict[str, Any], path: Path, rank: int) -> None:
        """Write this process's part; the first one also waits for the others' parts and completes the checkpoint."""
        about = state["about"]
        if about["parts"] == 1:
            self.try_again(path, lambda: disk.begin_checkpoint(path))
        record = self.try_again(path, lambda: disk.write_part(path, rank, state))
        if rank:
            disk.write_record(path, rank, record)
            return
        records = {disk.part_name(0): record} | disk.collect_records(path, about["parts"], lambda: self.parts_timeout)
        self.try_again(path, lambda: disk.commit_checkpoint(path, about, records))
        self.committed()

    def try_again(self, path: Path, action: Callable[[], Result]) -> Result:
        """Do something, some times if it fails with an OSError, as of a full disk; each failure is told and counted."""
        for attempt in range(1, self.retries + 2):
            try:
                return action()
            except OSError as error:
                self.failures += 1
                log.error("%s cannot be written (%d of %d times): %s", path, attempt, self.retries + 1, error)
                last = error
            if attempt <= self.retries:
                time.sleep(self.retry_seconds)
        disk.discard_checkpoint(path)
        raise last

    def take_result(self) -> tuple[Path, BaseException | None] | None:
        """Return once how the last write ended, with an error or without; None if nothing has ended since."""
        if self.task is None or not self.task.done.is_set():
            return None
        task, self.task = self.task, None
        return self.path, task.error

    def hurry(self) -> None:
        """Wait for the parts of other processes, which may be no more, only as long as those that live may need."""
        self.parts_timeout = min(self.parts_timeout, PARTS_SECONDS_AFTER_AN_ERROR)

    def wait(self) -> None:
        """Wait until nothing is being written; how that ended stays for `take_result`."""
        if self.task is not None:
            self.task.done.wait()

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: Any = None) -> dict[str, Any]:
        """Read a checkpoint, which was verified when it was chosen."""
        return disk.load_checkpoint(Path(path), verify=False)

    def remove_checkpoint(self, path: Any) -> None:
        raise NotImplementedError("checkpoints are deleted by `prune`, after the next one is complete")
