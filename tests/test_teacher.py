"""A teacher's features: computed once, those of the very picture and caption, read by any number of processes."""

import csv
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import QUICK, in_processes, make_cache, make_data, read_sample, write_tar
from forked import run_forked
from omegaconf import DictConfig
from safetensors.torch import load_file, save_file
from test_locked_features import read_run
from test_model import make_model, write_json

from clipmini import distributed
from clipmini.cluster import signals
from clipmini.data.decode import EvaluationTransform
from clipmini.data.features import CaptionFeatureStore, FeatureStore, hash_caption
from clipmini.data.health import Fault
from clipmini.data.index import Shard
from clipmini.data.tokenizer import ClipTokenizer
from clipmini.errors import UserError
from clipmini.export.open_clip_directory import export_open_clip
from clipmini.kept_features import fill, take_turn
from clipmini.launch import Launch
from clipmini.model import encode_image, encode_text
from clipmini.train import train

TAUGHT = ("loss.terms.image_teacher=200", "loss.terms.text_teacher=200", "loss.terms.image_text_teacher=1")


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    """Another model, of other pixels and another width."""
    torch.manual_seed(5)
    json_path = write_json(tmp_path / "teacher.json", vision_cfg={"image_size": 48}, text_cfg={"layers": 2})
    content = {**json.loads(Path(json_path).read_text()), "embed_dim": 24}
    Path(json_path).write_text(json.dumps(content))
    export_open_clip(make_model(json_path), tmp_path / "teacher")
    return tmp_path / "teacher"


@pytest.fixture
def options(teacher: Path, tiny_json: Path, tmp_path: Path) -> list[str]:
    """A run with random crops and captions drawn of lists; one picture is none, and one caption has no text."""
    samples = read_sample("train/noto-00000.tar", 40)
    for number, sample in enumerate(samples):
        name = sample["txt"].decode()
        sample["json"] = json.dumps({"captions": [name, name.upper(), f"{name} {number}"]}).encode()
    samples[7]["webp"] = b"no picture"
    samples[9]["json"] = json.dumps({"captions": [" "]}).encode()
    write_tar(tmp_path / "shards/a.tar", samples[:25])
    write_tar(tmp_path / "shards/b.tar", samples[25:])
    given = [*QUICK, "name=run", f"model.name={tiny_json}", "steps=6", "data.ledger=true", "data.caption_key=captions"]
    given += [f"data.train={tmp_path / 'shards'}", f"paths.cache={tmp_path / 'cache'}", f"teacher={teacher}"]
    return [*given, *TAUGHT, "optimizer.lr=1e-2"]


