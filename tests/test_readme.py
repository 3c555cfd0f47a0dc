"""What the README names is there; its commands are run in test_readme_commands.py."""

import re
from collections.abc import Callable
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from PIL import Image

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_is_short() -> None:
    assert len(README.splitlines()) < 290


def test_pictures_are_there_with_what_makes_them() -> None:
    found = re.findall(r"^!\[(.+)\]\((.+)\) <!-- (scripts/\w+\.py)", README, re.MULTILINE)
    assert len(found) == README.count("![") == 2
    for described, path, script in found:
        assert len(described) > 40 and (ROOT / script).is_file()
        assert (ROOT / path).stat().st_size < 150_000
        with Image.open(ROOT / path) as picture:
            picture.load()
            assert picture.width >= 900, path


def test_tests_that_it_names_are_there() -> None:
    named = set(re.findall(r"\btest_\w+", README))
    texts = [path.read_text() for path in (ROOT / "tests").glob("test_*.py")]
    # As pytest's -k finds them: in a part of a test's name, or of its file's.
    known = {name for text in texts for name in re.findall(r"^def (test_\w+)", text, re.MULTILINE)}
    known |= {path.stem for path in (ROOT / "tests").glob("test_*.py")}
    assert len(named) > 15
    for name in named:
        assert any(name in one for one in known), name


def test_extras_that_it_names_are_there() -> None:
    named = set(re.findall(r"clipmini\[(\w+)\]", README))
    extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert {"s3", "serve"} <= named <= set(extras)


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
