"""The wheel, alone in a venv and an empty folder, trains: config, model files and sample are inside."""

import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from conftest import run_command

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(directory), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (path,) = directory.glob("*.whl")
    return path


def test_wheel_holds_all_there_is(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, inside in ((ROOT / "conf", "clipmini/conf"), (ROOT / "clipmini", "clipmini")):
        expected = {
            f"{inside}/{path.relative_to(folder)}"
            for path in folder.rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }
        assert expected <= names
    assert wheel.stat().st_size < 10_000_000  # the sample is compressed in it


def test_wheel_trains_in_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    venv, empty = tmp_path / "venv", tmp_path / "empty"
    empty.mkdir()
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    python = venv / "bin/python"
    # Torch and its like are borrowed from here: a path in a .pth file brings packages, but not the checkout itself.
    site = run_command([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], empty)
    (Path(site.stdout.strip()) / "borrowed.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    install = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    where = run_command([str(python), "-c", "import clipmini; print(clipmini.__file__)"], empty)
    assert where.stdout.startswith(str(venv))

    result = run_command([str(venv / "bin/clipmini"), "train", "steps=2", "batch_size=64"], empty)
    assert result.returncode == 0, result.stderr
    assert (empty / "outputs/sample/model/open_clip_model.safetensors").exists()
    assert "Zero-shot classification" in result.stdout
