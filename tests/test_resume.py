"""Whole runs that are killed, moved to other numbers of processes, or cut off from their shards: the same training."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import read_sample, write_tar
from forked import run_forked
from runs import (
    STEPS,
    children,
    final_state,
    last_checkpoint,
    options,
    output,
    read_ledgers,
    read_losses,
    run,
    start_forked,
    wait_for_steps,
)
from servers import S3, upload

# Of the run below, on a Xeon with AMX.
GOLDEN_LOSSES = [4.1088, 3.0074, 3.1832, 2.8655, 2.8750, 2.8902, 2.8613, 2.8025, 2.7867, 2.8253, 2.7724, 2.7786]


@pytest.fixture(scope="module")
def whole(shards: Path, tiny_json: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of one process without workers."""
    directory = tmp_path_factory.mktemp("whole")
    run(directory, 1, options(tiny_json, shards))
    return directory


def test_resume_other_world_size(whole: Path, shards: Path, tiny_json: Path, tmp_path: Path) -> None:
    parts = (
        (2, "steps=4", "data.num_workers=1", "micro_batch=4"),  # a checkpoint in the middle of an epoch of 64
        (1, "steps=8", "data.num_workers=3", "micro_batch=16"),  # and one at the end of the second
        (2, f"steps={STEPS}", "data.num_workers=0", "micro_batch=2"),
    )
    for processes, *more in parts:
        run(tmp_path / "parts", processes, options(tiny_json, shards, *more))
    assert read_ledgers(tmp_path / "parts") == read_ledgers(whole)
    assert len(read_ledgers(whole)) == STEPS * 16 == len(set(read_ledgers(whole)))
    assert read_losses(tmp_path / "parts") == pytest.approx(read_losses(whole), abs=1e-5)
    weights, loader = final_state(tmp_path / "parts")
    expected_weights, expected_loader = final_state(whole)
    assert loader == expected_loader and loader["samples"] == STEPS * 16
    torch.testing.assert_close(weights, expected_weights, rtol=1e-4, atol=1e-5)


