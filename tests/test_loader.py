"""Batches: the same for any number of ranks and workers, from any step on, whatever is broken in the shards."""

import io
import multiprocessing
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_cache, make_data, write_tar
from PIL import Image
from servers import serve

from clipmini.data.dataset import Batch
from clipmini.data.loader import TrainLoader, default_num_workers
from clipmini.errors import UserError
from clipmini.lengths import round_up


def load(directory: object, tmp_path: Path, *, rank: int = 0, world_size: int = 1, **changes: Any) -> TrainLoader:
    train = directory if isinstance(directory, dict) else str(directory)
    return make_data(train, make_cache(tmp_path / "cache"), **changes).loader(rank, world_size)


def is_equal(a: Batch, b: Batch) -> bool:
    """Compare batches, whose texts are padded to the longest of each."""
    longest = max(a["text"].shape[1], b["text"].shape[1])
    texts = [torch.nn.functional.pad(x["text"], (0, longest - x["text"].shape[1])) for x in (a, b)]
    lists = all(a[name] == b[name] for name in ("position", "key"))
    return lists and torch.equal(*texts) and all(torch.equal(a[name], b[name]) for name in ("image", "text_id"))


def join(parts: Iterable[Batch]) -> Batch:
    """Put the parts of ranks together."""
    parts = list(parts)
    longest = max(part["text"].shape[1] for part in parts)
    texts = [torch.nn.functional.pad(part["text"], (0, longest - part["text"].shape[1])) for part in parts]
    lists = {name: [item for part in parts for item in part[name]] for name in ("position", "key")}
    return {
        **lists,
        "text": torch.cat(texts),
        **{name: torch.cat([part[name] for part in parts]) for name in ("image", "text_id")},
    }


def test_batches_are_as_described(shards: Path, tmp_path: Path) -> None:
    loader = load(shards, tmp_path, caption_key="name")
    batches = list(loader)
    assert len(batches) == len(loader) == 9 and loader.samples == 9 * 12
    for step, batch in enumerate(batches):
        assert sorted(batch["position"]) == list(range(12 * step, 12 * step + 12))
        assert batch["image"].shape == (12, 3, 16, 16) and batch["image"].dtype == torch.uint8
        assert (
            batch["text"].dtype == batch["text_id"].dtype == torch.int64
            and len(batch["text"]) == len(batch["text_id"]) == 12
        )
        lengths = (batch["text"] != 0).sum(dim=1)
        assert batch["text_length"].tolist() == lengths.tolist()
        assert batch["text"].shape[1] == round_up(int(lengths.max())) < 24  # trimmed
    assert len({key for batch in batches for key in batch["key"]}) == 64


# Which rows a rank takes and how many workers read them are apart from each other: not every pair of the two is tried.
@pytest.mark.parametrize(
    ("world_size", "workers"),
    [*((world_size, 0) for world_size in (1, 2, 3, 4, 6, 8)), (1, 1), (1, 3), (2, 1), (3, 3), (8, 1)],
)
def test_uneven_shards(world_size: int, workers: int, shards: Path, tmp_path: Path) -> None:
    options = {"batch_size": 24, "num_steps": 4}
    expected = list(load(shards, tmp_path, **options))
    loaders = [
        load(shards, tmp_path, rank=rank, world_size=world_size, num_workers=workers, **options)
        for rank in range(world_size)
    ]
    parts = [list(loader) for loader in loaders]
    assert [len(part) for part in parts] == [4] * world_size
    assert len({str(loader.state_dict()) for loader in loaders}) == 1 and loaders[-1].samples == 4 * 24
    for step, batch in enumerate(expected):
        assert is_equal(join(part[step] for part in parts), batch), step


@pytest.mark.parametrize(("workers", "then", "every"), [(0, 0, 1), (2, 0, 3), (0, 1, 3), (3, 2, 3)])
def test_resume_at_any_step_equals_uninterrupted(
    workers: int, then: int, every: int, shards: Path, tmp_path: Path
) -> None:
    expected = list(load(shards, tmp_path))
    for done in range(0, 10, every):
        first = load(shards, tmp_path, num_workers=workers)
        for _, _batch in zip(range(done), first, strict=False):
            pass
        state = first.state_dict()
        assert state == {"samples": 12 * done, "plan": first.dataset.plan.digest()}  # however many workers read ahead
        second = load(shards, tmp_path, num_workers=then)
        second.load_state_dict(state)
        rest = list(second)
        assert len(rest) == 9 - done and len(second) == 9
        assert all(is_equal(*pair) for pair in zip(rest, expected[done:], strict=True))


