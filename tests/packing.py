"""What the tests of packing share: how to pack, and how to read what came of it."""

import io
import json
import shutil
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import read_sample
from PIL import Image

from clipmini.shards.pack import pack
from clipmini.shards.packed import Packed

OPTIONS: dict[str, Any] = {
    "caption_key": "txt",
    "image_key": "image",
    "samples_per_shard": 10,
    "resize": None,
    "format": None,
    "quality": 90,
    "max_pixels": 10**7,
    "num_workers": 2,
}
SLOW: dict[str, Any] = {"samples_per_shard": 2, "format": "png"}  # for `slow_pictures`: a second or more of work


def run_pack(source: object, output: Path, **changes: Any) -> Packed:
    """Pack in this process, and others."""
    return pack(input=str(source), output=str(output), **{**OPTIONS, **changes})


def write_folder(folder: Path, samples: list[dict]) -> Path:
    """Write pictures, and captions beside them."""
    folder.mkdir(parents=True)
    for sample in samples:
        for extension in sample.keys() - {"__key__"}:
            (folder / f"{sample['__key__']}.{extension}").write_bytes(sample[extension])
    return folder


def read_packed_samples(path: Path) -> dict[str, dict[str, bytes]]:
    """Read all members of a shard, or of all shards of a directory, by key and in order."""
    samples: dict[str, dict[str, bytes]] = {}
    for shard in sorted(path.glob("*.tar")) if path.is_dir() else [path]:
        with tarfile.open(shard) as archive:
            for member in archive:
                key, extension = member.name.split(".", 1)
                file = archive.extractfile(member)
                assert file is not None and extension not in samples.get(key, {})
                samples.setdefault(key, {})[extension] = file.read()
    return samples


def read_rejected(output: Path) -> list[tuple[str, str, str]]:
    """Read source, cause and detail of what was left out."""
    lines = [json.loads(line) for line in (output / "rejected.jsonl").read_text().splitlines()]
    return [(line["source"], line["cause"], line["detail"]) for line in lines]


def read_files(folder: Path) -> dict[str, bytes]:
    """Read every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Pictures


def read_images(count: int) -> list[Image.Image]:
    samples = read_sample("train/noto-00000.tar", count)
    return [Image.open(io.BytesIO(sample["webp"])).convert("RGB").crop((2, 8, 62, 56)) for sample in samples]


def encode(image: Image.Image, format: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def decode(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def make_samples(count: int) -> list[dict]:
    """Make samples with a JPEG, a .txt and a .json."""
    return [
        {
            "__key__": f"key{number}",
            "jpg": encode(image),
            "txt": f"caption {number}".encode(),
            "json": json.dumps({"number": number}).encode(),
        }
        for number, image in enumerate(read_images(count))
    ]


def difference(first: Image.Image, second: Image.Image) -> float:
    """Return the mean difference of two pictures of one size, in levels of 255."""
    assert first.size == second.size
    return float(np.abs(np.asarray(first.convert("RGB"), int) - np.asarray(second.convert("RGB"), int)).mean())


def pack_one(tmp_path: Path, data: bytes, extension: str, **options: Any) -> tuple[str, bytes]:
    """Pack one picture, and return its extension and bytes."""
    write_folder(tmp_path / "source", [{"__key__": "a", extension: data, "txt": b"a caption"}])
    run_pack(tmp_path / "source", tmp_path / "output", **{"num_workers": 1, **options})
    (members,) = read_packed_samples(tmp_path / "output").values()
    assert members.keys() - {"txt", "json"} and members["txt"] == b"a caption"
    (packed,) = members.keys() - {"txt", "json"}
    return packed, members[packed]


def captions(output: Path) -> list[str]:
    return [members["txt"].decode() for members in read_packed_samples(output).values()]


def metadata(output: Path) -> list[dict]:
    return [json.loads(members["json"]) for members in read_packed_samples(output).values()]


# Tables

KEYS = {"image_key": "image", "caption_key": "caption"}
URL = "https://example.com/a.jpg"


def write_jsonl(path: Path, rows: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_parquet(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path, **options)
    return path


def pack_table(table: Path, **changes: Any) -> list[dict[str, bytes]]:
    """Pack a table into `output` beside it, and return the members of each sample."""
    run_pack(table, table.parent / "output", **{**KEYS, "samples_per_shard": 2, **changes})
    return list(read_packed_samples(table.parent / "output").values())


def rejected(table: Path) -> list[tuple[str, str, str]]:
    return read_rejected(table.parent / "output")


def metadata_of(samples: Sequence[dict[str, bytes]]) -> list[dict]:
    return [json.loads(members["json"]) for members in samples]


# Fixtures


@pytest.fixture(scope="session")
def samples() -> list[dict]:
    """25 pictures of the embedded sample with their captions and .json, sorted by key."""
    return sorted(read_sample("train/noto-00000.tar", 25), key=lambda sample: sample["__key__"])


@pytest.fixture(scope="session")
def pictures(samples: list[dict], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 25 pictures with captions and .json files."""
    return write_folder(tmp_path_factory.mktemp("pictures") / "pictures", samples)


@pytest.fixture(scope="session")
def packed(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shards of those pictures."""
    output = tmp_path_factory.mktemp("packed") / "packed"
    run_pack(pictures, output)
    return output


@pytest.fixture
def copy(packed: Path, tmp_path: Path) -> Path:
    """A copy of those shards, to be changed."""
    return Path(shutil.copytree(packed, tmp_path / "copy"))


@pytest.fixture(scope="session")
def image() -> Image.Image:
    """A picture of the embedded sample, not square: 60 x 48."""
    return read_images(1)[0]


@pytest.fixture(scope="session")
def jpegs() -> list[bytes]:
    """Five pictures of the embedded sample as JPEG."""
    return [encode(Image.open(io.BytesIO(sample["webp"]))) for sample in read_sample("train/noto-00000.tar", 5)]


@pytest.fixture
def jpeg_files(jpegs: list[bytes], tmp_path: Path) -> list[bytes]:
    """The same, as `pictures/0.jpg` and so on beside the table."""
    (tmp_path / "pictures").mkdir()
    for number, data in enumerate(jpegs):
        (tmp_path / f"pictures/{number}.jpg").write_bytes(data)
    return jpegs