def test_is_the_same_run_with_other_processes(options: list[str], tmp_path: Path) -> None:
    runs = {}
    caches = (tmp_path / "cache", tmp_path / "other")
    for name, processes, more in (
        ("one", 1, ["data.num_workers=0"]),
        ("two", 2, ["data.num_workers=1", "micro_batch=4", f"paths.cache={tmp_path / 'other'}"]),
        ("again", 2, []),
    ):
        (tmp_path / name).mkdir()
        result = run_forked(["train", *options, *more], tmp_path / name, processes=processes)
        assert result.returncode == 0, result.stderr
        for what in ("pictures", "captions"):
            told = f"computing the teacher's features of {what} of 2 of 2 shards"
            assert (told in result.stdout) is (name != "again"), result.stdout
        runs[name] = read_run(tmp_path / name / "outputs/run")
    kept = [{path.relative_to(cache): path.read_bytes() for path in cache.rglob("*.npy")} for cache in caches]
    assert len(kept[0]) == 4 and kept[0] == kept[1]
    losses, ledger, bad = runs["one"]
    assert len(losses) == 6 and losses[-1] < losses[0] and bad
    for name in ("two", "again"):
        assert runs[name][0] == pytest.approx(losses, abs=1e-5) and runs[name][1:] == (ledger, bad)
    with open(tmp_path / "one/outputs/run/metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for name in ("image_teacher", "text_teacher", "image_text_teacher"):
        values = [float(row[f"train/loss_{name}"]) for row in rows]
        assert 0 < values[-1] < values[0], name
    # What a teacher's student exports has nothing of either: open_clip's own loader takes it.
    weights = json.loads((tmp_path / "one/outputs/run/model/open_clip_config.json").read_text())
    assert weights["model_cfg"]["embed_dim"] == 32


@torch.no_grad()
def test_features_are_what_the_teacher_makes(options: list[str], tmp_path: Path) -> None:
    assert run_forked(["train", *options], tmp_path).returncode == 0
    model = make_model(str(tmp_path / "teacher.json"))
    model.load_state_dict(load_file(tmp_path / "teacher/open_clip_model.safetensors"))
    samples = read_sample("train/noto-00000.tar", 25)
    arrays = [np.load(path) for path in (tmp_path / "cache/features").glob("*/*.npy")]
    pictures = next(array for array in arrays if array.dtype == np.float32 and len(array) == 25)
    images = torch.stack(
        [EvaluationTransform(48)(sample["webp"]) for number, sample in enumerate(samples) if number != 7]
    )
    found = np.delete(pictures, 7, axis=0)
    assert np.isnan(pictures[7]).all()
    torch.testing.assert_close(torch.from_numpy(found), encode_image(model, images), rtol=0, atol=1e-6)
    captions = next(array for array in arrays if array.dtype.names and len(array) == 24 * 3)  # one has none
    name = samples[3]["txt"].decode()
    for text in (name, name.upper(), f"{name} 3"):
        (row,) = np.flatnonzero(captions["hash"] == hash_caption(text))
        expected = encode_text(model, ClipTokenizer(24)([text]))[0]
        torch.testing.assert_close(torch.from_numpy(captions["features"][row].copy()), expected, rtol=0, atol=1e-6)


def test_another_number_of_pairs_has_features_of_its_own(options: list[str], tmp_path: Path) -> None:
    alone = [
        *options,
        "loss.terms.image_text=null",
        "loss.terms.text_teacher=null",
        "loss.terms.image_text_teacher=null",
    ]
    samples = [dict(sample) for sample in read_sample("train/noto-00001.tar", 20)]
    for sample in samples[::3]:
        del sample["json"], sample["txt"]  # pictures alone: pairs only where no caption is compared
    write_tar(tmp_path / "shards/a.tar", samples)
    (tmp_path / "shards/b.tar").unlink()
    for given, count in (([*alone, "name=alone"], 20), ([*options, "data.caption_key=txt", "name=pairs"], 13)):
        result = run_forked(["train", *given, "batch_size=8"], tmp_path)
        assert result.returncode == 0, result.stderr
        arrays = [np.load(path) for path in (tmp_path / "cache/features").glob("*/*.npy")]
        assert count in [len(array) for array in arrays if array.dtype == np.float32]


def test_goes_on_with_the_same_teacher_alone(options: list[str], teacher: Path, tmp_path: Path) -> None:
    given = [*options, "data.cached_features=true", "model.lock_image=true", "model.lock_image_unlocked_groups=1"]
    given += ["data.augmentation.scale=[1.0,1.0]", "data.augmentation.ratio=[1.0,1.0]"]
    for steps in (4, 6):
        result = run_forked(["train", *given, f"steps={steps}"], tmp_path)
        assert result.returncode == 0, result.stderr
    assert "resuming from " in result.stdout
    whole = run_forked(["train", *given, "name=whole"], tmp_path)
    assert whole.returncode == 0, whole.stderr
    assert read_run(tmp_path / "outputs/run")[1:] == read_run(tmp_path / "outputs/whole")[1:]
    weights = load_file(teacher / "open_clip_model.safetensors")
    save_file({**weights, "visual.proj": weights["visual.proj"] * 2}, teacher / "open_clip_model.safetensors")
    result = run_forked(["train", *given, "steps=8"], tmp_path)
    assert result.returncode == 2 and "has learned from another teacher" in result.stderr, result.stderr


def test_a_failure_and_a_signal_end_all_processes(options: list[str], tmp_path: Path) -> None:
    first, second = in_processes(2, ends_of_a_process, tmp_path)
    assert first == "ValueError: mine"
    assert second == "ProcessLost: another process of this run could not compute its part of the features"
    (tmp_path / "signal").mkdir()
    assert in_processes(2, ends_of_a_process, tmp_path / "signal", True) == ["Interrupted: "] * 2


def ends_of_a_process(by_signal: bool = False) -> str:
    """Compute one shard on each process, of which the first fails or is asked to stop; say how this one ends."""
    signals.listen()

    def compute(shard: Shard) -> None:
        if distributed.rank() == 0 and by_signal:
            os.kill(os.getpid(), signal.SIGTERM)
        elif distributed.rank() == 0:
            raise ValueError("mine")

    try:
        take_turn(compute, [Shard("a.tar", 3)])
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def test_what_another_run_computes_meanwhile_leaves_no_shard_out(shards: Path, tmp_path: Path) -> None:
    found = in_processes(2, computed_shards, tmp_path, str(shards), str(tmp_path))
    assert sorted(name for names in found for name in names) == ["a.tar", "b.tar", "c.tar"]


def computed_shards(train: str, directory: str) -> list[str]:
    """Have two processes of a node compute what is missing, of which the second sees one shard more done."""
    data, rank, computed = make_data(train, make_cache(Path(directory))), distributed.rank(), []
    store = FeatureStore(Path(directory) / str(rank))
    if rank == 1:
        store.write(data.manifest.sources[0].shards[0], {0: np.ones(2, np.float32)})
    fill(store, data, Launch("torchrun", 2, 2, rank), lambda shard: computed.append(Path(shard.path).name), "them")
    return computed


def test_what_cannot_be_read_is_tried_again(tmp_path: Path) -> None:
    store, of = FeatureStore(tmp_path), Shard("gone.tar", 3)
    store.write(of, {})
    assert store.missing([of]) == [of]
    with pytest.raises(Fault, match="it could not be read when features were computed") as fault:
        store.read(of, 0)
    assert fault.value.cause == "missing_shard"


def test_stores_give_what_they_were_given(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", read_sample("train/noto-00000.tar", 3))
    of = Shard(str(tmp_path / "a.tar"), 3)
    rows = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    captions = CaptionFeatureStore(tmp_path / "captions")
    captions.write(of, dict(zip(("a dog", "A dog", "a cat"), rows, strict=True)))
    assert [captions.read(of, text).tolist() for text in ("a cat", "A dog", "a dog")] == rows[::-1].tolist()
    with pytest.raises(Fault, match="it was not there when its features were computed"):
        captions.read(of, "a  dog")
    pictures = FeatureStore(tmp_path / "pictures")
    pictures.write(of, {0: rows[0], 2: rows[2]})
    assert pictures.read(of, 2).tolist() == rows[2].tolist() and pictures.missing([of]) == []
    with pytest.raises(Fault, match="it could not be used when its features were computed"):
        pictures.read(of, 1)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["teacher=null"], "teacher=null: loss.terms compares with one: set it to a"),
        (["teacher=nothing/here"], "teacher=nothing/here: "),
        (
            [f"loss.terms.{name}=null" for name in ("image_teacher", "text_teacher", "image_text_teacher")],
            "no term of loss.terms compares with it",
        ),
        (
            ["trainer.precision=64-true"],
            "teacher: goes with trainer.precision 32-true, bf16-mixed, 16-mixed, not 64-true",
        ),
        (
            ["loss.temperatures.image_text_teacher=0"],
            "loss.temperatures.image_text_teacher=0: must be above 0, or null",
        ),
    ],
)
def test_what_would_be_wrong_is_told(
    overrides: list[str], message: str, options: list[str], compose: Callable[..., DictConfig], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        train(compose(*options, f"paths.run={tmp_path / 'run'}", *overrides))
    assert not (tmp_path / "run/checkpoints").exists()
