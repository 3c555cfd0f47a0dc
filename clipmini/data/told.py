"""How many pairs shards have by what lies beside them: `sizes.json`, Energon's index, img2dataset's statistics."""

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from clipmini.data.index import Shard
from clipmini.data.locate import base_name, beside, parent
from clipmini.data.remote import PIPE, Remote, is_remote
from clipmini.data.threads import map_in_threads
from clipmini.errors import UserError

log = logging.getLogger(__name__)

REQUESTS = 16  # files that are fetched at a time


def read_told_counts(shards: Sequence[Shard], remote: Remote) -> dict[str, int]:
    """Return the pairs of those shards, by path, of which something is told."""
    by_directory: dict[str, list[Shard]] = {}
    for shard in shards:
        if not shard.path.startswith(PIPE):
            by_directory.setdefault(parent(shard.path), []).append(shard)
    told: dict[str, int] = {}
    for inside in by_directory.values():
        counts = read_directory(inside[0].path, remote)
        told |= {shard.path: counts[name] for shard in inside if (name := base_name(shard.path)) in counts}
        told |= read_statistics([shard for shard in inside if shard.path not in told], remote)
    return told


def read_directory(path: str, remote: Remote) -> dict[str, int]:
    """Read the one file that counts all shards of a shard's directory, by base name."""
    for name in ("sizes.json", ".nv-meta/.info.json", ".nv-meta/.info.yaml"):
        content = read_tree(beside(path, name), remote)
        counts = content.get("shard_counts") if name.startswith(".nv-meta") else content
        if isinstance(counts, Mapping) and counts:
            return {base_name(str(shard)): count for shard, count in counts.items() if is_count(count)}
    return {}


def read_statistics(shards: Sequence[Shard], remote: Remote) -> dict[str, int]:
    """Read what img2dataset says of each shard: `00000_stats.json` beside `00000.tar`."""

    def read(shard: Shard) -> Any:
        name = base_name(shard.path).removesuffix(".tar") + "_stats.json"
        return read_tree(beside(shard.path, name), remote).get("successes")

    if not shards or not is_count(read(shards[0])):
        return {}
    counts = map_in_threads(read, shards, REQUESTS)
    return {shard.path: count for shard, count in zip(shards, counts, strict=True) if is_count(count)}


def is_count(value: object) -> bool:
    """Say whether a value can be a number of pairs."""
    return type(value) is int and 0 <= value < 2**32


def read_tree(path: str, remote: Remote) -> Mapping[str, Any]:
    """Read a JSON or yaml file, local or remote; empty where there is none.

    Raises:
        UserError: a local file is no JSON or yaml; of servers, some have a page for what they do not have.
    """
    content = remote.read_bytes(path) or b"{}"
    try:
        tree = yaml.safe_load(content) if base_name(path).endswith(".yaml") else json.loads(content)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        if is_remote(path):
            log.info("%s is no JSON or yaml, and tells nothing", path)
            return {}
        raise UserError(f"{path} cannot be read ({error}): mend or delete it, the shards are counted then") from error
    return tree if isinstance(tree, Mapping) else {}
