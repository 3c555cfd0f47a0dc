"""Packs pictures and captions into webdataset shards: all checked, and the same bytes with any number of processes."""

import logging
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from clipmini.data.index import IMAGE_EXTENSIONS
from clipmini.data.locate import is_shard, locate_local
from clipmini.data.processes import map_in_processes
from clipmini.errors import UserError, check_choice
from clipmini.files import tell_neighbours, write_atomically
from clipmini.shards.inputs import PRELOAD, Input, check_apart, open_folder, open_shards
from clipmini.shards.packed import (
    DAMAGED,
    DIGEST,
    REJECTED,
    REPORTS,
    SETTINGS,
    SIZES,
    Packed,
    check_output,
    check_record,
    lock,
    read_packed,
    remove_leftovers,
)
from clipmini.shards.tables import TABLES, URL, open_table
from clipmini.shards.writer import FORMATS, Job, Settings, read_report, rejected_line, to_json, write_shard

log = logging.getLogger(__name__)


def pack(
    *,
    input: str,
    output: str,
    caption_key: str,
    image_key: str,
    samples_per_shard: int,
    resize: int | None,
    format: str | None,
    quality: int,
    max_pixels: int,
    num_workers: int | None,
) -> Packed:
    """Write shards, `output/00000.tar` and so on, with the pairs of each in sizes.json; rejected.jsonl lists the rest.

    Shard n takes the samples from n * samples_per_shard on; those left out make it smaller. A key is the number of the
    shard and that of the sample in it. The same command goes on where it was stopped, and changes nothing when all is
    done.

    Args:
        input: see `open_source`.
        output: directory, new or empty, or one where the same command was stopped.
        caption_key: `txt`, `folder`, a column, or a key of the .json; depends on the input.
        image_key: column of a table.
        samples_per_shard: samples.
        resize: pixels of the shortest side of larger pictures; None leaves them as they are.
        format: jpg, png or webp; pictures that have it, and need no resizing, keep their bytes. None: each its own.
        quality: of jpg and webp, from 1 to 100.
        max_pixels: larger pictures are left out.
        num_workers: processes; None takes all cores.

    Raises:
        UserError: a wrong value, nothing that can be packed, or an output that holds something else.
    """
    settings = Settings(
        input=check_text("input", input),
        caption_key=check_text("caption_key", caption_key),
        image_key=check_text("image_key", image_key),
        samples_per_shard=samples_per_shard,
        resize=resize,
        format=format,
        quality=quality,
        max_pixels=max_pixels,
    )
    check_settings(settings, num_workers)
    folder = Path(check_text("output", output))
    try:
        check_output(folder)
        source = open_source(settings, folder, num_workers)
        with lock(folder):
            return pack_into(folder, source, settings, num_workers)
    except OSError as error:
        raise UserError(f"output={output}: {error}; once that is mended, the same command goes on") from error


def pack_into(folder: Path, source: Input, settings: Settings, num_workers: int | None) -> Packed:
    """Pack what is not packed yet into a folder that no other process packs into."""
    remove_leftovers(folder)
    record = {**asdict(settings), "input": os.path.abspath(settings.input), DIGEST: source.digest}
    if (folder / SETTINGS).exists():
        check_record(folder, record)
    else:
        write_atomically(folder / SETTINGS, to_json(record, indent=2) + b"\n")
    if (folder / SIZES).exists():
        packed = read_packed(folder)
        log.info("already packed: %s in %s", packed, folder)
        return packed
    log.info("packing %s %s of %s", f"{source.num_samples:,}", source.kind, settings.input)
    jobs = make_jobs(folder, source, settings)
    write_shards(jobs, num_workers)
    return finish(folder, jobs, source)


def check_text(key: str, value: object) -> str:
    """Return a value as text; a name of digits comes from yaml as a number.

    Raises:
        UserError: it is empty, or something else.
    """
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise UserError(f"{key}={value}: expected text; in quotes, as in '{key}=\"...\"', anything is")
    return str(value)


def check_settings(settings: Settings, num_workers: int | None) -> None:
    """Check the numbers and the format.

    Raises:
        UserError: one is out of its range.
    """
    check_number("samples_per_shard", settings.samples_per_shard)
    check_number("quality", settings.quality, most=100)
    check_number("max_pixels", settings.max_pixels)
    if settings.resize is not None:
        check_number("resize", settings.resize, or_null=" or null")
    if num_workers is not None:
        check_number("num_workers", num_workers, or_null=" or null")
    check_choice("format", settings.format, (*FORMATS, None))


