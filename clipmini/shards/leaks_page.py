"""What is told of leaks: a table, and a page with the pictures side by side."""

import os
from collections.abc import Sequence
from typing import Any

from clipmini.data.health import Fault
from clipmini.data.store import ShardStore
from clipmini.evaluation.examples import make_url, thumbnail
from clipmini.report.page import PicturePairs, Section, Side, Table
from clipmini.shards.leaks_found import HASH, MODEL, Found
from clipmini.shards.scan import Pair

SIDES = ("training", "evaluation")
TITLES = {HASH: "By the perceptual hash", MODEL: "By the model"}
TEXT = (
    "An evaluation picture whose near-duplicate was trained on says little about new ones. For each evaluation picture "
    "the likest training picture is shown. Copies that are mirrored, turned, or cropped by much more than 5 % are not "
    "found by the hash; what is only alike may be among those that are: look at them."
)


def tabulate(found: Found) -> tuple[tuple[str, ...], list[list[str]]]:
    """Return the columns and the rows of a table of the sets."""
    columns = (
        "set",
        "pictures",
        "unreadable",
        "too plain",
        *found.kinds,
        "leaked",
        "share",
    )
    rows = []
    for number, (dataset, tally) in enumerate(zip(found.sets, found.of_sets, strict=True)):
        by_kind = found.of_set(number)
        leaked = len(set().union(*by_kind.values()))
        counts = [tally.pictures, tally.causes.total(), tally.plain, *map(len, by_kind.values()), leaked]
        rows.append([dataset.name, *(f"{count:,}" for count in counts), f"{leaked / tally.pictures:.2%}"])
    return columns, rows


def make_sections(found: Found, store: ShardStore, options: dict[str, Any]) -> list[Section]:
    """Return all sections of the page.

    Args:
        store: reads the training pictures.
        options: of the command.
    """
    return [summarize(found, options), *show_sets(found, store, options["max_shown"])]


def summarize(found: Found, options: dict[str, Any]) -> Section:
    """Say what was compared, how, and what was found."""
    tally = found.of_training
    facts = {
        "evaluation pictures in the training data": f"{len({number for _, number in found.best}):,}",
        "evaluation pictures": f"{found.starts[-1]:,}",
        "training pictures": f"{tally.pictures:,}",
        "unreadable training pictures": f"{tally.causes.total():,}",
        "bits that may differ": f"{options['max_distance']} of 64",
        "correlation of thumbnails": f"{options['min_correlation']:g} or more",
    }
    if MODEL in found.kinds:
        facts |= {"model": os.path.basename(str(options["model"])), "cosine": f"{options['min_cosine']:g} or more"}
    table = Table("Evaluation sets", *tabulate(found))
    text = f"{TEXT} Training data: {found.tell_training()}."
    return Section("Summary", text=text, facts=facts, tables=[table])


def show_sets(found: Found, store: ShardStore, max_shown: int) -> Sequence[Section]:
    """Show the pairs of each set, the likest first, as many as the page may have."""
    sections = []
    for number, dataset in enumerate(found.sets):
        groups = []
        for kind, pictures in found.of_set(number).items():
            pairs = sorted((found.best[kind, picture] for picture in pictures), key=lambda pair: -pair.score)
            shown = [show(found, pair, store) for pair in pairs[:max_shown]]
            max_shown -= len(shown)
            title = f"{TITLES[kind]}: {len(pairs):,}"
            title += f", of which {len(shown):,} are shown" if len(shown) < len(pairs) else ""
            groups += [PicturePairs(title, SIDES, shown)] if pairs else []
        if groups:
            sections.append(Section(f"Pictures of {dataset.name}", pairs=groups))
    return sections


def show(found: Found, pair: Pair, store: ShardStore) -> tuple[Side, Side, str]:
    """Return both pictures of a pair, and what is said of them."""
    number, index = found.locate(pair.number)
    dataset, shard = found.sets[number], found.shards[pair.shard]
    try:
        picture = make_url(store.read_picture(shard, pair.sample))
    except Fault:
        picture = None
    kind = MODEL if pair.distance is None else HASH
    told = (
        f"cosine {pair.score:.3f}"
        if pair.distance is None
        else f"{pair.distance} bits differ, correlation {pair.score:.3f}"
    )
    others = found.counts[kind, pair.number] - 1
    more = f"; {others:,} more training pictures are like it" if others else ""
    training = Side(picture, f"{found.shard_path(pair)}, {pair.key}")
    return training, Side(thumbnail(dataset, index), dataset.pictures.key(index)), f"{told}{more}"
