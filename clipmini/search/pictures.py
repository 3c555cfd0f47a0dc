"""The pictures of an index, where they were when it was made: for a page that shows them."""

import functools
import os
import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clipmini.data.health import Fault
from clipmini.data.remote import is_remote
from clipmini.errors import UserError
from clipmini.search.inputs import is_table
from clipmini.search.layout import Row
from clipmini.shards.inputs import Part, fingerprint, group_members, read_members
from clipmini.shards.packed import DIGEST
from clipmini.shards.tables import open_table

PATTERN = re.compile(r"[*?\[{]|::")  # of paths, or several of them
SHARD = ".tar/"  # between the path of a shard and the key of a sample
STEP = 100  # rows of a table of text between two whose places are kept


class PictureReader:
    """Reads the pictures of an index, and nothing outside of a directory.

    Args:
        source: what was embedded: a folder, a table or shards.
        allowed: the directory below which pictures may be; None: where what was embedded is.
        table: of pictures that a table holds.
    """

    def __init__(self, source: str, allowed: str | None, table: "TablePictures | None" = None) -> None:
        self.table = table
        base = os.path.dirname(source) if is_table(source) else source
        while PATTERN.search(base) and not os.path.exists(base):  # names of directories may hold such signs too
            base = os.path.dirname(base)
        self.base = os.path.abspath(base)
        self.allowed = os.path.realpath(self.base if allowed is None else allowed)

    def read(self, image_path: object, row: object = None) -> bytes:
        """Read the picture that a row of the index names.

        Args:
            row: of the table, where that holds the picture itself.

        Raises:
            Fault: there is none, or it is somewhere else.
        """
        if isinstance(row, int) and self.table is not None:
            self.check(self.table.path)
            return self.table.read(row)
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


class TablePictures:
    """Reads pictures out of the rows of a table, one at a time: some rows around each are in memory with it.

    Args:
        path: of the table.
        image_key: its column with the pictures.
        digest: of the table when it was embedded.
    """

    def __init__(self, path: str, image_key: str, digest: str) -> None:
        self.path = path
        self.image_key = image_key
        self.digest = digest
        self.reading = threading.Lock()

    @functools.cached_property
    def parts(self) -> Sequence[Part]:
        """Find where the rows are: a table of text is read through once for that."""
        return open_table(self.path, self.image_key, None, STEP).parts

    def read(self, row: int) -> bytes:
        """Read the picture in a row, counted from 1.

        Raises:
            Fault: there is none in it, or the table is not what was embedded.
        """
        name, (number, within) = os.path.basename(self.path), divmod(row - 1, STEP)
        try:
            with self.reading:
                if fingerprint([(name, os.stat(self.path))]) != self.digest:
                    raise Fault("picture", f"{name} has changed since it was embedded")
                found = self.parts[number].items(within, within + 1) if 0 <= number < len(self.parts) else iter(())
                sample = next((load() for _, load in found), None)
        except (OSError, UserError) as error:
            raise Fault("picture", f"{name}: {error}") from error
        if sample is None or sample.row is None:  # in its place may be a path, to whatever
            raise Fault("picture", f"row {row} of {name} holds no picture")
        return sample.picture


@functools.lru_cache(maxsize=8)
def list_members(path: str, _: int) -> dict[str, Any]:
    """List the members of the samples of a shard, again when its time has changed."""
    return group_members(path)[0]


def open_pictures(record: Row, allowed: str | None) -> PictureReader:
    """Return what reads the pictures of an index; see `PictureReader`.

    Args:
        record: of the index.
    """
    path, image_key = record["input"], record.get("image_key")
    table = None if image_key is None or not is_table(path) else TablePictures(path, image_key, record[DIGEST])
    return PictureReader(path, allowed, table)


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
