"""`clipmini shards`: composes the config of each of its commands, runs it and prints what it found."""

import inspect
import logging
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from omegaconf import OmegaConf

from clipmini import config
from clipmini.console import set_up_logging
from clipmini.data.content import Content
from clipmini.data.counts import count_pairs, read_known_counts
from clipmini.data.locate import locate
from clipmini.data.manifest import read_sources
from clipmini.errors import UserError, did_you_mean, tell_choices
from clipmini.redaction import redact_message

log = logging.getLogger(__name__)

COMMANDS = {
    "plan": "print the samples of some steps of a run: range=FIRST:LAST",
    "index": "count the pairs of data.train again, and keep the counts for every later run",
    "verify": "read everything in data.train and print each defect with its shard and key",
    "leaks": "find pictures of evaluation sets in training shards: leaks TRAIN EVAL",
    "pack": "make shards of input (pictures, a table or other shards) in output",
}


def run(arguments: Sequence[str]) -> int:
    """Run a command with its overrides.

    Returns:
        The exit code: 1 where defects or leaks were found, else 0.

    Raises:
        UserError: no such command, or something in the config that cannot work.
        HydraException, OmegaConfBaseException: overrides that do not fit the config.
    """
    command, overrides = (arguments[0], list(arguments[1:])) if arguments else ("--help", [])
    if command in ("-h", "--help"):
        print_usage()
        return 0
    if command not in COMMANDS:
        raise UserError(f"shards {command}: no such command{tell_choices(command, COMMANDS)}")
    if {"-h", "--help"} & set(overrides):
        name = command if command in ("leaks", "pack") else "train"
        print(config.config_file(name).read_text(), end="")
        return 0
    set_up_logging(None, to_stderr=command in ("plan", "verify"))  # their output is for other programs too
    if command == "plan":
        print_plan(overrides)
    elif command == "index":
        index(overrides)
    elif command == "verify":
        return verify(overrides)
    elif command == "leaks":
        return find_leaks(overrides)
    else:
        pack(overrides)
    return 0


def print_usage() -> None:
    """Print what there is."""
    print("usage: clipmini shards COMMAND [overrides]\n")
    for name, text in COMMANDS.items():
        print(f"  {name:8}{text}")
    print(
        "\nplan takes the overrides of `clipmini train`; so do index and verify, which start from experiment=none.\n"
        "`clipmini shards COMMAND --help` prints the keys."
    )


def print_plan(overrides: Sequence[str]) -> None:
    """Print step, position, source, shard, index and key of the samples of some steps, as the run draws them.

    Steps are counted from 1, as in the log and in `metrics.csv`.
    """
    from clipmini import launch
    from clipmini.train import build_data

    first, last = read_range([override for override in overrides if override.startswith("range=")])
    cfg = config.compose("train", [override for override in overrides if not override.startswith("range=")])
    data = build_data(cfg, launch.read_launch())
    print("step", "position", "source", "shard", "index", "key", sep="\t")
    for step in range(first, last + 1):
        positions = data.plan.batch(step - 1, cfg.batch_size)
        places = data.plan.lookup(positions)
        columns = (positions, places.source, places.shard, places.sample)
        for position, number, shard_number, index in zip(*(column.tolist() for column in columns), strict=True):
            source = data.manifest.sources[number]
            shard = source.shards[shard_number]
            key = data.store.key(shard, index) or "-"
            print(step, position, source.name, redact_message(shard.path), index, key, sep="\t")


def read_range(given: Sequence[str]) -> tuple[int, int]:
    """Read `range=FIRST:LAST` or `range=STEP`.

    Raises:
        UserError: it is missing, or something else.
    """
    text = given[-1].removeprefix("range=") if given else ""
    match = re.fullmatch(r"(\d+)(?::(\d+))?", text)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= first <= last:
        raise UserError(f"range={text}: expected FIRST:LAST, steps from 1 on, as in range=100:110 or range=100")
    return first, last


def read_data(overrides: Sequence[str]) -> tuple[dict[str, Any], Any, Content]:
    """Compose the config of `index` and `verify`, and return its checked `data`, the cache and what makes a pair."""
    if not any(override.startswith("experiment=") for override in overrides):
        overrides = ["experiment=none", *overrides]
    cfg = config.compose("train", overrides)
    loss = config.build(cfg, "loss")
    data = config.read_node(cfg, "data", skip={"terms": None, "all_views": None})
    keys = ("caption_key", "second_caption_key", "hard_negatives", "extra_views")
    content = Content.choose(tuple(loss.terms), loss.all_views, **{key: data[key] for key in keys})
    return data, config.build(cfg, "data.cache"), content


def index(overrides: Sequence[str]) -> None:
    """Count the pairs of every source anew, and keep that."""
    data, cache, content = read_data(overrides)
    for entry in read_sources(data["train"]):
        found = locate(entry.shards, entry.key, cache.remote, allow_pipe=data["allow_pipe"])
        shards = count_pairs(found, content.pair_format, cache, entry.key, again=True)
        pairs = sum(shard.num_samples for shard in shards)
        log.info("%s: %s pairs in %s shards", entry.name, f"{pairs:,}", f"{len(shards):,}")


def verify(overrides: Sequence[str]) -> int:
    """Print the defects of every source; 1 if there are any."""
    from clipmini.shards.verify import Rules, find_defects

    data, cache, content = read_data(overrides)
    rules = Rules(content, data["max_member_bytes"], data["max_pixels"])
    shards = []
    for entry in read_sources(data["train"]):
        found = locate(entry.shards, entry.key, cache.remote, allow_pipe=data["allow_pipe"], keep_missing=True)
        counts = read_known_counts(found, content.pair_format, cache)
        shards += [replace(shard, num_samples=counts[shard.path].num_pairs) for shard in found if shard.path in counts]
        shards += [shard for shard in found if shard.path not in counts]
    causes: Counter[str] = Counter()
    for defect in find_defects(shards, rules, cache, num_workers=data["num_workers"]):
        shard, detail = redact_message(defect.shard), redact_message(defect.detail)
        print(shard, defect.key or "-", defect.cause, detail, sep="\t", flush=True)
        causes[defect.cause] += 1
    by_cause = ", ".join(f"{count} {cause}" for cause, count in causes.most_common())
    log.info("%d defects in %d shards%s", causes.total(), len(shards), f": {by_cause}" if causes else "")
    return 1 if causes else 0


def find_leaks(overrides: Sequence[str]) -> int:
    """Print how much of evaluation sets is in training shards; 1 if anything is."""
    from clipmini.shards.leaks import run as find

    return find(overrides)


def pack(overrides: Sequence[str]) -> None:
    """Write shards."""
    from clipmini.shards.pack import pack as write

    cfg = config.compose("pack", overrides)
    content = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    assert isinstance(content, dict)
    options = {str(name): value for name, value in content.items()}
    known = inspect.signature(write).parameters
    for name in known.keys() ^ options.keys():  # of +name=value and ~name
        raise UserError(f"{name}: is missing" if name in known else f"unknown key {name}{did_you_mean(name, known)}")
    write(**options)
