"""A model as an open_clip directory, and an index of pictures and captions made with it."""

from pathlib import Path

import pytest
from conftest import read_sample
from test_model import make_model

from clipmini.cli import main
from clipmini.export.open_clip_directory import export_open_clip


@pytest.fixture(scope="session")
def tiny_export(tiny_json: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as an open_clip directory."""
    directory = tmp_path_factory.mktemp("models") / "tiny"
    export_open_clip(make_model(str(tiny_json)), directory)
    return directory


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 30 pictures with captions."""
    directory = tmp_path_factory.mktemp("pictures")
    for number, sample in enumerate(read_sample("train/noto-00000.tar", 30)):
        (directory / f"{number:03}.webp").write_bytes(sample["webp"])
        (directory / f"{number:03}.txt").write_text(f"{number} {sample['txt'].decode()[:20]}")
    return directory


@pytest.fixture(scope="session")
def made_index(tiny_export: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of them, in five partitions."""
    output = tmp_path_factory.mktemp("made") / "index"
    given = [f"model={tiny_export}", f"input={folder}", f"output={output}", "caption_key=txt", "rows_per_partition=7"]
    assert main(["embed", *given, "device=cpu", "num_workers=0"]) == 0
    return output
