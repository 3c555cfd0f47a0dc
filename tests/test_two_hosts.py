"""Two hosts with a network between them that fails: namespaces of this machine, each with an address of its own."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from forked import run_forked
from runs import final_state, options, read_ledgers

PORT = 29500
ADDRESSES = ("10.213.9.1", "10.213.9.2")
STEPS = 30
# Longer than a step takes on a machine with other work to do, and than two processes take to come together.
TIMEOUTS = ("timeouts.step=20", "timeouts.start=120", "data.timeout=15")
START_SECONDS = 120  # also how long they wait for one another around a checkpoint


class Network:
    """Two hosts and the link between them."""

    def __init__(self) -> None:
        self.hosts = [f"clipmini-{os.getpid()}-{number}" for number in range(2)]
        self.devices = [f"cm{os.getpid()}{side}" for side in "ab"]

    def start(self) -> None:
        for host in self.hosts:
            ip("netns", "add", host)
        ip(
            "link",
            "add",
            self.devices[0],
            "netns",
            self.hosts[0],
            *("type", "veth"),
            *("peer", "name", self.devices[1]),
            "netns",
            self.hosts[1],
        )
        for host, device, address in zip(self.hosts, self.devices, ADDRESSES, strict=True):
            ip("-n", host, "address", "add", f"{address}/24", "dev", device)
            ip("-n", host, "link", "set", "lo", "up")
        self.set_link("up")

    def set_link(self, state: str) -> None:
        for host, device in zip(self.hosts, self.devices, strict=True):
            ip("-n", host, "link", "set", device, state)

    def stop(self) -> None:
        for host in self.hosts:
            subprocess.run(["ip", "netns", "delete", host], capture_output=True, check=False)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def network() -> Iterator[Network]:
    network = Network()
    try:
        network.start()
    except (OSError, subprocess.CalledProcessError) as error:
        network.stop()
        pytest.skip(f"network namespaces cannot be made here: {getattr(error, 'stderr', '') or error}")
    yield network
    network.stop()


def start(network: Network, number: int, directory: Path, arguments: list[str]) -> subprocess.Popen:
    """Start torchrun on a host."""
    launcher = ["-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(number), "--nproc-per-node", "1"]
    launcher += ["--master-addr", ADDRESSES[0], "--master-port", str(PORT)]
    return subprocess.Popen(
        [
            "ip",
            "netns",
            "exec",
            network.hosts[number],
            sys.executable,
            *launcher,
            "-m",
            "clipmini",
            "train",
            *arguments,
        ],
        cwd=directory,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": network.devices[number]},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def ended() -> Iterator[list[subprocess.Popen]]:
    """Processes that are ended at the end whatever happens."""
    processes: list[subprocess.Popen] = []
    yield processes
    for process in processes:
        process.terminate()
        try:
            process.communicate(timeout=40)
        except subprocess.TimeoutExpired:
            process.kill()


def test_a_link_that_fails_ends_both_hosts_and_the_run_goes_on_later(
    network: Network, ended: list[subprocess.Popen], shards: Path, tiny_json: Path, tmp_path: Path
) -> None:
    slow = (f"steps={STEPS}", "batch_size=64", "checkpoint.every_n_steps=3", "trainer.log_every_n_steps=5", *TIMEOUTS)
    arguments = options(tiny_json, shards, *slow)
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    result = run_forked(["train", *arguments], tmp_path / "whole")
    assert result.returncode == 0, result.stderr

    hosts = [start(network, number, tmp_path / "parts", arguments) for number in range(2)]
    ended += hosts
    deadline = time.monotonic() + 150
    checkpoints = tmp_path / "parts/outputs/run/checkpoints"
    while not list(checkpoints.glob("step-*")):
        assert time.monotonic() < deadline and all(host.poll() is None for host in hosts)
        time.sleep(0.02)
    network.set_link("down")
    started = time.monotonic()
    for host in hosts:
        _, error = host.communicate(timeout=START_SECONDS + 100)
        assert host.returncode == 1
        assert "clipmini: " in error and "timeouts.step" in error, error
    print(f"both ended {time.monotonic() - started:.0f} s after the link")
    assert len(read_ledgers(tmp_path / "parts")) < STEPS * 64

    result = run_forked(["train", *arguments], tmp_path / "parts", processes=2)  # on one host: the link was the point
    assert result.returncode == 0, result.stderr
    assert "resuming from " in result.stdout and "2 x CPU" in result.stdout
    assert read_ledgers(tmp_path / "parts") == read_ledgers(tmp_path / "whole")
    (weights, _), (expected, _) = final_state(tmp_path / "parts"), final_state(tmp_path / "whole")
    torch.testing.assert_close(weights, expected, rtol=1e-4, atol=1e-5)
