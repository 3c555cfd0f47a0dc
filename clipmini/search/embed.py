"""`clipmini embed`: pictures, their captions or texts to unit vectors on the disk, in partitions.

Each process takes its share of the partitions, and the first one keeps other commands out of the output until all have
done theirs. What is there is not done again, wherever it was stopped. The bytes are the same for any number of
processes and workers: always BLOCK samples are encoded together.
"""

import contextlib
import itertools
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

import clipmini
from clipmini import config, distributed, launch
from clipmini.console import set_up_logging, track
from clipmini.data.cache import ShardCache
from clipmini.data.health import Fault
from clipmini.data.loader import default_num_workers
from clipmini.data.processes import leave_signals_to_main
from clipmini.data.remote import is_remote
from clipmini.data.store import ShardStore
from clipmini.data.tokenizer import Tokenize, count_tokens, trim
from clipmini.data.workers import read_batches
from clipmini.errors import UserError, check_choice
from clipmini.evaluation.cache import hash_weights
from clipmini.evaluation.encoder import AnyTransform, Encoder, check_precision, evaluation_transform
from clipmini.model import encode_image, encode_text, padding, preprocess_cfg
from clipmini.one_tower import check_has
from clipmini.search.inputs import Request, open_input, pair_format
from clipmini.search.layout import TABLE_ROW, Kind, Layout, Partition, Row, check_output, import_pyarrow, join
from clipmini.shards.inputs import Input, Item, Part
from clipmini.shards.packed import DIGEST, lock
from clipmini.sources import LOCAL_DIRECTORY, Source, load_model

log = logging.getLogger(__name__)

BLOCK = 64  # samples that are encoded together: with another number the last bits of features may be others
LONG_TEXTS = ("refuse", "cut")
PATIENCE = 30 * 24 * 3600.0  # seconds that the first process waits for the others, whose partitions may take longer


@dataclass
class Block:
    """Some samples that could be read.

    Attributes:
        number: of the block in its part.
        rows: what is known of each.
        images: uint8 [n, 3, size, size], or None.
        rejected: those that could not.
        error: in place of all else, why nothing more can be read; raised in a worker, it would come with a traceback.
    """

    number: int = 0
    rows: list[Row] = field(default_factory=list)
    images: Tensor | None = None
    texts: list[str] = field(default_factory=list)
    rejected: list[Row] = field(default_factory=list)
    error: UserError | None = None

    def name(self, number: int) -> str:
        """Return what a sample is called."""
        row = self.rows[number]
        return row.get("image_path") or row["source"]