def check_number(key: str, value: object, *, most: int | None = None, or_null: str = "") -> None:
    """See that a value is a whole number from 1 on.

    Raises:
        UserError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1 or (most is not None and value > most):
        limits = f"from 1 to {most}" if most is not None else "above 0"
        raise UserError(f"{key}={value}: expected a whole number {limits}{or_null}")


def open_source(settings: Settings, output: Path, num_workers: int | None) -> Input:
    """Find out what the input is, and how many samples it has.

    The input is a folder of pictures; a .csv, .tsv, .jsonl or .parquet; or shards: a .tar, a directory with .tar files
    in it, a glob or a brace pattern.

    Raises:
        UserError: there is nothing to pack.
    """
    path, caption_key, samples_per_shard = settings.input, settings.caption_key, settings.samples_per_shard
    if path.startswith("pipe:") or URL.match(path):
        raise UserError(f"input={path}: only local files can be packed, nothing is downloaded")
    suffix = os.path.splitext(path)[1].lower()
    try:
        if os.path.isfile(path) and suffix in TABLES:
            return open_table(path, settings.image_key, caption_key, samples_per_shard)
        if os.path.isdir(path) and not holds_shards(path):
            check_apart(path, output)
            return open_folder(path, caption_key, samples_per_shard)
        if os.path.isfile(path) and not is_shard(path):
            raise UserError(f"input={path}: is neither a folder nor {', '.join(TABLES)} or .tar")
        if suffix in TABLES:
            raise UserError(f"input={path}: does not exist; tables are packed one by one, each to an output of its own")
        if not os.path.exists(path) and not set(path) & set("*?[{"):
            raise UserError(f"input={path}: does not exist{tell_neighbours(path)}")
        tars = [shard.path for shard in locate_local(path, "input")]
        return open_shards(path, tars, caption_key, samples_per_shard, num_workers)
    except OSError as error:
        raise UserError(f"input={path}: {error}") from error


def holds_shards(folder: str) -> bool:
    """Say whether a folder is one of shards, and not of pictures.

    Raises:
        UserError: it has both.
    """
    names = [name for name in os.listdir(folder) if not name.startswith(".")]
    if not any(is_shard(name) for name in names):
        return False
    if any(os.path.splitext(name)[1][1:].lower() in IMAGE_EXTENSIONS for name in names):
        raise UserError(f"input={folder}: holds pictures and .tar files; input='{folder}/*.tar' takes the .tar files")
    return True


def make_jobs(folder: Path, source: Input, settings: Settings) -> list[Job]:
    """Give each part of the input to a shard."""
    digits = max(5, len(str(len(source.parts) - 1)))
    names = [f"{number:0{digits}d}" for number in range(len(source.parts))]
    return [
        Job(
            folder / f"{name}.tar",
            folder / REPORTS / f"{name}.json",
            number * settings.samples_per_shard,
            part,
            settings,
        )
        for number, (name, part) in enumerate(zip(names, source.parts, strict=True))
    ]


def write_shards(jobs: Sequence[Job], num_workers: int | None) -> None:
    """Write the shards that are not there, in several processes.

    Raises:
        UserError: a process was killed, or the input cannot be read on.
        OSError: the disk is full, or the like.
    """
    pending = [job for job in jobs if not job.is_done]
    if len(pending) < len(jobs):
        log.info("going on: %d of %d shards are there", len(jobs) - len(pending), len(jobs))
    for _ in map_in_processes(
        write_shard, pending, description="packing shards", num_workers=num_workers, preload=PRELOAD
    ):
        pass


def finish(folder: Path, jobs: Sequence[Job], source: Input) -> Packed:
    """Write what there is to know of all shards together, and say it.

    Raises:
        UserError: not one sample could be used, and the output is empty again; or the input has changed.
    """
    reports = [read_report(job) for job in jobs]
    rejected = [line for report in reports for line in report.rejected]
    sizes = {job.shard.name: report.pairs for job, report in zip(jobs, reports, strict=True)}
    input_ = jobs[0].settings.input
    if sum(sizes.values()) + len(rejected) != source.num_samples:
        raise UserError(f"input={input_}: has changed while it was packed into {folder}; choose another output")
    if len(rejected) == source.num_samples:
        discard(folder, jobs)
        raise UserError(f"input={input_}: not one sample can be used: {count_causes(rejected)}")
    damage = [
        (position, rejected_line(os.path.basename(path), DAMAGED, f"{what}; what follows is lost"))
        for position, path, what in source.damage
    ]
    lines = sorted([*damage, *rejected], key=lambda line: line[0])  # stable: a shard's damage is before the next one
    write_atomically(folder / REJECTED, b"".join(to_json(line) + b"\n" for _, line in lines))
    write_atomically(folder / SIZES, to_json(sizes, indent=2) + b"\n")
    shutil.rmtree(folder / REPORTS)
    packed = Packed(sizes, len(rejected))
    log_summary(folder, packed, rejected, source)
    return packed


def discard(folder: Path, jobs: Sequence[Job]) -> None:
    """Remove all that was written; the settings last, so that a process killed here leaves what it can go on with."""
    for job in jobs:
        job.shard.unlink()
    shutil.rmtree(folder / REPORTS)
    (folder / SETTINGS).unlink()


def count_causes(rejected: Sequence[tuple[int, dict[str, str]]]) -> str:
    """Say how often samples were left out for which cause, with an example of each."""
    counts = Counter(line["cause"] for _, line in rejected)
    examples = {line["cause"]: f"{line['source']}: {line['detail']}" for _, line in reversed(rejected)}
    return ", ".join(f"{count:,} x {cause} ({examples[cause]})" for cause, count in counts.most_common())


def log_summary(folder: Path, packed: Packed, rejected: Sequence[tuple[int, dict[str, str]]], source: Input) -> None:
    """Say what was packed and what was not."""
    for _, path, what in source.damage:
        log.warning("damaged: %s %s; what follows is lost", path, what)
    if source.dropped:
        extensions = ", ".join(f"{count:,} x {name}" for name, count in sorted(source.dropped.items()))
        log.info("not packed, as no part of a pair: %s", extensions)
    if rejected:
        total = f"{source.num_samples:,}"
        log.info("left out %s of %s samples: %s", f"{len(rejected):,}", total, count_causes(rejected))
        log.info("each of them is in %s", folder / REJECTED)
    log.info("packed %s in %s", packed, folder)
