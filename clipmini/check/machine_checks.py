"""What the machine has against what a run takes: disk, memory, processes, packages."""

import importlib.util
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import nn

from clipmini.check.findings import Findings
from clipmini.checkpoints.disk import list_checkpoints
from clipmini.data.loader import ImageTextData
from clipmini.data.remote import is_remote

GIB = 2**30
TIGHT = 0.8  # of what there is
SHARDS_AT_ONCE = 2  # of each stream: the one that is read and the next
LESS_MEMORY = "micro_batch, model.grad_checkpointing=true or a smaller batch_size"  # the keys
SHARED_MEMORY = Path("/dev/shm")


def checkpoint_bytes(parameters: Iterable[nn.Parameter], *, has_average: bool) -> int:
    """Return about how large a checkpoint is: weights, two moments of those that learn, and an average of all."""
    total = 0
    for parameter in parameters:
        copies = 1 + (2 if parameter.requires_grad else 0) + (1 if has_average else 0)
        total += copies * parameter.numel() * parameter.element_size()
    return total


def existing(path: Path) -> Path:
    """Return a directory, or the nearest above it that is there."""
    return path if path.exists() else existing(path.parent)


def check_disk(run: Path, size: int, keep: int, steps_kept: int, findings: Findings) -> None:
    """Compare the checkpoints of a run with the disk.

    Args:
        size: of a checkpoint, bytes.
        keep: how many are there at a time, with the best, if one is kept, and the one that is written.
        steps_kept: how many stay for good.
    """
    directory = existing(run.absolute())
    if not directory.is_dir() or not os.access(directory, os.W_OK):
        what = "cannot be written" if directory.is_dir() else "is a file, not a directory"
        findings.fail("paths.output", f"{directory} {what}: set paths.output")
        return
    need, free = size * (keep + steps_kept), shutil.disk_usage(directory).free
    text = f"{keep + steps_kept} checkpoints of about {tell(size)} need {tell(need)}, and {directory} has {tell(free)}"
    files = (file for path in list_checkpoints(run / "checkpoints") for file in path.rglob("*") if file.is_file())
    if there := sum(file.stat().st_size for file in files):
        text += f" beside those of the run, {tell(there)}"
    keys = "paths.output, checkpoint.keep_last or checkpoint.keep_every_n_steps"
    compare("disk", need, free + there, text, keys, findings)


def compare(name: str, need: int, have: int, text: str, keys: str, findings: Findings) -> None:
    """Say whether there is as much as is needed, and some to spare; if not, which keys may be set."""
    if need > have:
        findings.fail(name, f"{text}: set {keys}")
    elif need > TIGHT * have:
        findings.warn(name, f"{text}: set {keys}")
    else:
        findings.ok(name, text)


def check_cache(data: ImageTextData, streams: int, findings: Findings) -> None:
    """Compare the remote shards in use at a time with the disk of the cache."""
    cache = data.store.cache
    sizes = [s.size for source in data.manifest.sources for s in source.shards if is_remote(s.path) and s.size > 0]
    if not sizes or cache is None:
        return
    need = min(sum(sizes), SHARDS_AT_ONCE * streams * max(sizes))
    free = shutil.disk_usage(existing(Path(cache.directory).absolute())).free
    have = free if cache.max_bytes is None else min(free, cache.max_bytes)
    text = f"shards in use take up to {tell(need)}, and paths.cache={cache.directory} may hold {tell(have)}"
    if need > have:
        findings.warn("cache", f"{text}: they would be fetched again and again: set paths.cache")
    else:
        findings.ok("cache", text)


def check_shared_memory(data: ImageTextData, batch: int, processes: int, findings: Findings) -> None:
    """Compare the batches that loader processes have ready with the memory that they are sent through.

    Args:
        batch: pairs of a process.
        processes: of a node, each with loader processes.
    """
    if not SHARED_MEMORY.is_dir() or data.num_workers == 0:
        return
    of_batch = batch * data.content.num_views * 3 * data.decoder.size**2
    need = of_batch * data.num_workers * data.prefetch_factor * processes
    free = shutil.disk_usage(SHARED_MEMORY).free
    text = f"batches that are ready take {tell(need)}, and {SHARED_MEMORY} has {tell(free)}"
    if need > free:
        findings.fail("shared_memory", f"{text}: raise it (of a container --shm-size), or lower data.num_workers")
    else:
        findings.ok("shared_memory", text)


def check_packages(*, has_jpeg: bool, findings: Findings) -> None:
    """Look for what would make a run faster."""
    if has_jpeg and importlib.util.find_spec("simplejpeg") is None:
        findings.warn("packages", "JPEGs are decoded faster with simplejpeg: pip install 'clipmini[fast]'")


def check_variables(environment: Mapping[str, str], has_launcher: bool, findings: Findings) -> None:
    """Look for variables of a launcher that this process was not started by."""
    tasks = environment.get("SLURM_NTASKS", "1")
    if not has_launcher and "SLURM_JOB_ID" in environment and tasks != "1":
        findings.warn(
            "processes", f"SLURM_NTASKS={tasks}, and this is one process: start the run by srun or torchrun for more"
        )
    if not has_launcher and environment.get("WORLD_SIZE", "1") != "1":
        findings.fail(
            "processes",
            f"WORLD_SIZE={environment['WORLD_SIZE']} without the other variables of torchrun (RANK, LOCAL_RANK, ...): "
            "unset it, or start the run by torchrun",
        )


def check_memory(need: int, processes: int, device: torch.device, findings: Findings, how: str) -> None:
    """Compare the memory that the processes of a node take with what there is.

    Args:
        need: of a process, without its loader processes.
        processes: that share the main memory of a node; each has a GPU of its own.
    """
    if device.type == "cuda":
        have = torch.cuda.mem_get_info(device)[1]
        compare("memory", need, have, f"about {tell(need)} of {tell(have)} of each GPU ({how})", LESS_MEMORY, findings)
        return
    have, all_need, keys = main_memory(), need * processes, LESS_MEMORY
    text = f"about {tell(need)} of each process"
    if processes > 1:
        text, keys = f"{text}, {tell(all_need)} of the {processes} of a node", f"{keys}, or fewer processes on a node"
    compare("memory", all_need, have, f"{text}, of {tell(have)} ({how})", keys, findings)


def main_memory() -> int:
    """Return the memory of this machine, or as much of it as its control group may use, in bytes."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(total, int(text)) if text.isdecimal() else total


def tell(size: float) -> str:
    """Write bytes as GiB, or as MiB where they are few."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 2**20:.0f} MiB"
