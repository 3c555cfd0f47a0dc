"""What the README says can be typed, found and run."""

import io
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import QUICK, read_sample, run_command
from forked import run_forked
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from clipmini import config, schemas
from clipmini.config import compose as compose_config
from clipmini.evaluation.entries import read_entries

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", README, re.S) for line in block.splitlines()]
TRAIN = [line for line in COMMANDS if "clipmini train" in line]
SHARDS = [line for line in COMMANDS if "clipmini shards" in line]
OTHERS = [line for line in COMMANDS if re.search(f"clipmini ({'|'.join(schemas.COMMANDS)})", line)]
CHECKS = [line for line in COMMANDS if "clipmini check" in line]


def overrides(command: str) -> list[str]:
    words = shlex.split(command, comments=True)
    return [word for word in words[words.index("train") + 1 :] if not word.startswith("--")]


def test_is_short() -> None:
    assert len(README.splitlines()) < 290


@pytest.mark.parametrize("command", TRAIN)
def test_commands_compose(command: str, compose: Callable[..., DictConfig]) -> None:
    words = [word.replace("seed=0,1,2", "seed=0") for word in overrides(command)]
    OmegaConf.to_container(compose(*words, "paths.run=x"), resolve=True, throw_on_missing=True)


@pytest.mark.parametrize("command", SHARDS)
def test_commands_of_shards_compose(command: str) -> None:
    words = shlex.split(command, comments=True)
    start = words.index("shards") + 2
    if words[start - 1] == "leaks":
        assert config.read_options("leaks", words[start:])["train"]
        return
    given = [word for word in words[start:] if not word.startswith("range=")]
    name = "pack" if words[start - 1] == "pack" else "train"
    cfg = compose_config(name, given)
    OmegaConf.to_container(cfg if name == "pack" else cfg.data, resolve=True, throw_on_missing=True)


@pytest.mark.parametrize("command", OTHERS)
def test_other_commands_compose(command: str) -> None:
    words = shlex.split(command, comments=True)
    start = words.index("clipmini") + 1
    content = config.read_options(words[start], words[start + 1 :])
    if words[start] == "evaluate":
        read_entries([entry for entry in content["datasets"] if entry != "my_sets.yaml"], "datasets")
    assert content


@pytest.mark.parametrize("command", CHECKS)
def test_commands_of_check_compose(command: str, compose: Callable[..., DictConfig]) -> None:
    words = shlex.split(command, comments=True)
    given = [word for word in words[words.index("check") + 1 :] if not word.startswith("processes=")]
    OmegaConf.to_container(compose(*given, "paths.run=x"), resolve=True, throw_on_missing=True)


def test_table_of_keys_is_of_this_config(compose: Callable[..., DictConfig]) -> None:
    cfg = compose()
    (table,) = re.findall(r"\| key \| is \|\n\| --- \| --- \|\n(.*?)\n\n", README, re.S)
    keys = [key for row in table.splitlines() for key in re.findall(r"`([a-z_.*]+)`", row.split("|")[1])]
    assert len(keys) > 15
    for key in keys:
        assert OmegaConf.select(cfg, key.removesuffix(".*"), default="absent") != "absent", key


def test_files_are_there() -> None:
    (block,) = re.findall(r"## Files\n\n```\n(.*?)```", README, re.S)
    folder, named = "", set()
    for line in block.splitlines():
        is_inside = line.startswith("  ")
        names = re.split(" {2,}", line.strip())[0].split(", ")
        named |= {folder + name for name in names} if is_inside else set(names)
        folder = folder if is_inside else names[0]
    for name in named:
        assert (ROOT / name).exists(), name
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "clipmini").rglob("*.py")}
    covered = {name for name in modules if name in named or any(name.startswith(folder) for folder in named)}
    rest = {name for name in modules - covered if not name.endswith("__.py")}
    assert rest <= {"clipmini/errors.py"}


def test_own_data_in_three_commands(tiny_json: Path, tmp_path: Path) -> None:
    pack, train, use = COMMANDS[COMMANDS.index("bash scripts/test.sh          # lint, types, tests") + 1 :][:3]
    pictures = tmp_path / "my_pictures"
    pictures.mkdir()
    for number, sample in enumerate(read_sample("train/noto-00000.tar", 20)):
        Image.open(io.BytesIO(sample["webp"])).save(pictures / f"{number}.jpg")
        (pictures / f"{number}.txt").write_bytes(sample["txt"])
    result = run_forked(shlex.split(pack, comments=True)[1:], tmp_path)
    assert result.returncode == 0, result.stderr

    smaller = [*QUICK, f"model.name={tiny_json}", "steps=2"]
    result = run_forked(["train", *overrides(train), *smaller], tmp_path)
    assert result.returncode == 0, result.stderr
    assert "20 pairs" in result.stdout
    result = run_command([sys.executable, *shlex.split(use)[1:]], tmp_path)
    assert result.returncode == 0 and result.stdout.startswith("CLIP(")
