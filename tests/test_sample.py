"""The embedded sample: as built, complete, no class twice, and none of its pictures in both parts."""

import hashlib
import io
import json
from pathlib import Path

import pytest
from conftest import SAMPLE, make_cache, read_sample
from PIL import Image

from clipmini.data.index import PairFormat
from clipmini.data.manifest import read_manifest
from clipmini.evaluation.datasets import open_set
from clipmini.evaluation.entries import SetEntry
from clipmini.evaluation.sets import ClassificationSet

LIMIT = 10_000  # more samples than any shard has


def test_files_are_those_that_were_built() -> None:
    lines = (SAMPLE / "SHA256SUMS").read_text().splitlines()
    expected = {name: digest for digest, name in (line.split("  ") for line in lines)}
    found = {
        str(path.relative_to(SAMPLE)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in SAMPLE.glob("*/**/*.*")
        if path.is_file()
    }
    assert found == expected


@pytest.mark.parametrize("shard", sorted(path.name for path in (SAMPLE / "train").glob("*.tar")))
def test_training_samples(shard: str) -> None:
    for sample in read_sample(f"train/{shard}", LIMIT):
        assert set(sample) == {"__key__", "webp", "txt", "json"}
        metadata = json.loads(sample["json"])
        assert set(metadata) == {"name", "keywords", "code_point", "group", "subgroup"}
        assert metadata["group"] not in ("Flags", "Component")
        assert sample["txt"].decode() == ", ".join([metadata["name"], *metadata["keywords"]])
        assert sample["__key__"] == f"{shard.split('-')[0]}_{metadata['code_point']}"
        assert Image.open(io.BytesIO(sample["webp"])).size == (64, 64)


def test_counts(tmp_path: Path) -> None:
    manifest = read_manifest(str(SAMPLE / "train"), PairFormat(("json", "txt")), make_cache(tmp_path))
    by_style = {"noto": 0, "fluent": 0}
    for shard in manifest.sources[0].shards:
        by_style[shard.path.split("/")[-1].split("-")[0]] += shard.num_samples
    assert by_style == {"noto": 1610, "fluent": 1576}


def test_no_class_appears_twice() -> None:
    (opened,) = open_set(SetEntry(str(SAMPLE / "wds_twemoji")), "datasets")
    dataset = opened.dataset
    assert isinstance(dataset, ClassificationSet)
    assert len(set(dataset.class_names)) == len(dataset.class_names) == len(dataset.pictures) == 1610
    pictures = read_sample("wds_twemoji/test/0.tar", LIMIT)
    assert len({sample["webp"] for sample in pictures}) == 1610
    assert [int(sample["cls"]) for sample in pictures] == list(range(1610))


def test_no_held_out_picture_is_trained_on() -> None:
    held_out = {sample["webp"] for sample in read_sample("wds_twemoji/test/0.tar", LIMIT)}
    for path in (SAMPLE / "train").glob("*.tar"):
        assert not held_out & {sample["webp"] for sample in read_sample(f"train/{path.name}", LIMIT)}


def test_notice_names_every_source() -> None:
    notice = (SAMPLE / "NOTICE").read_text()
    for word in ("Noto", "Apache", "Fluent", "Twemoji", "CC-BY 4.0", "CLDR", "Unicode", "emoji-datasource"):
        assert word in notice
