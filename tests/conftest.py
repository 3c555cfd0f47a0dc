"""Tiny real things: a model of a few thousand weights, tars of pictures from the embedded sample, real processes."""

import io
import json
import multiprocessing
import multiprocessing.forkserver
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
import torch.distributed
import webdataset
from omegaconf import DictConfig
from PIL import Image
from torch.multiprocessing import start_processes

from clipmini import cli, config
from clipmini.checkpoints import disk
from clipmini.data.augment import Augmentation
from clipmini.data.cache import ShardCache
from clipmini.data.loader import ImageTextData
from clipmini.data.tokenizer import ClipTokenizer
from clipmini.guard import Guard
from clipmini.head import HeadOptions
from clipmini.objective import ContrastiveLoss

pytest_plugins = ["packing", "embedded", "servers", "slurm_cluster"]  # their fixtures
SAMPLE = config.PACKAGE / "sample"
TINY = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "layers": 1, "width": 32, "head_width": 16},
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
# What makes a run on the tiny model a matter of seconds.
QUICK = (
    "experiment=none",
    "trainer=cpu",
    "batch_size=16",
    "steps=4",
    "data.num_workers=0",
    "trainer.precision=32-true",
    "trainer.log_every_n_steps=1",
    "checkpoint.every_n_steps=2",
    "logger.tensorboard=null",
)


def make_augmentation(**changes: Any) -> Augmentation:
    """Make an augmentation that crops and does nothing else, but for the changes."""
    nothing = {
        "scale": (0.5, 1.0),
        "ratio": (0.75, 4 / 3),
        "flip": 0.0,
        "rotation": 0.0,
        "translation": 0.0,
        "zoom": (1.0, 1.0),
        "shear": 0.0,
        "fill": 255,
        "color_jitter": None,
        "color_jitter_probability": 1.0,
        "grayscale_probability": 0.0,
        "blur": (0.1, 2.0),
        "blur_probability": 0.0,
    }
    return Augmentation(**{**nothing, **changes})


def make_head(**changes: Any) -> HeadOptions:
    """Make the options of no head, but for the changes."""
    return HeadOptions(**{"layers": 0, "hidden_width": 16, "width": 8, "norm": "layer", **changes})


def make_objective(kind: str = "infonce", **changes: Any) -> ContrastiveLoss:
    """Make a loss as the config of its kind does, but for the changes."""
    options = {
        "init_scale": 14.0,
        "init_bias": -10.0 if kind == "siglip" else None,
        "max_scale": 100.0,
        "duplicates": "ignore",
        "block_size": None,
        "terms": {"image_text": 1.0, "image_image": None, "text_text": None},
        "temperatures": {"image_image": 0.1, "text_text": None},
        "head": make_head(),
        "all_views": False,
    }
    return ContrastiveLoss(kind=kind, **{**options, **changes})  # type: ignore[arg-type]


def make_guard(**changes: Any) -> Guard:
    """Make a guard as the config does, for a batch of 12, but for the changes."""
    options = {"batch_size": 12, "max_in_a_row": 20, "skip_spikes": False, "window": 128, "sigmas": 6.0}
    return Guard(**{**options, **changes})  # type: ignore[arg-type]


def make_cache(directory: Path, **changes: Any) -> ShardCache:
    """Make a cache of remote shards in a directory, with little patience."""
    options = {"max_bytes": None, "fetch_timeout": 30.0, "stall_timeout": 2.0, "storage_options": None}
    return ShardCache(directory=str(directory), **{**options, **changes})


def make_data(train: Any, cache: ShardCache, *, size: int = 16, num_steps: int = 9, **changes: Any) -> ImageTextData:
    """Make the training data of a run of 9 steps of 12 pairs, in small blocks, prepared for a model of 16 pixels."""
    options = {
        "val": None,
        "caption_key": "txt",
        "second_caption_key": None,
        "view_augmentation": None,
        "extra_views": None,
        "terms": ("image_text",),
        "all_views": False,
        "cached_features": False,
        "hard_negatives": None,
        "augmentation": make_augmentation(flip=0.5),
        "draft": "auto",
        "shuffle_streams": 3,
        "shuffle_block": 8,
        "max_member_bytes": 10**7,
        "max_pixels": 10**7,
        "max_bad_fraction": 0.01,
        "num_workers": 0,
        "start_method": None,
        "prefetch_factor": 2,
        "timeout": 60.0,
        "allow_pipe": False,
        "ledger": True,
        "batch_size": 12,
        "seed": 3,
        "num_cores": 2,
    }
    data = ImageTextData(train=train, cache=cache, **{**options, **changes})  # type: ignore[arg-type]
    data.prepare(tokenize=ClipTokenizer(24), padding=0, size=size, num_steps=num_steps)
    return data


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 400 KiB; another size needs `mount -o remount,size=...`."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", disk], check=True)
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.fixture(scope="session", autouse=True)
def threads() -> None:
    """Two threads each would fight over the cores with the processes that tests start."""
    torch.set_num_threads(1)
    # Processes of tests are forks of one that has loaded all this once, which takes seconds.
    multiprocessing.set_forkserver_preload(["conftest", "test_model", "clipmini.shards.writer", "clipmini.train"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))  # its own sys.path comes too late for what it preloads
        multiprocessing.forkserver.ensure_running()


