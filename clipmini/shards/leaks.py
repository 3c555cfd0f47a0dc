"""`clipmini shards leaks TRAIN EVAL`: pictures of evaluation sets that are in the training data, or nearly."""

import json
import logging
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipmini import config, launch
from clipmini.console import log_table, set_up_logging
from clipmini.data.cache import ShardCache
from clipmini.data.index import PairFormat, Shard
from clipmini.data.locate import locate
from clipmini.data.manifest import read_sources
from clipmini.data.store import ShardStore
from clipmini.ema import check_weights
from clipmini.errors import UserError
from clipmini.evaluation.datasets import open_sets
from clipmini.evaluation.encoder import Encoder, check_precision
from clipmini.evaluation.entries import read_entries
from clipmini.evaluation.sets import EvaluationSet
from clipmini.files import write_atomically
from clipmini.one_tower import check_has
from clipmini.report.command import write
from clipmini.report.page import make_page
from clipmini.search.embed import make_encoder
from clipmini.shards.duplicates import Threshold
from clipmini.shards.leaks_found import Found
from clipmini.shards.leaks_page import make_sections, tabulate
from clipmini.shards.scan import Pair, scan_embeddings, scan_shards, sign_sets
from clipmini.sources import load_model

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Search:
    """Where is looked for what.

    Attributes:
        shards: of the training data.
        store: reads them.
        sets: evaluation sets.
        threshold: see `Threshold`.
        min_cosine: of embeddings.
        max_pixels: of a picture.
        num_workers: processes; None takes all cores.
        encoder: None compares no embeddings.
    """

    shards: Sequence[Shard]
    store: ShardStore
    sets: Sequence[EvaluationSet]
    threshold: Threshold
    min_cosine: float
    max_pixels: int
    num_workers: int | None
    encoder: Encoder | None

    def run(self, found: Found) -> Iterator[Pair]:
        """Yield all pairs, the model's after those of the hash, and note in `found` what became of all pictures.

        Raises:
            UserError: no picture could be read.
        """
        pictures = [dataset.pictures for dataset in self.sets]
        found.of_sets, known = sign_sets(pictures, self.max_pixels, self.num_workers)
        found.check_sets()
        shards = []
        for scan in scan_shards(self.shards, self.store, known, self.threshold, self.max_pixels, self.num_workers):
            shards.append(scan.shard)
            found.of_training.add(scan.tally)
            if scan.damage:
                found.damaged += 1
                log.warning("%s: %s; %d pictures before that", scan.shard.path, scan.damage, scan.shard.num_samples)
            yield from scan.pairs
        found.check_training()
        if self.encoder is not None:
            yield from scan_embeddings(shards, self.store, pictures, self.encoder, self.min_cosine)


def run(arguments: Sequence[str]) -> int:
    """Look for leaks, and tell what was found.

    Returns:
        The exit code: 1 if there are any.

    Raises:
        UserError: anything that cannot work.
    """
    options = config.read_options("leaks", arguments)
    set_up_logging(None)
    check_options(options)
    search = open_search(options)
    found = Found(search.sets, search.shards, has_model=search.encoder is not None)
    keep_details(options["details"], (found.add(pair) for pair in search.run(found)))
    log_table("Evaluation pictures in the training data", *tabulate(found))
    training = found.of_training
    log.info("training data: %s", found.tell_training())
    if training.example:
        log.warning("%s of them cannot be read: %s", f"{training.causes.total():,}", training.example)
    sections = make_sections(found, search.store, options)
    page = write(Path(options["output"]), make_page("Evaluation pictures in the training data", "", sections))
    log.info("%s", page.absolute().as_uri())
    return 1 if found.best else 0


def check_options(options: dict[str, Any]) -> None:
    """See that the values can work, before hours are spent.

    Raises:
        UserError: they cannot.
    """
    check_precision(options["precision"])
    check_weights(options["weights"], "weights")
    for key in ("output", "details"):
        if options[key] is not None and Path(options[key]).is_dir():
            raise UserError(f"{key}={options[key]}: is a directory, a file is expected")


def open_search(options: dict[str, Any]) -> Search:
    """Find the sets, the shards and the model.

    Raises:
        UserError: one of them is not there, or cannot be read.
    """
    given = options["eval"] if isinstance(options["eval"], list) else [options["eval"]]
    if not given:
        raise UserError("eval=[]: no set to look for")
    sets = [opened.dataset for opened in open_sets(read_entries(given, "eval"), "eval")]
    cache = ShardCache(**options["cache"], under="")
    store = ShardStore(PairFormat(()), cache, max_member_bytes=options["max_member_bytes"])
    shards: list[Shard] = []
    for entry in read_sources(options["train"], under=""):
        shards += locate(entry.shards, entry.key, cache.remote, allow_pipe=options["allow_pipe"], pipe_key="allow_pipe")
    names = ("min_cosine", "max_pixels", "num_workers")
    threshold = Threshold(options["max_distance"], options["min_correlation"])
    return Search(shards, store, sets, threshold, **{name: options[name] for name in names}, encoder=load(options))


def load(options: dict[str, Any]) -> Encoder | None:
    """Load the model, if one is given.

    Raises:
        UserError: there is none such, or it has no tower for pictures.
    """
    if options["model"] is None:
        return None
    processes = launch.read_launch()
    device = launch.choose_device(options["device"], processes)
    source = load_model(options["model"], architecture=options["architecture"], weights=options["weights"])
    check_has(source.model, "image", f"model={options['model']}")
    return make_encoder(source, options, device, processes)


def keep_details(path: str | None, rows: Iterator[dict[str, Any]]) -> None:
    """Write what is said of each pair as it is found, a line of JSON for each; without a path, only find them.

    Raises:
        UserError: it cannot be written.
    """
    if path is None:
        deque(rows, maxlen=0)
        return
    lines = ((json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "replace") for row in rows)
    try:
        write_atomically(Path(path), lambda file: file.writelines(lines))
    except OSError as error:
        raise UserError(f"details={path}: cannot be written: {error.strerror or error}") from error
