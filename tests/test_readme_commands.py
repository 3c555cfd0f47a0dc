"""Every command of the README is run, in its order and in one directory, where each finds what those before it made.

It is run as it is written, but for what makes it small and local: REPLACED and ADDED say that, and ELSEWHERE what takes
minutes and is run whole by another file. What is in these tables and not in the README is an error too.
"""

import contextlib
import io
import json
import os
import re
import shlex
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch.distributed.run
import yaml
from conftest import QUICK, TINY, read_sample, write_tar
from forked import run_forked, run_python
from judging import PETS, write_table, write_wds
from PIL import Image
from servers import S3, upload
from slurm_cluster import JOB, NODES, Cluster, free_ports, why_not
from test_serve import ask

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()

# In every command, in turn: what is large, takes long or is not on this machine.
REPLACED = {
    "/data/": "data/",
    "{00000..01242}": "{00000..00001}",
    "model.name=ViT-B-32 ": "model.name=tiny.json ",
    "model.name=RN50": "model.name=tiny.json",
    "model.name=ViT-bigG-14": "model.name=tiny.json",
    "model=ViT-B-32/openai": "model=outputs/mine/model",
    "batch_size=512": "batch_size=16",
    "range=1200:1210": "range=1200:1201",
    "processes=8": "processes=2",
    "--nproc-per-node 8 -m clipmini train trainer=fsdp": "--nproc-per-node 2 -m clipmini train trainer=fsdp",
    "--nproc-per-node 8": "--nproc-per-node 1",
    "name=seeds seed=0,1,2": "name=seeds seed=0",
    "seed=0,1,2": "seed=0,1",
    "https://store.example": "S3",
}
# After what is found so, and before what a command says itself, which wins.
SMALL = (
    *(word for word in QUICK if not word.startswith(("experiment=", "trainer="))),
    *("trainer.accelerator=cpu", "steps=2", "model.name=tiny.json"),
)
ADDED = {
    "clipmini train( --multirun)?": SMALL,
    "clipmini check": SMALL,
    "^sbatch": (*NODES, "--nodes=1"),
    "train.sbatch": SMALL,
    "hydra/launcher=slurm": ("hydra.launcher.cpus_per_task=1", "hydra.launcher.timeout_min=10"),
    "clipmini evaluate": ("num_workers=0",),
    "clipmini embed": ("num_workers=0",),
    "clipmini serve": ("port=PORT",),
    "shards pack": ("num_workers=1",),
    "shards verify": ("data.num_workers=1",),
    "shards leaks": ("num_workers=0",),
    "shards plan": ("batch_size=16",),
    "benchmark.py .*": ("--help",),  # only whether there are such arguments; the rest is done elsewhere
}
# By their beginning, with other arguments, and where.
ELSEWHERE = {
    "bash scripts/quickstart.sh": ".ci/run",
    "bash scripts/test.sh": ".ci/run",
    "python scripts/benchmark.py search": ".ci/run",
    "python scripts/benchmark.py train": ".ci/run",
    "python scripts/benchmark.py recipes": ".ci/run",
    "python scripts/benchmark.py locked": ".ci/run",
    "python scripts/benchmark.py checkpoint": ".ci/run",
}
PROGRAMS = ("clipmini", "python", "torchrun", "sbatch", "bash")


def read_commands() -> list[str]:
    """Return the commands of the README: lines of blocks of bash, lines after `$ `, and whole ones in a sentence."""
    commands = []
    for language, block, inline in re.findall(r"```(\w*)\n(.*?)```|`([^`]+)`", README, re.S):
        if language == "bash":
            commands += [line for line in block.splitlines() if line]
        elif block:
            # Without the variables before the program.
            commands += re.findall(r"^\$ (?:[A-Z_]+=\S+ )*(.+)", block, re.MULTILINE)
        elif inline.split()[0] in PROGRAMS and " " in inline.strip():
            commands.append(" ".join(inline.split()))
    return list(dict.fromkeys(commands))


COMMANDS = read_commands()
OF_CLUSTER = [command for command in COMMANDS if "slurm" in command]


def make_small(command: str) -> list[str]:
    """Return the words of a command, changed as the tables say."""
    for old, new in REPLACED.items():
        command = command.replace(old, new)
    for after, more in ADDED.items():
        command = re.sub(after, lambda found, more=more: " ".join([found[0], *more]), command)  # type: ignore[misc]
    return shlex.split(command, comments=True)


@contextlib.contextmanager
def visiting(address: str) -> Iterator[None]:
    """Search on the page of a server that is started meanwhile in this thread, and then press Ctrl-C."""
    answers: list[Any] = []
    over = threading.Event()

    def visit() -> None:
        for _ in range(1200):
            if over.wait(0.05):
                return
            with contextlib.suppress(OSError):
                answers.append(ask(f"{address}/api/search?query=cat&top_k=2")[:2])
                break
        os.kill(os.getpid(), signal.SIGINT)

    visitor = threading.Thread(target=visit)
    visitor.start()
    try:
        yield
    finally:
        over.set()
        visitor.join()
    assert [(status, len(found["results"])) for status, found in answers] == [(200, 2)]