def test_resume_of_a_mixture(shards: Path, tmp_path: Path) -> None:
    train = {"x": {"shards": f"{shards}/a.tar", "weight": 2}, "y": {"shards": f"{shards}/{{b,c}}.tar", "weight": 1}}
    expected = list(load(train, tmp_path, num_steps=40))
    second = load(train, tmp_path, num_steps=40)
    second.load_state_dict({"samples": 17 * 12, "plan": second.dataset.plan.digest()})
    assert all(is_equal(*pair) for pair in zip(second, expected[17:], strict=True))


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_workers_may_be_started_in_any_way(method: str, shards: Path, tmp_path: Path) -> None:
    batches = list(load(shards, tmp_path, num_steps=4, num_workers=1, start_method=method))
    expected = list(load(shards, tmp_path, num_steps=4))
    assert len(batches) == 4 and all(is_equal(*pair) for pair in zip(batches, expected, strict=True))


def test_state_of_other_shards_is_refused(shards: Path, tmp_path: Path) -> None:
    state = load(shards, tmp_path).state_dict()
    for changes in ({"seed": 4}, {"shuffle_block": 9}):
        with pytest.raises(UserError, match=r"other shards, counts, weights, seed or shuffling \(plan .*, now .*\)"):
            load(shards, tmp_path, **changes).load_state_dict(state)
    with pytest.raises(UserError, match="give back data.train"):
        load(shards / "a.tar", tmp_path).load_state_dict(state)


def test_a_worker_that_is_killed_is_one_message(shards: Path, tmp_path: Path) -> None:
    loader = load(shards, tmp_path, num_workers=2, num_steps=100_000)
    batches = iter(loader)
    next(batches)
    (victim, *_) = multiprocessing.active_children()
    with pytest.raises(UserError, match=r"the data did not come: DataLoader worker \(pid.* \d+\) .*data.num_workers=2"):
        victim.kill()
        for _ in batches:
            pass


def test_a_reader_that_is_stuck_ends_in_a_message(shards: Path, tmp_path: Path) -> None:
    with serve(shards) as server:
        cache = make_cache(tmp_path / "cache", stall_timeout=60.0, fetch_timeout=600.0)
        (tmp_path / "sizes").mkdir()
        data = make_data(f"{server.url}/a.tar", cache, num_workers=1, timeout=3.0)
        cache.path(data.manifest.sources[0].shards[0]).unlink()  # it was fetched to be counted
        server.faults["a.tar"] = ["stall"] * 9
        start = time.monotonic()
        with pytest.raises(UserError, match=r"the data did not come: .*timed out after 3.0 seconds.*data.timeout=3"):
            next(iter(data.loader(0, 1)))
        assert time.monotonic() - start < 60  # a bound, not a measurement
    for worker in multiprocessing.active_children():
        worker.kill()  # as a run does at its end: it leaves SIGTERM to the main process, and waits for a lock


def test_shards_that_are_trained_on_are_not_held_out_under_another_name(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(shards)
    monkeypatch.chdir(shards.parent)
    for val in (shards.name, f"./{shards.name}", str(tmp_path / "link/b.tar"), f"file://{shards}"):
        with pytest.raises(UserError, match=r"data.val: .*[ab].tar is a shard of data.train too"):
            load(shards, tmp_path, val=val)


def test_batch_larger_than_the_data(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="batch_size=65 is larger than the data: data.train has 64 pairs"):
        load(shards, tmp_path, batch_size=65)


def test_workers_by_default_leave_a_core_for_training() -> None:
    assert [default_num_workers(cores) for cores in (1, 2, 4, 8, 16)] == [1, 1, 3, 7, 8]


def test_memory_of_workers_stays_flat(tmp_path: Path) -> None:
    """50,000 samples of ever new captions: what is kept of them would be seen."""
    buffer = io.BytesIO()
    Image.effect_noise((10, 10), 90).save(buffer, "PNG")
    png = buffer.getvalue()
    texts = ({"__key__": f"{n:05d}", "png": png, "txt": f"word{n} other{n * 7}".encode()} for n in range(5000))
    write_tar(tmp_path / "shards/x.tar", list(texts))
    loader = load(tmp_path / "shards", tmp_path, batch_size=250, num_steps=210, num_workers=1, size=8)
    sizes = []
    for step, _ in enumerate(loader):
        if step % 10 == 9:
            (worker,) = multiprocessing.active_children()
            status = Path(f"/proc/{worker.pid}/status").read_text()
            sizes.append(int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))))
    assert len(sizes) == 21
    assert max(sizes[10:]) < 1.02 * max(sizes[:10])