class BlockDataset(IterableDataset):
    """Reads the samples of a part of the input, BLOCK at a time; each worker a piece of it, so that all is read once.

    Args:
        transform: of pictures; None leaves them out.
        with_texts: whether captions are read.
    """

    def __init__(self, part: Part, transform: AnyTransform | None, with_texts: bool) -> None:
        self.part = part
        self.transform = transform
        self.with_texts = with_texts

    def __iter__(self) -> Iterator[Block]:
        worker = get_worker_info()
        number, of = (worker.id, worker.num_workers) if worker else (0, 1)
        count = -(-len(self.part) // BLOCK)
        blocks = range(number * count // of, (number + 1) * count // of)
        items = self.part.items(blocks.start * BLOCK, blocks.stop * BLOCK)
        try:
            for turn in blocks:
                yield self.read(turn, list(itertools.islice(items, BLOCK)))
        except UserError as error:
            yield Block(error=error)
        except OSError as error:
            yield Block(error=UserError(f"input: cannot be read on: {error}; the same command goes on"))

    def read(self, number: int, items: Sequence[Item]) -> Block:
        """Read a block.

        Raises:
            UserError: a whole shard is not there, which may be mended: its samples are not given up for that.
        """
        block = Block(number)
        images = []
        for name, load in items:
            try:
                sample = load()
                if self.transform is not None:
                    images.append(self.transform(sample.picture))
            except Fault as fault:
                if fault.cause == "missing_shard":
                    raise UserError(f"{name}: {fault.detail}; once that is mended, the same command goes on") from fault
                block.rejected.append({"source": name, "cause": fault.cause, "detail": fault.detail})
                continue
            own: Row = {"image_path" if self.transform else "source": name, TABLE_ROW: sample.row}
            row = join(sample.metadata, own | ({"caption": sample.caption} if self.with_texts else {}))
            if sample.row is None or self.transform is None:
                del row[TABLE_ROW]
            block.rows.append(row)
            block.texts += [sample.caption] if self.with_texts else []
        block.images = torch.stack(images) if images else None
        return block


@dataclass
class Embedder:
    """Encodes parts of the input.

    Attributes:
        encoder: with the model.
        kinds: what is embedded.
        long_texts: `refuse` or `cut`.
        cut: texts that were.
    """

    encoder: Encoder
    kinds: tuple[Kind, ...]
    long_texts: str
    cut: int = 0

    def embed(self, part: Part) -> Partition:
        """Encode what there is in a part.

        Raises:
            UserError: a text that the model cannot take whole, and long_texts=refuse; or it cannot be read on.
        """
        transform = self.encoder.transform if "image" in self.kinds else None
        loader = DataLoader(
            BlockDataset(part, transform, "text" in self.kinds),
            batch_size=None,
            num_workers=self.encoder.num_workers,
            worker_init_fn=leave_signals_to_main,
        )
        width = self.encoder.model.architecture["embed_dim"]
        empty = np.empty((0, width), np.float16)
        found: list[tuple[Block, dict[Kind, np.ndarray]]] = []
        with self.encoder.ready():
            for block in read_batches(loader, f"num_workers={self.encoder.num_workers}"):
                if block.error is not None:
                    raise block.error
                kinds = self.kinds if block.rows else ()
                features = {
                    kind: self.check_finite(self.encode(kind, block), block).half().cpu().numpy() for kind in kinds
                }
                block.images = None
                found.append((block, features))
        found.sort(key=lambda one: one[0].number)
        return Partition(
            {kind: np.concatenate([empty, *(one[kind] for _, one in found if one)]) for kind in self.kinds},
            [row for block, _ in found for row in block.rows],
            [row for block, _ in found for row in block.rejected],
        )

    def encode(self, kind: Kind, block: Block) -> Tensor:
        """Encode a block: unit vectors [n, D]."""
        model, device = self.encoder.model, self.encoder.device
        if kind == "image":
            assert block.images is not None
            return encode_image(model, block.images.to(device)).float()
        self.check_lengths(block)
        return encode_text(model, trim(self.encoder.tokenize(block.texts), padding(model)).to(device)).float()

    def check_finite(self, features: Tensor, block: Block) -> Tensor:
        """Return features if all are finite: one that is not would spoil every search.

        Raises:
            UserError: one is not.
        """
        bad = (~features.isfinite().all(dim=1)).nonzero()
        if len(bad):
            name = block.name(int(bad[0]))
            raise UserError(f"{name}: its features are not finite with precision={self.encoder.precision}: take fp32")
        return features

    def check_lengths(self, block: Block) -> None:
        """Count the texts that the tokenizer cuts.

        Raises:
            UserError: there is one, and long_texts=refuse.
        """
        context = self.encoder.tokenize([""]).shape[1]
        lengths = count_tokens(self.encoder.tokenize, block.texts)
        long = [number for number, length in enumerate(lengths) if length > context]
        if long and self.long_texts == "refuse":
            raise UserError(
                f"{block.name(long[0])}: its text has {lengths[long[0]]} tokens and the model takes {context}: with "
                "long_texts=cut the same command goes on; a shortened one needs a new output"
            )
        self.cut += len(long)


def run(arguments: Sequence[str]) -> int:
    """Compose the config and embed.

    Returns:
        The exit code.

    Raises:
        UserError: anything that cannot work; partitions that are there stay.
    """
    options = config.read_options("embed", arguments)
    processes = launch.read_launch()
    set_up_logging(None)  # each process tells of its own partitions
    check_options(options)
    import_pyarrow()
    output = Path(options["output"])
    device = launch.choose_device(options["device"], processes)
    try:
        with launch.joined(processes, device), held(output):
            embed(options, processes, device, output)
    except OSError as error:
        raise UserError(f"output={output}: {error}; once that is mended, the same command goes on") from error
    return 0


@contextlib.contextmanager
def held(output: Path) -> Iterator[None]:
    """Keep other commands from writing into a directory until all processes of this one are done.

    Raises:
        UserError: another command is at it, or it cannot be written.
    """
    with contextlib.ExitStack() as stack:
        distributed.from_first(lambda: stack.enter_context(lock(output)))
        yield
        distributed.set_timeout(PATIENCE)
        with contextlib.suppress(RuntimeError):  # one of them is gone, and says why itself
            distributed.all_gather_numbers(0)


def embed(options: dict[str, Any], processes: launch.Launch, device: torch.device, output: Path) -> None:
    """Find what there is, load the model, and embed what is not there."""
    names = ("image_key", "caption_key", "metadata", "rows_per_partition")
    request = Request(options["input"], **{name: options[name] for name in names})
    cache = ShardCache(**options["cache"], under="")
    store = ShardStore(pair_format(request), cache, max_member_bytes=options["max_member_bytes"])
    found = open_input(request, store, output)
    source = load_model(options["model"], architecture=options["architecture"], weights=options["weights"])
    kinds = choose_kinds(request, source)
    check_output(output, make_record(options, request, found, source, kinds))
    layout = Layout(output, len(found.parts), kinds)
    embedder = Embedder(make_encoder(source, options, device, processes), kinds, options["long_texts"])
    embed_parts(embedder, layout, found, processes)


def check_options(options: dict[str, Any]) -> None:
    """See that the values can work.

    Raises:
        UserError: they cannot.
    """
    check_precision(options["precision"])
    check_choice("long_texts", options["long_texts"], LONG_TEXTS)


def choose_kinds(request: Request, source: Source) -> tuple[Kind, ...]:
    """Return what is embedded.

    Raises:
        UserError: nothing, or what the model has no tower for.
    """
    kinds: list[Kind] = ["image"] if request.has_pictures else []
    kinds += ["text"] if request.caption_key is not None else []
    if not kinds:
        raise UserError("image_key=null and caption_key=null: one of them must say what is embedded")
    for kind in kinds:
        key = f"caption_key={request.caption_key}" if kind == "text" else f"pictures of input={request.path}"
        check_has(source.model, kind, key)
    return tuple(kinds)


def make_encoder(source: Source, options: dict[str, Any], device: torch.device, processes: launch.Launch) -> Encoder:
    """Put the model on the device."""
    tokenize: Tokenize = source.tokenizer()
    workers = options["num_workers"]
    workers = default_num_workers(processes.num_cores) if workers is None else workers
    transform = evaluation_transform(source.model)
    return Encoder(source.model.to(device), tokenize, transform, BLOCK, workers, device, options["precision"])


def make_record(
    options: dict[str, Any], request: Request, found: Input, source: Source, kinds: tuple[Kind, ...]
) -> Row:
    """Return all that decides the bytes of an index, and how to load the model again."""
    given = options["model"]
    return {
        "clipmini": clipmini.__version__,
        "model": absolute(given.removeprefix(LOCAL_DIRECTORY)),
        "architecture": options["architecture"] and absolute(options["architecture"]),
        "weights_of": options["weights"],
        "name": f"{source.name} {source.weights}",
        "weights": hash_weights(source.model),
        "preprocess": preprocess_cfg(source.model),
        "precision": options["precision"],
        "input": request.path if is_remote(request.path) else os.path.abspath(request.path),
        "image_key": request.image_key,
        "caption_key": request.caption_key,
        "metadata": request.metadata,
        "rows_per_partition": request.rows_per_partition,
        DIGEST: found.digest,
        "kinds": list(kinds),
        "width": source.model.architecture["embed_dim"],
        "partitions": len(found.parts),
    }


def absolute(path: str) -> str:
    """Return the whole path of what is there, and anything else as it is."""
    return str(Path(path).absolute()) if Path(path).exists() else path


def embed_parts(embedder: Embedder, layout: Layout, found: Input, processes: launch.Launch) -> None:
    """Embed this process's share of what is not there, and say what there is."""
    missing = layout.missing()
    mine = [number for number in missing if number % processes.world_size == processes.rank]
    what = " and ".join({"image": "pictures", "text": "texts"}[kind] for kind in layout.kinds)
    if processes.rank == 0:
        log.info("embedding %s of %s %s in %s", what, f"{found.num_samples:,}", found.kind, layout.directory)
    if processes.rank == 0 and (done := layout.partitions - len(missing)):
        log.info("going on: %d of %d partitions are there", done, layout.partitions)
    for number in track(mine, len(mine), "partitions"):
        layout.write(number, embedder.embed(found.parts[number]))
    if embedder.cut:
        log.warning("%d texts were cut to what the model takes", embedder.cut)
    if not layout.missing():
        tell_end(layout, found)


def tell_end(layout: Layout, found: Input) -> None:
    """Say what an index holds; in which process the last partition came.

    Raises:
        UserError: nothing could be used.
    """
    rejected = layout.read_rejected()
    causes = ", ".join(f"{count:,} x {cause}" for cause, count in Counter(row["cause"] for row in rejected).items())
    if len(rejected) >= found.num_samples:
        example = f"{rejected[0]['source']}: {rejected[0]['detail']}" if rejected else "it is empty"
        raise UserError(f"input: not one of {found.num_samples:,} {found.kind} can be used: {causes} ({example})")
    if rejected:
        log.warning("left out %s: %s; each is in %s", f"{len(rejected):,}", causes, layout.directory / "rejected")
    log.info("embedded %s in %s", f"{found.num_samples - len(rejected):,}", layout.directory)