@pytest.fixture(scope="session")
def tiny_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model file of the tiny model."""
    path = tmp_path_factory.mktemp("model") / "tiny.json"
    path.write_text(json.dumps(TINY))
    return path


def save_checkpoint(content: Any, path: Path) -> Path:
    """Write a checkpoint as a run does."""
    disk.begin_checkpoint(path)
    step = disk.checkpoint_step(path) if path.name.startswith("step-") else 0
    about = {"step": step, "samples": 0, "world_size": 1}
    disk.commit_checkpoint(path, about, {"rank-00000.pt": disk.write_part(path, 0, content)})
    return path


def read_sample(shard: str, count: int) -> list[dict]:
    """Read the first samples of a shard of the embedded sample."""
    samples: dict[str, dict] = {}
    with tarfile.open(SAMPLE / shard) as archive:
        for member in archive:
            key, extension = member.name.split(".", 1)
            if key not in samples and len(samples) == count:
                break
            file = archive.extractfile(member)
            assert file is not None
            samples.setdefault(key, {"__key__": key})[extension] = file.read()
    return list(samples.values())


def write_tar(path: Path, samples: Sequence[dict]) -> Path:
    """Write samples to a shard."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as stream, webdataset.TarWriter(stream, encoder=False) as writer:
        for sample in samples:
            writer.write(sample)
    return path


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of three tars with 30, 20 and 14 pictures as JPEG, and their captions."""
    directory = tmp_path_factory.mktemp("shards")
    samples = read_sample("train/noto-00000.tar", 64)
    for sample in samples:
        buffer = io.BytesIO()
        Image.open(io.BytesIO(sample.pop("webp"))).save(buffer, "JPEG", quality=90)
        sample["jpg"] = buffer.getvalue()
    for name, part in (("a", samples[:30]), ("b", samples[30:50]), ("c", samples[50:])):
        write_tar(directory / f"{name}.tar", part)
    return directory


@pytest.fixture(scope="session")
def classification_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of 7 classes and 21 pictures in two shards, in CLIP_benchmark's layout."""
    root = tmp_path_factory.mktemp("wds_seven")
    samples = read_sample("wds_twemoji/test/0.tar", 21)
    for number, sample in enumerate(samples):
        sample["cls"] = str(number % 7).encode()
    write_tar(root / "test/0.tar", samples[:13])
    write_tar(root / "test/1.tar", samples[13:])
    (root / "test/nshards.txt").write_text("2\n")
    (root / "classnames.txt").write_text("".join(f"thing {number}\n" for number in range(7)))
    (root / "zeroshot_classification_templates.txt").write_text("a photo of {c}\n{}\n")
    return root


@pytest.fixture
def compose() -> Iterator[Callable[..., DictConfig]]:
    """Compose the config of `clipmini train` from overrides."""
    config.register()
    with hydra.initialize_config_dir(str(config.CONFIG_DIR), version_base="1.3"):
        yield lambda *overrides: hydra.compose("train", list(overrides))


def run_command(arguments: Sequence[str], cwd: Path, timeout: float = 300) -> subprocess.CompletedProcess:
    """Run a program with one thread in a directory, and return its output."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    return subprocess.run(
        list(arguments), cwd=cwd, env=environment, timeout=timeout, capture_output=True, text=True, check=False
    )


def run_clipmini(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    """Run `python -m clipmini`; `run_forked` does so faster where nothing depends on how a process begins and ends."""
    return run_command([sys.executable, "-m", "clipmini", *arguments], cwd)


@pytest.fixture
def run_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> Callable[..., subprocess.CompletedProcess]:
    """Run the command in this process, without the seconds that a new one takes to load torch."""

    def run(*arguments: str, cwd: Path = tmp_path) -> subprocess.CompletedProcess:
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", sys.argv)
        monkeypatch.setattr(sys, "excepthook", sys.excepthook)
        capsys.readouterr()
        try:
            code = cli.main(arguments)
        except SystemExit as stop:
            code = int(stop.code or 0)
        output = capsys.readouterr()
        return subprocess.CompletedProcess(arguments, code, output.out, output.err)

    return run


def in_processes(count: int, function: Callable, directory: Path, *arguments: object) -> list:
    """Call function(*arguments) in so many gloo processes; return what each rank returned.

    The function must be defined at the top of a module.
    """
    start_processes(_process, (count, function, directory, arguments), nprocs=count, start_method="forkserver")
    return [torch.load(directory / f"{rank}.pt", weights_only=False) for rank in range(count)]


def _process(rank: int, count: int, function: Callable, directory: Path, arguments: tuple) -> None:
    torch.set_num_threads(1)
    multiprocessing.set_start_method(None, force=True)  # workers start as they do in a launcher's processes
    store = torch.distributed.FileStore(str(directory / "store"), count)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=count)
    try:
        torch.save(function(*arguments), directory / f"{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()
