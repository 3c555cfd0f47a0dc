"""Commands in processes of their own that are forks of one that has loaded torch: seconds less for each.

Where the start and the end of an interpreter, or what a launcher does, matter, tests start real ones: `runs.start`.
"""

import contextlib
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

import torch

from clipmini import cli

Main = Callable[[list[str]], int | None]


class Forked:
    """`clipmini` in one process, or several with the variables that torchrun sets, each in a session of its own.

    They are started at once, and killed, with what they have started, at the end of a `with`.

    Args:
        arguments: the command and what it takes.
        cwd: their directory.
        outputs: for each process the files that its stdout and its stderr are appended to.
        main: of another program, at the top of a module; it is given the arguments, and returns the exit code.
        environment: more variables.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        cwd: Path,
        outputs: Sequence[tuple[Path, Path]],
        *,
        main: Main = cli.main,
        **environment: str,
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        self.processes = [
            context.Process(target=_run, args=(main, list(arguments), cwd, {**variables, **environment}, files))
            for variables, files in zip(make_environments(len(outputs)), outputs, strict=True)
        ]
        for process in self.processes:
            process.start()
        self.pids = [process.pid for process in self.processes if process.pid]

    def __enter__(self) -> "Forked":
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.kill()

    def poll(self) -> list[int] | None:
        """Return the exit codes, by rank, when all have ended."""
        codes = [process.exitcode for process in self.processes]
        return [code for code in codes if code is not None] if None not in codes else None

    def wait(self, timeout: float) -> list[int]:
        """Wait until all have ended, and return the exit codes by rank; they are killed if that takes too long."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0, deadline - time.monotonic()))
        codes = self.poll()
        if codes is None:
            self.kill()
            raise TimeoutError(f"processes did not end within {timeout} seconds")
        return codes

    def send_to_groups(self, number: int) -> None:
        """Send a signal to all and to what they have started, as a terminal and a scheduler do."""
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, number)

    def kill(self) -> None:
        """Kill all, and what they have started."""
        self.send_to_groups(signal.SIGKILL)
        for process in self.processes:
            process.kill()  # one that leads no group yet, too
            process.join()


def run_forked(
    arguments: Sequence[str], cwd: Path, *, processes: int = 1, timeout: float = 300, main: Main = cli.main
) -> subprocess.CompletedProcess:
    """Run `clipmini` in a directory, in several processes with the variables that torchrun sets.

    Args:
        main: see `Forked`.

    Returns:
        What all of them have printed, one after the other, and the first exit code that is not 0.
    """
    with tempfile.TemporaryDirectory() as scratch:
        outputs = [(Path(f"{scratch}/{rank}.stdout"), Path(f"{scratch}/{rank}.stderr")) for rank in range(processes)]
        with Forked(arguments, cwd, outputs, main=main) as started:
            codes = started.wait(timeout)
        stdout, stderr = ("".join(path.read_text() for path in paths) for paths in zip(*outputs, strict=True))
    return subprocess.CompletedProcess(arguments, next((code for code in codes if code), 0), stdout, stderr)


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


def _run(main: Main, arguments: list[str], cwd: Path, variables: dict[str, str], outputs: tuple[Path, Path]) -> None:
    os.setsid()
    # Shells have what they start in the background ignore Ctrl-C, and these tests may be.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream, path in zip((sys.stdout, sys.stderr), outputs, strict=True):
        with open(path, "a") as file:
            os.dup2(file.fileno(), stream.fileno())
    os.environ.clear()
    os.environ.update(variables)
    sys.path[:0] = filter(None, variables.get("PYTHONPATH", "").split(os.pathsep))  # as an interpreter does
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