def make_pairs(count: int, first: int = 0) -> list[dict[str, Any]]:
    """Return samples with a JPEG and a caption."""
    samples = read_sample("train/noto-00000.tar", first + count)[first:]
    for sample in samples:
        content = io.BytesIO()
        Image.open(io.BytesIO(sample.pop("webp"))).convert("RGB").save(content, "JPEG")
        sample["jpg"] = content.getvalue()
    return samples


def write_data(data: Path) -> None:
    """Write what lies in /data: shards of two sources, and sets with classes, folders and captions."""
    for number, name in enumerate(("cc12m/00000", "cc12m/00001", "cc3m/00000")):
        write_tar(data / f"{name}.tar", make_pairs(20, first=30 + 20 * number))
    pictures = [sample["webp"] for sample in read_sample("wds_twemoji/test/0.tar", 48)]
    classes = [{"webp": picture, "cls": str(row % 3).encode()} for row, picture in enumerate(pictures)]
    write_wds(data / "wds_imagenet1k_test", classes[:24], **PETS)
    write_wds(data / "wds_imagenet1k_test", classes[24:], split="train", **PETS)
    pairs = [{"webp": picture, "txt": f"thing {row}".encode()} for row, picture in enumerate(pictures)]
    write_wds(data / "wds_flickr30k", pairs, dataset_type="retrieval")
    for row, picture in enumerate(pictures):
        folder = data / "imagenet/val" / ("n01440764", "n01443537")[row % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{row}.webp").write_bytes(picture)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of one who has what the README assumes: pictures, tables, shards, sets, and the file of a model."""
    place = tmp_path / "place"
    write_data(place / "data")
    (place / "my_pictures").mkdir()
    rows = []
    for number, sample in enumerate(make_pairs(24), 1):
        path = place / f"my_pictures/{number}.jpg"
        path.write_bytes(sample["jpg"])
        path.with_suffix(".txt").write_bytes(sample["txt"])
        rows.append({"image": str(path.relative_to(place)), "text": sample["txt"].decode()})
    write_table(place / "documents.jsonl", *({"text": row["text"]} for row in rows))
    write_table(place / "table.parquet", *rows)
    write_table(
        place / "birds.csv", *({"image": row["image"], "label": ("owl", "duck")[n % 2]} for n, row in enumerate(rows))
    )
    (place / "my_sets.yaml").write_text(yaml.safe_dump([{"path": "data/wds_imagenet1k_test", "train": "train"}]))
    (place / "tiny.json").write_text(json.dumps({**TINY, "text_cfg": {**TINY["text_cfg"], "context_length": 77}}))
    monkeypatch.setenv("CLIPMINI_CACHE", str(tmp_path / "cache"))
    return place


def check_made(words: Sequence[str], place: Path) -> None:
    """See that what a command names as its output, or its run, is there."""
    for word in words:
        key, _, value = word.partition("=")
        made = {"output": f"{value}", "name": f"outputs/{value}"}.get(key)
        assert made is None or (place / made).exists(), word


@pytest.mark.parametrize("table", [REPLACED, ADDED, ELSEWHERE])
def test_tables_are_of_commands_that_are_there(table: dict[str, Any]) -> None:
    for text in table:
        assert any(text in command or re.search(text, command) for command in COMMANDS), text


def test_what_takes_long_is_run_elsewhere() -> None:
    for command in COMMANDS:
        if command.startswith("bash") or re.search("benchmark.py (?!--help)", command):
            assert command.startswith(tuple(ELSEWHERE)), command
    for beginning, file in ELSEWHERE.items():
        assert beginning.partition(" ")[2] in (ROOT / file).read_text(), beginning


def test_commands(place: Path, s3: S3, monkeypatch: pytest.MonkeyPatch, run_here: Callable) -> None:
    upload(s3, place / "data/cc12m", "bucket/cc12m")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.url)
    (port,) = free_ports(1)
    for command in COMMANDS:
        if command in OF_CLUSTER or command.startswith("bash"):
            continue
        program, *words = (word.replace("S3", s3.url).replace("PORT", str(port)) for word in make_small(command))
        if program == "clipmini":
            with visiting(f"http://127.0.0.1:{port}") if words[0] == "serve" else contextlib.nullcontext():
                result = run_here(*words, cwd=place)
        elif program == "torchrun" and "--nproc-per-node 1 " not in " ".join(words):
            # Its processes as forks, which saves the seconds that each takes to load torch; the other one is real.
            result = run_forked(words[words.index("clipmini") + 1 :], place, processes=2)
        else:
            main = {"python": run_python, "torchrun": torch.distributed.run.main}[program]
            result = run_forked(words, place, main=main)
        assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
        check_made(words, place)


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
def test_commands_of_a_cluster(
    cluster: Cluster, place: Path, monkeypatch: pytest.MonkeyPatch, run_here: Callable
) -> None:
    for name, value in {**cluster.environment, **JOB}.items():
        monkeypatch.setenv(name, value)
    for command in OF_CLUSTER:
        program, *words = make_small(command)
        if program == "clipmini":
            assert run_here(*words, cwd=place).returncode == 0, command
        else:
            assert program == "sbatch"
            given = [str(ROOT / word) if word.startswith("scripts/") else word for word in words]
            ended = cluster.wait(cluster.submit(*given, cwd=place, environment=JOB))
            assert (ended["JobState"], ended["ExitCode"]) == ("COMPLETED", "0:0"), "".join(
                path.read_text() for path in place.glob("*.out")
            )
        check_made(words, place)
