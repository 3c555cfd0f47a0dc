"""What is read from the launcher, and what is refused."""

import re
from types import SimpleNamespace

import pytest
import torch
from pytorch_lightning.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment

from clipmini import launch
from clipmini.cluster.fsdp import FullyShardedStrategy
from clipmini.errors import UserError
from clipmini.launch import Launch

ALONE = Launch("none", 1, 1, 0)
# A step of 8 tasks in a job that could have 16, as srun sets it.
STEP = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "n[3-4]"}
STEP |= {"SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "1"}
JOB = {"SLURM_NTASKS": "16", "SLURM_NTASKS_PER_NODE": "8", "SLURM_NNODES": "2", "SLURM_NODELIST": "n[1-4]"}
JOB |= {"SLURM_JOB_NAME": "train", "SLURM_JOB_ID": "70007"}
TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "3", "GROUP_WORLD_SIZE": "2"}
TORCHRUN |= {"RANK": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*STEP, *JOB, *TORCHRUN, "SLURM_PTY_PORT"):
        monkeypatch.setenv(name, "")  # so that what Lightning sets is undone too
        monkeypatch.delenv(name)


def set_environment(monkeypatch: pytest.MonkeyPatch, values: dict[str, str]) -> None:
    for name, value in values.items():
        monkeypatch.setenv(name, value)


def test_no_launcher() -> None:
    assert launch.read_launch() == ALONE
    assert not ALONE.has_launcher and ALONE.num_nodes == 1
    assert isinstance(launch.choose_environment(ALONE), LightningEnvironment)


def test_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    set_environment(monkeypatch, TORCHRUN)
    processes = launch.read_launch()
    assert processes == Launch("torchrun", 6, 3, 4) and processes.num_nodes == 2
    assert isinstance(launch.choose_environment(processes), TorchElasticEnvironment)


def test_torchrun_inside_of_srun_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    set_environment(monkeypatch, {**JOB, **STEP, **TORCHRUN})
    assert launch.read_launch().launcher == "torchrun"


