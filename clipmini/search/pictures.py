"""The pictures of an index, where they were when it was made: for a page that shows them."""

import functools
import os
import re
import threading
from pathlib import Path
from typing import Any

from clipmini.data.health import Fault
from clipmini.data.remote import is_remote
from clipmini.search.inputs import is_table
from clipmini.shards.inputs import group_members, read_members

SHARD = ".tar/"  # between the path of a shard and the key of a sample


class PictureReader:
    """Reads the pictures of an index, and nothing outside of a directory.

    Args:
        source: what was embedded: a folder, a table or shards.
        allowed: the directory below which pictures may be; None: where what was embedded is.
    """

    def __init__(self, source: str, allowed: str | None) -> None:
        whole = re.split(r"[*?\[{]|::", source)[0]  # of a pattern, what comes before it
        is_part = is_table(source) or whole != source
        self.base = os.path.abspath(os.path.dirname(whole) if is_part else source)
        self.allowed = os.path.realpath(self.base if allowed is None else allowed)

    def read(self, image_path: object) -> bytes:
        """Read the picture that a row of the index names.

        Raises:
            Fault: there is none, or it is somewhere else.
        """
        if not isinstance(image_path, str) or is_remote(image_path):
            raise Fault("picture", "it is in no file of this machine")
        shard, found, key = image_path.partition(SHARD)
        path = os.path.join(self.base, shard + SHARD[:-1] if found else image_path)
        self.check(path)
        if found:
            return read_member(path, key)
        try:
            return Path(path).read_bytes()
        except OSError as error:
            raise Fault("picture", f"{image_path}: {error.strerror}") from error

    def check(self, path: str) -> None:
        """See that a path, with all links followed, is below what is allowed.

        Raises:
            Fault: it is not.
        """
        real = os.path.realpath(path)
        # What was embedded may be a shard itself.
        if real != self.allowed and not real.startswith(self.allowed.rstrip(os.sep) + os.sep):
            raise Fault("picture", f"it is outside of {self.allowed}: pictures= allows another directory")


@functools.lru_cache(maxsize=8)
def list_members(path: str, _: int) -> dict[str, Any]:
    """List the members of the samples of a shard, again when its time has changed."""
    return group_members(path)[0]


walking = threading.Lock()  # of a shard: a page asks for many of its pictures at once


def read_member(path: str, key: str) -> bytes:
    """Read the picture of a sample of a shard.

    Raises:
        Fault: there is none.
    """
    try:
        with walking:
            members = list_members(path, os.stat(path).st_mtime_ns).get(key, {})
        pictures = {name: member for name, member in members.items() if name not in ("txt", "json")}
        (data,) = read_members(path, pictures).values()
    except (OSError, ValueError) as error:
        raise Fault("picture", f"{os.path.basename(path)} has no picture {key}") from error
    return data
