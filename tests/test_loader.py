"""Batches: the same global batch for any number of ranks and workers, and from any step on."""

import logging
from pathlib import Path

import pytest
import torch
from conftest import make_augmentation, read_sample, write_tar

from clipmini.data.decode import Captions, Decoder
from clipmini.data.loader import BatchPositions, ImageTextData, PairDataset, TrainLoader
from clipmini.data.manifest import read_manifest
from clipmini.data.plan import Plan
from clipmini.data.store import PairFormat, ShardStore
from clipmini.data.tokenizer import ClipTokenizer
from clipmini.errors import UserError


def make_loader(
    directory: Path, *, batch_size: int = 12, num_steps: int = 9, rank: int = 0, world_size: int = 1, workers: int = 0
) -> TrainLoader:
    manifest = read_manifest(str(directory), PairFormat())
    decoder = Decoder(16, make_augmentation(flip=0.5), Captions.from_key("txt"), ClipTokenizer(24), seed=3)
    dataset = PairDataset(manifest, Plan(manifest, 3), ShardStore(PairFormat()), decoder)
    return TrainLoader(
        dataset,
        batch_size=batch_size,
        num_steps=num_steps,
        rank=rank,
        world_size=world_size,
        num_workers=workers,
        padding=None,
        pin_memory=False,
    )


def test_global_batches_do_not_depend_on_ranks_and_workers(shards: Path) -> None:
    expected = list(make_loader(shards))
    assert len(expected) == 9 and len(expected[0]["id"]) == 12
    for world_size, workers in ((1, 1), (1, 3), (2, 0), (3, 0), (4, 1), (6, 0)):
        parts = [
            list(make_loader(shards, rank=rank, world_size=world_size, workers=workers)) for rank in range(world_size)
        ]
        for step, batch in enumerate(expected):
            for name, values in batch.items():
                found = torch.cat([part[step][name] for part in parts])
                assert torch.equal(found, values), (world_size, workers, step, name)


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_at_every_step(workers: int, shards: Path) -> None:
    expected = list(make_loader(shards))
    for done in range(9):
        first = make_loader(shards, workers=workers)
        iterator = iter(first)
        for _ in range(done):
            next(iterator)
        second = make_loader(shards)
        second.load_state_dict(first.state_dict())
        rest = list(second)
        assert len(rest) == 9 - done and len(second) == 9
        for found, batch in zip(rest, expected[done:], strict=True):
            assert all(torch.equal(found[name], batch[name]) for name in batch)


def test_state_is_refused_when_the_shards_are_others(shards: Path, tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", read_sample("train/noto-00000.tar", 20))
    state = make_loader(shards).state_dict()
    assert set(state) == {"samples", "plan"}
    with pytest.raises(UserError, match="other shards, weights or seed"):
        make_loader(tmp_path).load_state_dict(state)


def test_bad_samples_are_replaced_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    samples = read_sample("train/noto-00000.tar", 12)
    samples[3]["webp"] = samples[3]["webp"][:100]
    samples[7]["txt"] = b"  "
    write_tar(tmp_path / "a.tar", samples)
    with caplog.at_level(logging.WARNING):
        batches = list(make_loader(tmp_path, num_steps=1))
    ids = batches[0]["id"].tolist()
    assert len(ids) == 12 and len(set(ids)) == 10  # the neighbours of the two came twice
    for number in (3, 7):
        assert any(samples[number]["__key__"] in message for message in caplog.messages)


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_but_bad_samples_stops(workers: int, tmp_path: Path) -> None:
    samples = read_sample("train/noto-00000.tar", 12)
    for sample in samples:
        sample["webp"] = b"broken"
    write_tar(tmp_path / "a.tar", samples)
    with pytest.raises(UserError, match=r"no usable sample in 12 tries in .*a\.tar") as caught:
        list(make_loader(tmp_path, workers=workers))
    assert "\n" not in str(caught.value)


def test_positions_of_a_rank() -> None:
    positions = BatchPositions(batch_size=6, rank=1, world_size=3, first_step=2, num_steps=4)
    assert list(positions) == [[14, 15], [20, 21]] and len(positions) == 2


def make_data(train: str, **changes: object) -> ImageTextData:
    options = {"caption_key": "txt", "augmentation": make_augmentation(), "num_workers": 0, "batch_size": 8, "seed": 0}
    return ImageTextData(train=train, **{**options, **changes})  # type: ignore[arg-type]


def test_batch_larger_than_the_data(shards: Path) -> None:
    with pytest.raises(UserError, match="batch_size=65 is larger than the data: data.train has 64 pairs"):
        make_data(str(shards), batch_size=65)


def test_negative_workers(shards: Path) -> None:
    with pytest.raises(UserError, match="data.num_workers=-1"):
        make_data(str(shards), num_workers=-1)


def test_captions_in_json_alone(tmp_path: Path) -> None:
    samples = read_sample("train/noto-00000.tar", 8)
    for sample in samples:
        del sample["txt"]
    write_tar(tmp_path / "a.tar", samples)
    assert make_data(str(tmp_path), caption_key="name").manifest.num_samples == 8
    with pytest.raises(UserError, match="no picture-caption pairs"):
        make_data(str(tmp_path))
