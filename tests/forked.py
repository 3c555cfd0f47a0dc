"""Commands in processes of their own that are forks of one that has loaded torch: seconds less for each.

Where the start and the end of an interpreter, or what a launcher does, matter, tests start real ones: `runs.start`.
"""

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from clipmini import cli


def run_forked(
    arguments: Sequence[str],
    cwd: Path,
    *,
    processes: int = 1,
    timeout: float = 300,
    main: Callable[[list[str]], int | None] = cli.main,
) -> subprocess.CompletedProcess:
    """Run `clipmini` in a directory, in several processes with the variables that torchrun sets.

    Args:
        main: of another program, at the top of a module; it is given the arguments, and returns the exit code.

    Returns:
        What all of them have printed, one after the other, and the first exit code that is not 0.
    """
    context = multiprocessing.get_context("forkserver")
    with tempfile.TemporaryDirectory() as outputs:
        started = [
            context.Process(target=_run, args=(main, list(arguments), cwd, variables, f"{outputs}/{rank}"))
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


def run_python(arguments: list[str]) -> None:
    """Do what `python` does with code, or with a script of the project: a `main` of `run_forked`."""
    if arguments[0] == "-c":
        exec(arguments[1], {})
        return
    script = Path(__file__).parent.parent / arguments[0]
    sys.argv = [str(script), *arguments[1:]]
    sys.path.insert(0, str(script.parent))
    runpy.run_path(str(script), run_name="__main__")


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


def _run(
    main: Callable[[list[str]], int | None], arguments: list[str], cwd: Path, variables: dict[str, str], output: str
) -> None:
    for stream, name in ((sys.stdout, "stdout"), (sys.stderr, "stderr")):
        with open(f"{output}.{name}", "w") as file:
            os.dup2(file.fileno(), stream.fileno())
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(cwd)
    torch.set_num_threads(1)
    multiprocessing.set_start_method(None, force=True)  # workers start as they do from a shell
    try:
        code = main(arguments)
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.exit(code)
