"""A real SLURM of two nodes on this machine, with its state in a directory of its own; the machine's is left alone."""

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

TEMPLATES = Path(__file__).parent / "slurm"
ROOT = Path(__file__).parent.parent
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "sinfo", "unshare")
OVER = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "BOOT_FAIL"}
# As a user gives them to sbatch for nodes without GPUs.
NODES = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=0", "--time=10")
JOB = {
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "PROCESSES_PER_NODE": "1",
}


def why_not() -> str | None:
    """Say why there can be no cluster here, or nothing."""
    if missing := [name for name in PROGRAMS if shutil.which(name) is None]:
        return f"no {', '.join(missing)}: tests/install_packages.sh installs SLURM"
    if os.geteuid() != 0:
        return "only root can start slurmd for two nodes on one machine"
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode:
        return "mounts cannot be made apart here, so n1 and n2 cannot be given addresses"
    return None


class Cluster:
    """A controller and two nodes, n1 and n2, from the start to `stop`.

    Args:
        root: an empty directory; its path must be short, sockets are made in it.

    Raises:
        RuntimeError: the nodes do not come up.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
        self.environment["SLURM_CONF"] = str(root / "slurm.conf")
        self.processes: list[subprocess.Popen] = []
        self.write_files()
        try:
            self.start()
        except BaseException:
            self.stop()
            raise

    def write_files(self) -> None:
        controller_port, port_1, port_2 = free_ports(3)
        text = (TEMPLATES / "slurm.conf").read_text()
        names = {"root": self.root, "controller_port": controller_port, "port_1": port_1, "port_2": port_2}
        for name, value in names.items():
            text = text.replace(f"{{{name}}}", str(value))
        (self.root / "slurm.conf").write_text(text)
        shutil.copy(TEMPLATES / "cgroup.conf", self.root)
        for name in ("state", "spool.n1", "spool.n2"):
            (self.root / name).mkdir()
        (self.root / "hosts").write_text(Path("/etc/hosts").read_text() + "\n127.0.0.1 n1 n2\n")

    def start(self) -> None:
        # What jobs see of /etc/hosts is a file of ours: in mounts of slurmd's own, which end with it.
        in_hosts = 'mount --bind "$0" /etc/hosts && exec "$@"'
        hosts = ["unshare", "--mount", "sh", "-c", in_hosts, str(self.root / "hosts")]
        for command in (
            ["slurmctld", "-D", "-i", "-c"],
            [*hosts, "slurmd", "-D", "-N", "n1"],
            [*hosts, "slurmd", "-D", "-N", "n2"],
        ):
            log = open(self.root / f"start-{len(self.processes)}.log", "w")
            self.processes.append(subprocess.Popen(command, env=self.environment, stdout=log, stderr=log))
            log.close()
        deadline = time.monotonic() + 60
        while self.call("sinfo", "--noheader", "--Node", "--partition=low", "--format=%t", check=False).split() != [
            "idle",
            "idle",
        ]:
            if time.monotonic() > deadline:
                logs = (path.read_text()[-2000:] for path in self.root.glob("*.log"))
                raise RuntimeError("the nodes do not come up:\n" + "\n".join(logs))
            time.sleep(0.2)

    def stop(self) -> None:
        """End all jobs, then the daemons."""
        if all(process.poll() is None for process in self.processes):
            self.call("scancel", "--user=root", check=False)
            self.call("scancel", "--user=root", "--signal=KILL", "--full", check=False)
            deadline = time.monotonic() + 30
            while self.call("squeue", "--noheader", check=False).strip() and time.monotonic() < deadline:
                time.sleep(0.2)
        for process in reversed(self.processes):
            process.terminate()
        for process in self.processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def call(self, *command: str, check: bool = True, cwd: Path | None = None, **environment: str) -> str:
        """Run one of SLURM's commands, or what calls them, and return what it prints."""
        result = subprocess.run(
            command,
            cwd=cwd,
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert not check or result.returncode == 0, result.stderr
        return result.stdout

    def submit(self, *arguments: str, cwd: Path, environment: Mapping[str, str]) -> str:
        """Submit a batch script, and return the number of the job."""
        return self.call("sbatch", "--parsable", *arguments, cwd=cwd, **environment).strip()

    def show(self, job: str) -> dict[str, str]:
        """Return what `scontrol show job` tells."""
        text = self.call("scontrol", "--oneliner", "show", "job", job)
        return dict(re.findall(r"(\S+?)=(\S*)", text))

    def wait(self, job: str, states: Sequence[str] | set[str] = OVER, timeout: float = 240) -> dict[str, str]:
        """Wait until a job is in one of some states, and return what is known of it."""
        deadline = time.monotonic() + timeout
        while (found := self.show(job))["JobState"] not in states:
            assert time.monotonic() < deadline, found
            time.sleep(0.1)
        return found


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens at."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A cluster for the tests of a module."""
    root = Path(tempfile.mkdtemp(prefix="slurm", dir="/tmp"))  # short: it holds sockets
    cluster = Cluster(root)
    yield cluster
    cluster.stop()
    shutil.rmtree(root)
