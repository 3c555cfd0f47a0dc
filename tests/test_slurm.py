"""Jobs of a real SLURM with two nodes: trained, preempted, signalled, cancelled, swept."""

import os
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import QUICK
from forked import run_forked
from runs import final_state, read_ledgers
from slurm_cluster import JOB, NODES, Cluster, why_not

from clipmini.errors import UserError
from clipmini.launch import Launch, choose_environment, read_launch

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / "scripts/slurm"
STEPS = 60
BATCH = 64


def options(shards: Path, tiny_json: Path, steps: int = STEPS) -> list[str]:
    quick = [option for option in QUICK if option != "trainer=cpu"]  # it would undo trainer=multi_node
    return [
        *quick,
        "trainer.accelerator=cpu",
        "name=run",
        f"steps={steps}",
        f"batch_size={BATCH}",
        f"model.name={tiny_json}",
        f"data.train={shards}",
        "data.ledger=true",
        "data.shuffle_streams=3",
        "data.shuffle_block=8",
        "checkpoint.every_n_steps=1000",  # what there is to go on from was saved because of the signal
        "schedule=constant",
        "optimizer.eps=1e-2",  # so that differences of rounding stay what they are
    ]


@pytest.fixture(scope="module")
def whole(shards: Path, tiny_json: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of one process without SLURM."""
    directory = tmp_path_factory.mktemp("whole")
    result = run_forked(["train", *options(shards, tiny_json)], directory)
    assert result.returncode == 0, result.stderr
    return directory


def check_same(directory: Path, whole: Path) -> None:
    """Compare all samples and the weights of a run with those of the uninterrupted one."""
    rows = read_ledgers(directory)
    assert len(rows) == len(set(rows)) == STEPS * BATCH and rows == read_ledgers(whole)
    weights, loader = final_state(directory)
    expected_weights, expected_loader = final_state(whole)
    assert loader == expected_loader
    torch.testing.assert_close(weights, expected_weights, rtol=1e-4, atol=1e-5)


def output(directory: Path) -> str:
    return "".join(path.read_text() for path in sorted(directory.glob("*.out")))


def wait_for_steps(cluster: Cluster, job: str, directory: Path, steps: int) -> None:
    """Wait until a job has trained some steps on all its processes."""
    ledgers = [directory / f"outputs/run/ledger/rank-0000{rank}.csv" for rank in range(2)]
    deadline = time.monotonic() + 150
    while not all(path.exists() and f"\n{steps}," in path.read_text() for path in ledgers):
        assert time.monotonic() < deadline and cluster.show(job)["JobState"] in ("PENDING", "RUNNING"), output(
            directory
        )
        time.sleep(0.05)


def test_two_nodes_train_what_one_process_does(
    cluster: Cluster, whole: Path, shards: Path, tiny_json: Path, tmp_path: Path
) -> None:
    arguments = options(shards, tiny_json)
    job = cluster.submit(*NODES, str(SCRIPTS / "train.sbatch"), *arguments, cwd=tmp_path, environment=JOB)
    ended = cluster.wait(job)
    assert (ended["JobState"], ended["ExitCode"]) == ("COMPLETED", "0:0"), output(tmp_path)
    assert "device   2 x CPU" in output(tmp_path)
    check_same(tmp_path, whole)


def make_slow_scontrol(directory: Path) -> Path:
    """Make the `scontrol` of a busy cluster, which writes down how it is called, and return its directory."""
    (directory / "bin").mkdir()
    program = directory / "bin/scontrol"
    wait = f'echo "$@" >> {directory}/calls; if [ "$1" = requeue ]; then sleep 3; fi'
    program.write_text(f'#!/bin/sh\n{wait}\nexec {shutil.which("scontrol")} "$@"\n')
    program.chmod(0o755)
    return program.parent


def preempt(cluster: Cluster, job: str, directory: Path) -> None:
    """Have a job of a partition that comes first take both nodes."""
    other = ("--partition=high", "--exclusive", "--nodes=2", "--time=1", "--output=/dev/null", "--wrap=true")
    assert cluster.wait(cluster.submit(*other, cwd=directory, environment={}))["JobState"] == "COMPLETED"


def send(cluster: Cluster, job: str, directory: Path) -> None:
    """Send the signal that comes before the time limit; as then, all steps get it, but not the batch script."""
    cluster.call("scancel", "--signal=USR1", job)


@pytest.mark.parametrize(("script", "interrupt"), [("train", preempt), ("torchrun", send)])
def test_an_interrupted_job_is_queued_again_and_loses_nothing(
    script: str, interrupt, cluster: Cluster, whole: Path, shards: Path, tiny_json: Path, tmp_path: Path
) -> None:
    arguments = options(shards, tiny_json)
    environment = {**JOB, "PATH": f"{make_slow_scontrol(tmp_path)}:{JOB['PATH']}"}
    job = cluster.submit(*NODES, str(SCRIPTS / f"{script}.sbatch"), *arguments, cwd=tmp_path, environment=environment)
    wait_for_steps(cluster, job, tmp_path, 3)
    interrupt(cluster, job, tmp_path)
    ended = cluster.wait(job)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("COMPLETED", "0:0", "1"), output(tmp_path)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [call for call in calls if call.startswith("requeue")] == [f"requeue {job}"]
    assert "resuming from " in output(tmp_path)
    check_same(tmp_path, whole)


def test_a_cancelled_job_does_not_come_back(cluster: Cluster, shards: Path, tiny_json: Path, tmp_path: Path) -> None:
    arguments = options(shards, tiny_json, steps=100_000)
    job = cluster.submit(*NODES, str(SCRIPTS / "train.sbatch"), *arguments, cwd=tmp_path, environment=JOB)
    wait_for_steps(cluster, job, tmp_path, 3)
    cluster.call("scancel", job)
    ended = cluster.wait(job)
    time.sleep(1)
    assert (
        (ended["JobState"], ended["Restarts"])
        == ("CANCELLED", "0")
        == tuple(cluster.show(job)[name] for name in ("JobState", "Restarts"))
    ), output(tmp_path)
    assert not cluster.call("squeue", "--noheader")


def read_task(path: Path) -> tuple[Launch, str, int]:
    """Return what a task, whose variables `env -0` has written, reads from them."""
    variables = dict(line.split("=", 1) for line in path.read_text().split("\0") if line)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "environ", variables)  # to which what it chooses is added
        processes = read_launch()
        environment = choose_environment(processes)
        return processes, environment.main_address, environment.main_port


def test_what_is_read_from_srun(cluster: Cluster, tmp_path: Path) -> None:
    script = """#!/bin/bash
        srun --nodes=1 --ntasks=1 --nodelist=n2 --output=one.%t env -0
        MASTER_PORT=23456 srun --ntasks-per-node=1 --ntasks=2 --output=two.%t env -0
        srun --ntasks=3 --output=three.%t env -0
    """
    (tmp_path / "job.sh").write_text(script)
    size = ("--nodes=2", "--ntasks-per-node=2", "--time=5")
    job = cluster.submit(*size, "--output=out", str(tmp_path / "job.sh"), cwd=tmp_path, environment=JOB)
    assert cluster.wait(job)["JobState"] == "COMPLETED", output(tmp_path)
    # A step of one task in a job of four has an address and a port of its own.
    processes, address, port = read_task(tmp_path / "one.0")
    assert (processes, address) == (Launch("srun", 1, 1, 0), "n2") and 15000 <= port < 25000
    for rank in range(2):
        assert read_task(tmp_path / f"two.{rank}") == (Launch("srun", 2, 1, rank), "n1", 23456)
    for rank in range(3):
        with pytest.raises(UserError, match="srun made 2,1 tasks on the nodes"):
            read_task(tmp_path / f"three.{rank}")


def test_srun_in_an_interactive_allocation_is_a_launcher(cluster: Cluster, tmp_path: Path) -> None:
    write = ("srun", "--output=step.%t", "env", "-0")
    cluster.call("salloc", "--nodes=2", "--time=5", *write, cwd=tmp_path, **JOB)
    for rank in range(2):
        assert read_task(tmp_path / f"step.{rank}")[:2] == (Launch("srun", 2, 1, rank), "n1")


def test_a_sweep_is_submitted_run_by_run(cluster: Cluster, shards: Path, tiny_json: Path, tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="needs clipmini[slurm]")
    launcher = ["hydra/launcher=slurm", "hydra.launcher.cpus_per_task=1", "hydra.launcher.timeout_min=10"]
    launcher += ["trainer=multi_node", "hydra.launcher.nodes=2"]
    sweep = [sys.executable, "-m", "clipmini", "train", "--multirun", *launcher, "seed=0,1"]
    cluster.call(*sweep, *options(shards, tiny_json, steps=2), cwd=tmp_path, **JOB)
    for seed in (0, 1):
        run = tmp_path / f"outputs/run/{seed}"
        assert f"seed: {seed}" in (run / "config.yaml").read_text()
        assert "device   2 x CPU" in (run / "train.log").read_text() and (run / "model").is_dir()
