"""States in shards: taken apart, written by each process, and whole again, bit by bit."""

import functools
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import in_processes
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from clipmini import distributed
from clipmini.cluster.sharding import Rows, cut, merge, own_rows, shard_like, take_local

DTYPES = (torch.float32, torch.bfloat16, torch.int64)
ROWS = (1, 2, 3, 4, 5, 7, 9)


def make_state() -> dict[str, Any]:
    """Make a state like a checkpoint's, with fewer rows than processes, as many, and more."""
    generator = torch.Generator().manual_seed(0)
    weights = {
        f"{rows} {dtype}": torch.randint(-1000, 1000, (rows, 3), generator=generator).to(dtype)
        for rows in ROWS
        for dtype in DTYPES
    }
    state = {number: {"step": torch.tensor(3.0), "exp_avg": value / 7} for number, value in enumerate(weights.values())}
    optimizer = {"state": state, "param_groups": [{"lr": 0.1, "params": [0, 1], "betas": (0.9, 0.98)}]}
    return {"state_dict": {**weights, "scale": torch.tensor(2.5)}, "optimizer_states": [optimizer], "step": 3}


def shard_state(state: Any, mesh: Any) -> Any:
    if isinstance(state, Tensor) and state.ndim:
        return distribute_tensor(state, mesh, [Shard(0)])
    if isinstance(state, dict):
        return {key: shard_state(value, mesh) for key, value in state.items()}
    return [shard_state(value, mesh) for value in state] if isinstance(state, list) else state


def write_part() -> bytes:
    """Return the bytes of this process's file."""
    mesh = init_device_mesh("cpu", (distributed.world_size(),))
    state = shard_state(make_state(), mesh)
    state["replicated"] = distribute_tensor(torch.ones(4), mesh, [Replicate()])
    file = io.BytesIO()
    torch.save(take_local(state).content(distributed.rank()), file)
    with pytest.raises(ValueError, match=r"^a/1: \(Shard\(dim=1\),\) is not \[Shard\(0\)\]"):
        take_local({"a": [0, distribute_tensor(torch.ones(4, 4), mesh, [Shard(1)])]})
    return file.getvalue()


def read_parts(files: list[bytes]) -> list[dict[str, Any]]:
    return [torch.load(io.BytesIO(data), weights_only=True) for data in files]


def assert_same(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert found.keys() == expected.keys()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    return in_processes(3, write_part, tmp_path_factory.mktemp("parts"))


def test_what_three_processes_wrote_is_whole_again(files: list[bytes]) -> None:
    first, second, third = read_parts(files)
    assert len(second["local"]) == 2 * len(ROWS) * len(DTYPES)
    assert [len(part["local"]["state_dict/4 torch.float32"]) for part in (second, third)] == [2, 0]
    found = merge([first, second, third])
    assert torch.equal(found.pop("replicated"), torch.ones(4))
    expected = make_state()
    assert_same(found["state_dict"], expected["state_dict"])
    assert_same(found["optimizer_states"][0]["state"], expected["optimizer_states"][0]["state"])
    assert found["optimizer_states"][0]["param_groups"] == expected["optimizer_states"][0]["param_groups"]
    assert found["step"] == 3 and found.keys() == expected.keys()


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 11])
def test_any_number_of_processes_takes_its_rows(world_size: int, files: list[bytes]) -> None:
    for rank in range(world_size):
        found = merge(read_parts(files), functools.partial(cut, rank=rank, world_size=world_size))
        for name, value in make_state()["state_dict"].items():
            rows = found["state_dict"][name]
            if not value.ndim:
                assert torch.equal(rows, value)
                continue
            chunks = value.chunk(world_size)
            assert torch.equal(rows.rows, chunks[rank] if rank < len(chunks) else value[:0])
            assert rows.shape == value.shape and len(value[own_rows(len(value), rank, world_size)]) == len(rows.rows)


def test_damage_is_told(files: list[bytes]) -> None:
    parts = read_parts(files)
    del parts[2]["local"]["state_dict/5 torch.int64"]
    with pytest.raises(ValueError, match="state_dict/5 torch.int64: the part of rank 2 is missing"):
        merge(parts)
    parts = read_parts(files)
    parts[1]["local"]["state_dict/5 torch.int64"] = torch.zeros(1, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"a part of .*'shape': \[4, 3\].* does not fit .*\[5, 3\]"):
        merge(parts)
    with pytest.raises(ValueError, match=r"does not fit"):
        merge(read_parts(files)[:2])


def test_a_state_without_shards_stays_what_it_is() -> None:
    state = {**make_state(), "pairs": [(1, "a"), None]}
    taken = take_local(state)
    assert not taken.sharded and not taken.local
    found = merge([taken.content(0)])
    assert found["pairs"] == state["pairs"] and found.keys() == state.keys()
    assert_same(found["state_dict"], state["state_dict"])


def cut_like_a_parameter() -> list[bool]:
    """Cut whole tensors and rows like parameters that FSDP2 cuts, and see that they are the same shards."""
    mesh = init_device_mesh("cpu", (distributed.world_size(),))
    same = []
    for rows in ROWS:
        whole = torch.arange(rows * 2.0).view(rows, 2)
        like = distribute_tensor(whole, mesh, [Shard(0)])
        mine = Rows(whole[own_rows(rows, distributed.rank(), distributed.world_size())], whole.shape)
        for found in (shard_like(whole, like), shard_like(mine, like)):
            assert isinstance(found, DTensor) and found.stride() == like.stride()
            same.append(torch.equal(found.to_local(), like.to_local()) and torch.equal(found.full_tensor(), whole))
    other = torch.zeros(3)
    return [*same, shard_like(other, like) is other, shard_like(other, None) is other]


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_whole_tensor_is_cut_like_another(world_size: int, tmp_path: Path) -> None:
    assert all(all(found) for found in in_processes(world_size, cut_like_a_parameter, tmp_path))
