"""Commands of clipmini in processes of their own that are forks of one that has loaded torch: seconds less for each.

Where the start and the end of an interpreter, or what a launcher does, matter, tests start real ones: `runs.start`.
"""

import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from clipmini import cli


def run_forked(
    arguments: Sequence[str], cwd: Path, *, processes: int = 1, timeout: float = 300
) -> subprocess.CompletedProcess:
    """Run `clipmini` in a directory, in several processes with the variables that torchrun sets.

    Returns:
        What all of them have printed, one after the other, and the first exit code that is not 0.
    """
    context = multiprocessing.get_context("forkserver")
    with tempfile.TemporaryDirectory() as outputs:
        started = [
            context.Process(target=_run, args=(list(arguments), cwd, variables, f"{outputs}/{rank}"))
            for rank, variables in enumerate(make_environments(processes))
        ]
        for process in started:
            process.start()
        deadline = time.monotonic() + timeout
        for process in started:
            process.join(max(0, deadline - time.monotonic()))
        late = [process.kill() for process in started if process.is_alive()]
        texts = [
            "".join(Path(f"{outputs}/{rank}.{name}").read_text() for rank in range(processes))
            for name in ("stdout", "stderr")
        ]
    assert not late, f"{arguments} did not end in time: {texts}"
    code = next((process.exitcode for process in started if process.exitcode), 0)
    return subprocess.CompletedProcess(arguments, code, *texts)


def make_environments(processes: int) -> list[dict[str, str]]:
    """Return the variables of each process."""
    common = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    if processes == 1:
        return [common]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    return [common | torchrun_variables(rank, processes, port) for rank in range(processes)]


def torchrun_variables(rank: int, world_size: int, port: str) -> dict[str, str]:
    """Return what torchrun tells a process of one node."""
    size, number = str(world_size), str(rank)
    return {
        **{"MASTER_ADDR": "localhost", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "forked"},
        **{"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "RANK": number, "LOCAL_RANK": number},
        **{"GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1"},
    }


def _run(arguments: list[str], cwd: Path, variables: dict[str, str], output: str) -> None:
    for stream, name in ((sys.stdout, "stdout"), (sys.stderr, "stderr")):
        with open(f"{output}.{name}", "w") as file:
            os.dup2(file.fileno(), stream.fileno())
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(cwd)
    torch.set_num_threads(1)
    multiprocessing.set_start_method(None, force=True)  # workers start as they do from a shell
    try:
        code = cli.main(arguments)
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.exit(code)