@pytest.mark.parametrize(("world_size", "local"), [("3", "2"), ("3", "1")])
def test_uneven_nodes_of_torchrun_are_refused(world_size: str, local: str, monkeypatch: pytest.MonkeyPatch) -> None:
    set_environment(monkeypatch, {**TORCHRUN, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": local})
    with pytest.raises(UserError, match=f"torchrun made 3 processes on 2 nodes, {local} of them on this one"):
        launch.read_launch()


def test_srun(monkeypatch: pytest.MonkeyPatch) -> None:
    set_environment(monkeypatch, {**JOB, **STEP})
    processes = launch.read_launch()
    assert processes == Launch("srun", 8, 4, 5) and processes.num_nodes == 2
    environment = launch.choose_environment(processes)
    assert isinstance(environment, SLURMEnvironment) and not environment.auto_requeue
    environment.validate_settings(num_devices=4, num_nodes=2)  # whatever the variables of the job say
    assert (environment.world_size(), environment.global_rank(), environment.local_rank()) == (8, 5, 1)
    assert environment.main_address == "n3" and environment.main_port == 15007


def test_steps_and_jobs_have_ports_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    ports = set()
    for job, step in (("70007", "0"), ("70007", "1"), ("70007", "2"), ("70008", "0"), ("70008", "1")):
        set_environment(monkeypatch, {**JOB, **STEP, "SLURM_JOB_ID": job, "SLURM_STEP_ID": step})
        monkeypatch.delenv("MASTER_PORT", raising=False)
        ports.add(launch.choose_environment(launch.read_launch()).main_port)
    assert len(ports) == 5 and all(15000 <= port < 25000 for port in ports)


def test_master_port_and_address_of_the_environment_win(monkeypatch: pytest.MonkeyPatch) -> None:
    set_environment(monkeypatch, {**JOB, **STEP, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "23456"})
    environment = launch.choose_environment(launch.read_launch())
    assert (environment.main_address, environment.main_port) == ("10.0.0.1", 23456)


def test_ntasks_without_ntasks_per_node(monkeypatch: pytest.MonkeyPatch) -> None:
    set_environment(monkeypatch, {**JOB, **STEP})
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE")
    assert launch.choose_environment(launch.read_launch()).world_size() == 8


@pytest.mark.parametrize("layout", ["4(x3),2", "2,1", "1,2,3"])
def test_uneven_nodes_of_srun_are_refused(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    set_environment(monkeypatch, {**JOB, **STEP, "SLURM_STEP_TASKS_PER_NODE": layout})
    with pytest.raises(UserError, match=rf"srun made {re.escape(layout)} tasks on the nodes .* --ntasks-per-node"):
        launch.read_launch()


def test_srun_in_a_shell_of_salloc(monkeypatch: pytest.MonkeyPatch) -> None:
    set_environment(monkeypatch, {**JOB, **STEP, "SLURM_JOB_NAME": "interactive", "SLURM_PTY_PORT": "4567"})
    assert launch.read_launch() == Launch("srun", 8, 4, 5)


@pytest.mark.parametrize("step", [None, "4294967291", "4294967290"], ids=["sbatch", "batch step", "salloc"])
def test_a_script_or_shell_without_srun_is_one_process(step: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    set_environment(monkeypatch, {**JOB, **({"SLURM_STEP_ID": step} if step else {})})
    processes = launch.read_launch()
    assert processes == ALONE
    assert isinstance(launch.choose_environment(processes), LightningEnvironment)


def test_a_shell_of_srun_pty_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    set_environment(monkeypatch, {**JOB, **STEP, "SLURM_PTY_PORT": "4567"})
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    assert launch.read_launch() == ALONE


def test_cores_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "count_cores", lambda: 16)
    assert [Launch("torchrun", 8, ranks, 0).num_cores for ranks in (1, 4, 32)] == [16, 4, 1]
    assert Launch("srun", 8, 4, 0).num_cores == 16  # those that srun gave to this task
    assert ALONE.num_cores == 16


def test_batch_must_split_evenly() -> None:
    launch.check_batch(Launch("torchrun", 3, 3, 0), batch_size=12, micro_batch=4)
    with pytest.raises(UserError, match="batch_size=13: must be a positive multiple of the 3 processes"):
        launch.check_batch(Launch("torchrun", 3, 3, 0), batch_size=13, micro_batch=None)
    for micro_batch in (0, 5):
        with pytest.raises(UserError, match=f"micro_batch={micro_batch}: must be from 1 to the 4 pairs"):
            launch.check_batch(Launch("torchrun", 3, 3, 0), batch_size=12, micro_batch=micro_batch)


def test_config_must_agree_with_the_launcher() -> None:
    two_nodes = Launch("srun", 8, 4, 0)
    launch.check_processes(two_nodes, devices="auto", num_nodes="auto", strategy="ddp")
    launch.check_processes(two_nodes, devices=4, num_nodes=2, strategy="auto")
    with pytest.raises(UserError, match="trainer.devices=8: there are 4 processes a node"):
        launch.check_processes(two_nodes, devices=8, num_nodes="auto", strategy="auto")
    with pytest.raises(UserError, match="trainer.num_nodes=1: there are 2 nodes"):
        launch.check_processes(two_nodes, devices="auto", num_nodes=1, strategy="auto")
    with pytest.raises(UserError, match="trainer.strategy=ddp: several devices need a launcher"):
        launch.check_processes(ALONE, devices="auto", num_nodes="auto", strategy="ddp")


def test_strategy_is_ddp_on_several_processes() -> None:
    assert launch.choose_strategy("auto", ALONE) == "auto"
    assert launch.choose_strategy("auto", Launch("torchrun", 2, 2, 0)) == "ddp"
    strategy = launch.choose_strategy("fsdp", Launch("torchrun", 2, 2, 0))
    assert isinstance(strategy, FullyShardedStrategy)


def test_batch_norm_is_synchronized_where_torch_can() -> None:
    two = Launch("torchrun", 2, 2, 0)
    assert launch.can_synchronize_batch_norm(two, "gpu") and launch.can_synchronize_batch_norm(two, "cuda")
    assert not launch.can_synchronize_batch_norm(two, "cpu") and not launch.can_synchronize_batch_norm(ALONE, "gpu")


@pytest.mark.parametrize(("has_bf16", "expected"), [(True, "bf16-mixed"), (False, "32-true")])
def test_precision_follows_the_device(has_bf16: bool, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bf16)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    assert launch.choose_precision("auto", "cpu") == expected
    assert launch.choose_precision("auto", "gpu") == expected
    assert launch.choose_precision("16-mixed", "cpu") == "16-mixed"
    assert launch.choose_precision("auto", "mps") == "32-true"


def test_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert launch.choose_accelerator("auto") == "cpu"
    with pytest.raises(UserError, match="trainer.accelerator=gpu: torch sees no GPU here"):
        launch.choose_accelerator("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert launch.choose_accelerator("auto") == "gpu"
