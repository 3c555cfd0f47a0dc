"""`clipmini export`: a directory that other programs load, in place only after one of them has loaded it."""

import importlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipmini import __version__
from clipmini.errors import UserError, tell_choices
from clipmini.export import hugging_face, onnx_towers
from clipmini.export.card import Subject, make_card
from clipmini.export.inputs import encode, make_inputs
from clipmini.export.open_clip_directory import export_open_clip
from clipmini.export.parity import check_parity
from clipmini.model import Model, count_parameters, image_size
from clipmini.one_tower import check_has

log = logging.getLogger(__name__)

MARKER = "clipmini_export.json"  # lists what an export consists of, so that nothing else is ever replaced


@dataclass(frozen=True)
class Format:
    """How models are written.

    Attributes:
        write: into a directory that is not there yet.
        check: raises UserError for a model that the format has no place for.
        packages: what must be importable.
        extra: of clipmini, that installs them.
    """

    write: Callable[[Model, Path], None]
    check: Callable[[Model], None] = lambda model: None
    packages: tuple[str, ...] = ()
    extra: str = ""


FORMATS = {
    "open_clip": Format(export_open_clip),
    "hf": Format(hugging_face.write_clip_model, hugging_face.check_architecture, ("transformers",), "hf"),
    "onnx": Format(onnx_towers.write_towers, packages=("onnx", "onnxscript", "onnxruntime"), extra="onnx"),
}


def export(
    model: Model,
    *,
    format: str,
    output: Path,
    name: str,
    config: Mapping[str, Any] | None,
    results: Sequence[Mapping[str, Any]],
    command: str,
    step: int | None = None,
    license: str | None = None,
) -> None:
    """Write a model, have a fresh process load it and compare features, and put it in place; or leave all as it was.

    Args:
        model: as `create_model` makes it, with its weights, on any device; it stays as it is.
        format: `open_clip`, `hf` or `onnx`.
        output: directory; new, empty, or an older export, which is replaced as a whole.
        name: of the model, for its card.
        config: of the run that trained it, as plain data; None if that is not known.
        results: rows of results.jsonl that are about these weights.
        command: that is running, for the card.
        step: of the weights, which says how much data they have seen; None if that is not known.
        license: of the model, one of the Hub's identifiers; None says nothing.

    Raises:
        UserError: an unknown format, packages that are missing, an output that is something else or cannot be written,
            a model that the format has no place for, or features that differ.
    """
    if format not in FORMATS:
        raise UserError(f"format={format}: no such format{tell_choices(format, FORMATS)}")
    chosen = FORMATS[format]
    require_packages(format, chosen)
    output = output.resolve()
    check_output(output)
    check_has(model, "image", f"format={format}")
    check_has(model, "text", f"format={format}")
    chosen.check(model)
    model = prepare(model)
    subject = Subject(
        name=name,
        format=format,
        architecture=model.architecture,
        num_parameters=count_parameters(model),
        image_size=image_size(model),
    )
    card = make_card(subject, config=config, results=results, command=command, step=step, license=license)
    work = make_work_directory(output)
    try:
        chosen.write(model, work / "export")
        (work / "export/README.md").write_text(card, encoding="utf-8")
        inputs = make_inputs(model)
        differences = check_parity(format, work / "export", inputs, encode(model, inputs), work)
        write_marker(work / "export", format, differences)
        open_to_readers(work / "export")
        replace(output, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    log.info("exported to %s", output)


def require_packages(name: str, chosen: Format) -> None:
    """See that the packages of a format can be imported.

    Raises:
        UserError: one cannot.
    """
    for package in chosen.packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise UserError(f"format={name} needs {package}: pip install 'clipmini[{chosen.extra}]'") from error


def check_output(output: Path) -> None:
    """See that there is nothing in the place of an export but an older one.

    Raises:
        UserError: there is.
    """
    if not output.exists():
        return
    if not output.is_dir():
        raise UserError(f"output={output}: is a file; give a directory, new or empty")
    found = {path.relative_to(output).as_posix() for path in output.rglob("*") if not path.is_dir()}
    try:
        ours = {*json.loads((output / MARKER).read_text())["files"], MARKER}
    except (OSError, ValueError, KeyError, TypeError):
        ours = set()
    if foreign := sorted(found - ours):
        raise UserError(
            f"output={output}: holds what no export wrote ({', '.join(foreign[:3])}); give a directory that is new, "
            "empty or an older export"
        )


def prepare(model: Model) -> Model:
    """Return a copy to write and compare: float32, on the CPU, in evaluation mode."""
    return deepcopy(model).cpu().float().eval()


def make_work_directory(output: Path) -> Path:
    """Make a directory beside the output: a rename is atomic within a file system only.

    Raises:
        UserError: it cannot be made.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    except OSError as error:
        raise UserError(f"output={output}: cannot be written: {error.strerror}") from error


def write_marker(directory: Path, format: str, differences: Mapping[str, float]) -> None:
    """Write down which files are of the export, and how far its features are from the model's."""
    files = sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    content = {"format": format, "clipmini": __version__, "parity": differences, "files": files}
    (directory / MARKER).write_text(json.dumps(content, indent=2) + "\n")


def open_to_readers(directory: Path) -> None:
    """Give all files the rights of the card: safetensors makes files that only their owner can read."""
    mode = (directory / "README.md").stat().st_mode
    for path in directory.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def replace(output: Path, work: Path) -> None:
    """Put a new export in the place of an older one, which stays where that fails."""
    if output.exists():
        os.rename(output, work / "old")
    try:
        os.rename(work / "export", output)
    except OSError:
        if (work / "old").exists():
            os.rename(work / "old", output)
        raise
