"""What is read from the launcher, and what is refused."""

import pytest
import torch
from pytorch_lightning.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment

from clipmini import launch
from clipmini.errors import UserError
from clipmini.launch import Launch

ALONE = Launch("none", 1, 1, 0)
SLURM = {"SLURM_NTASKS": "8", "SLURM_NTASKS_PER_NODE": "4", "SLURM_NNODES": "2", "SLURM_PROCID": "5"}
SLURM |= {"SLURM_JOB_NAME": "train", "SLURM_JOB_ID": "7"}


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCHELASTIC_RUN_ID", "SLURM_STEP_ID", "SLURM_NTASKS", "WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def set_environment(monkeypatch: pytest.MonkeyPatch, values: dict[str, str]) -> None:
    for name, value in values.items():
        monkeypatch.setenv(name, value)


def test_no_launcher() -> None:
    assert launch.read_launch() == ALONE
    assert not ALONE.has_launcher and ALONE.num_nodes == 1
    assert isinstance(launch.choose_environment(ALONE), LightningEnvironment)


def test_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "3", "RANK": "4", "LOCAL_RANK": "1"}
    set_environment(monkeypatch, {**names, "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"})
    processes = launch.read_launch()
    assert processes == Launch("torchrun", 6, 3, 4) and processes.num_nodes == 2
    assert isinstance(launch.choose_environment(processes), TorchElasticEnvironment)


def test_srun(monkeypatch: pytest.MonkeyPatch) -> None:
    set_environment(monkeypatch, {**SLURM, "SLURM_STEP_ID": "0"})
    processes = launch.read_launch()
    assert processes == Launch("srun", 8, 4, 5)
    environment = launch.choose_environment(processes)
    assert isinstance(environment, SLURMEnvironment) and not environment.auto_requeue


def test_an_sbatch_script_without_srun_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    set_environment(monkeypatch, SLURM)
    processes = launch.read_launch()
    assert processes == ALONE
    assert isinstance(launch.choose_environment(processes), LightningEnvironment)


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
    assert launch.choose_strategy("fsdp", Launch("torchrun", 2, 2, 0)) == "fsdp"


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