def is_same(a: Any, b: Any) -> bool:
    """Compare nested data to the last bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(is_same(value, b[name]) for name, value in a.items())
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(is_same, a, b))
    return a == b


@pytest.mark.parametrize(
    ("processes", "workers", "micro_batch"), [(1, 0, "4"), (1, 2, "null"), (2, 0, "null"), (2, 2, "4")]
)
def test_resume_parity(
    processes: int, workers: int, micro_batch: str, shards: Path, tiny_json: Path, tmp_path: Path
) -> None:
    given = options(
        tiny_json,
        shards,
        f"data.num_workers={workers}",
        f"micro_batch={micro_batch}",
        "model.patch_dropout=0.5",  # draws random numbers in each step
        "ema.decay=0.9",
        "ema.warmup=true",
        "bad_steps.skip_spikes=true",
        "bad_steps.window=3",
        "schedule=cosine",
        "schedule.warmup_steps=3",
        "schedule.warmup_fraction=0.9",
        "checkpoint.every_n_steps=3",
        "checkpoint.keep_last=9",
    )
    run(tmp_path / "whole", processes, given)
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    for step in (6, 9, 12):  # as if it had been killed in the middle of the second epoch of 64, after step 3
        shutil.rmtree(tmp_path / f"parts/outputs/run/checkpoints/step-{step:08d}.ckpt")
    run(tmp_path / "parts", processes, given)
    whole, parts = (last_checkpoint(tmp_path / name) for name in ("whole", "parts"))
    for name in ("state_dict", "optimizer_states", "lr_schedulers", "average", "average_updates", "random_states"):
        assert is_same(parts[name], whole[name]), name
    assert parts["about"] == whole["about"] and whole["average_updates"] > 9
    assert read_losses(tmp_path / "parts") == read_losses(tmp_path / "whole")
    assert read_ledgers(tmp_path / "parts") == read_ledgers(tmp_path / "whole")


def test_golden_losses(whole: Path, shards: Path, tiny_json: Path, tmp_path: Path) -> None:
    run(tmp_path, 1, options(tiny_json, shards))
    assert read_losses(tmp_path) == read_losses(whole)  # the same machine: the same bits
    assert read_losses(whole) == pytest.approx(GOLDEN_LOSSES, abs=2e-3)  # another one: the same but for rounding


@pytest.mark.parametrize("processes", [1, 2])
def test_sample_ledger(processes: int, whole: Path, shards: Path, tiny_json: Path, tmp_path: Path) -> None:
    directory = tmp_path / "killed"
    directory.mkdir()
    rng = random.Random(time.time_ns())
    arguments = options(tiny_json, shards, "data.num_workers=1", "checkpoint.every_n_steps=3")
    ledger = directory / "outputs/run/ledger/rank-00000.csv"
    for _ in range(2):
        before = len(ledger.read_text().splitlines()) if ledger.exists() else 0
        rows = before + rng.randrange(1, 40)
        deadline = time.monotonic() + 200
        with start_forked(directory, processes, arguments) as process:  # its end kills them all
            while process.poll() is None and not (ledger.exists() and len(ledger.read_text().splitlines()) > rows):
                assert time.monotonic() < deadline
                time.sleep(0.002)
    run(directory, processes, arguments)
    # Rows that a killed run wrote after its last checkpoint are gone: what is left is what the model has seen.
    assert read_ledgers(directory) == read_ledgers(whole)
    assert read_losses(directory)[-1] == pytest.approx(read_losses(whole)[-1], abs=1e-5)


def test_a_worker_that_is_killed_ends_the_run_in_one_message(shards: Path, tiny_json: Path, tmp_path: Path) -> None:
    arguments = options(tiny_json, shards, "data.num_workers=1", "steps=100000", "checkpoint.every_n_steps=5")
    with start_forked(tmp_path, 1, arguments) as process:
        wait_for_steps(tmp_path, process, 5)
        pids = children(process.pids[0])
        worker = next(pid for pid in pids if Path(f"/proc/{pid}/comm").read_text().startswith("pt_data"))
        os.kill(worker, signal.SIGKILL)
        assert process.wait(timeout=200) == [2], output(tmp_path)
    text = output(tmp_path)
    assert "clipmini: the data did not come: DataLoader worker" in text and "the same command goes on" in text
    assert "Traceback" not in text


def test_s3_is_read_resumed_and_waited_for(s3: S3, tiny_json: Path, tmp_path: Path) -> None:
    samples = read_sample("train/noto-00000.tar", 480)
    for number in range(24):
        write_tar(tmp_path / f"shards/{number:05d}.tar", samples[20 * number : 20 * number + 20])
    upload(s3, tmp_path / "shards")
    slow_and_small = ("data.shuffle_streams=2", "data.shuffle_block=20", "steps=36")  # new shards all the way
    run(tmp_path / "local", 1, options(tiny_json, tmp_path / "shards", *slow_and_small))
    arguments = options(
        tiny_json,
        "s3://bucket/",
        *slow_and_small,
        f"data.cache.storage_options={{s3:{{endpoint_url:'{s3.url}'}}}}",
        "data.cache.stall_timeout=2",
        "data.cache.max_bytes=500000",  # an eighth of what there is
        f"paths.cache={tmp_path}/cache",
        "data.num_workers=1",
    )
    run(tmp_path / "run", 1, [*arguments, "steps=3"])
    with start_forked(tmp_path / "run", 1, arguments) as process:
        wait_for_steps(tmp_path / "run", process, 5)
        s3.pause()
        time.sleep(6)
        s3.go_on()
        assert process.wait(timeout=200) == [0], output(tmp_path / "run")
    assert "trying again in" in output(tmp_path / "run")  # the outage was met
    assert read_ledgers(tmp_path / "run") == read_ledgers(tmp_path / "local")
    assert read_losses(tmp_path / "run") == pytest.approx(read_losses(tmp_path / "local"), abs=1e-5)
    assert sum(path.stat().st_size for path in tmp_path.glob("cache/shards/*.tar")) <= 500_000


def test_s3_without_the_bucket_is_one_message(s3: S3, tiny_json: Path, tmp_path: Path) -> None:
    storage = f"data.cache.storage_options={{s3:{{endpoint_url:'{s3.url}'}}}}"
    arguments = options(tiny_json, "s3://nowhere/a.tar", storage, f"paths.cache={tmp_path}/cache")
    result = run_forked(["train", *arguments], tmp_path)
    assert result.returncode == 2 and "Traceback" not in result.stdout + result.stderr
    assert result.stderr.startswith("clipmini: data.train=s3://nowhere/a.tar: ") and result.stderr.count("\n") == 1


def test_several_processes_list_the_bad_samples_of_one(tiny_json: Path, tmp_path: Path) -> None:
    samples = read_sample("train/noto-00000.tar", 60)
    for number in (3, 17, 41):
        samples[number]["webp"] = b""
    write_tar(tmp_path / "shards/a.tar", samples)
    listed = []
    for processes in (1, 2):
        directory = tmp_path / str(processes)
        run(directory, processes, options(tiny_json, tmp_path / "shards", "trainer.log_every_n_steps=3"))
        lines = (directory / "outputs/run/quarantine.jsonl").read_text().splitlines()
        listed.append(sorted((json.loads(line)["position"], json.loads(line)["key"]) for line in lines))
    assert listed[0] == listed[1] and len(listed[0]) >= 9


def test_too_many_bad_samples_stop_all_processes_at_one_step(tiny_json: Path, tmp_path: Path) -> None:
    samples = read_sample("train/noto-00000.tar", 60)
    for sample in samples[::3]:
        sample["txt"] = b""
    write_tar(tmp_path / "shards/a.tar", samples)
    arguments = options(tiny_json, tmp_path / "shards", "data.max_bad_fraction=0.001", "steps=200")
    result = run_forked(["train", *arguments], tmp_path, processes=2)
    assert result.returncode == 2
    assert result.stderr.count("of the last 10000 samples cannot be used") == 2  # each says so itself, none was killed
