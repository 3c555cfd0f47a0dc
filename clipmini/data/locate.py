"""What `data.train` names: the shards of a directory, a glob, a brace pattern or a list, on a disk or far away."""

import contextlib
import errno
import functools
import glob
import itertools
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from braceexpand import braceexpand

from clipmini.data.index import Shard
from clipmini.data.remote import PIPE, Remote, is_remote
from clipmini.data.threads import map_in_threads
from clipmini.errors import UserError
from clipmini.files import tell_neighbours

COMPRESSED = (".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")
REQUESTS = 32  # at a time, where each shard has to be asked for by itself
# What tells of a change, in the words of each file system; the size, which is padded, may stay as it is.
DATES = ("mtime", "LastModified", "last_modified", "Last-Modified")
VERSION_KEYS = ("ETag", "etag", "md5Hash", "generation", *DATES, "blob_id", "xet_hash")


def locate(
    shards: str | Sequence[str],
    key: str,
    remote: Remote,
    *,
    allow_pipe: bool,
    pipe_key: str | None = "data.allow_pipe",
    keep_missing: bool = False,
) -> list[Shard]:
    """List the shards that a pattern names, in order, with their sizes, not yet counted.

    Args:
        shards: a directory, a glob, a brace pattern, several of them joined by `::` as open_clip does, or a list.
        key: of the config, for messages.
        remote: how to reach what is not local.
        allow_pipe: whether commands may be run.
        pipe_key: of the config, that says so; None: nothing does.
        keep_missing: list shards that are named but not there, instead of an error.

    Raises:
        UserError: nothing is found, or it is not something that can be read.
    """
    if not shards:
        raise UserError(f"{key}={shards!r}: no shards")
    if not isinstance(shards, str) or ("::" in shards and not shards.startswith(PIPE)):
        patterns = shards.split("::") if isinstance(shards, str) else shards
        again = functools.partial(locate, allow_pipe=allow_pipe, pipe_key=pipe_key, keep_missing=keep_missing)
        return list(itertools.chain.from_iterable(again(part, key, remote) for part in patterns))
    if shards.startswith(PIPE):
        if not allow_pipe:
            hint = f"; {pipe_key}=true allows that" if pipe_key else ", which is not done here"
            raise UserError(f"{key}={shards}: would run a command in a shell for every shard{hint}")
        return [Shard(path, -1) for path in expand(shards, key)]
    shards = shards.removeprefix("file://")
    if is_remote(shards):
        found = locate_remote(shards, key, remote, keep_missing=keep_missing)
    else:
        found = locate_local(shards, key, keep_missing=keep_missing)
    for shard in found:
        if base_name(shard.path).endswith(COMPRESSED):
            raise UserError(
                f"{key}={shards}: {shard.path} is compressed: samples are read at random, so shards must be plain "
                ".tar; decompress it once (pictures in it are compressed already)"
            )
    return found


def expand(pattern: str, key: str) -> list[str]:
    """Write out the braces of a pattern.

    Raises:
        UserError: they do not match.
    """
    try:
        return list(braceexpand(pattern))
    except ValueError as error:
        raise UserError(f"{key}={pattern}: {error}") from error


def is_shard(path: str) -> bool:
    """Say whether a file of a listing is a shard, or a compressed one, which is refused rather than passed over."""
    name = base_name(path)
    return name.endswith((".tar", *COMPRESSED)) and not name.startswith(".")


def local_shard(path: str) -> Shard:
    """Describe a local file.

    Raises:
        OSError: it is not there, or is no file: reading a named pipe would never end.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "is not a file", path)
    return Shard(path, -1, status.st_size, str(status.st_mtime_ns))


def locate_local(shards: str, key: str, *, keep_missing: bool = False) -> list[Shard]:
    """List the local files of a pattern."""
    try:
        if os.path.isdir(shards):
            paths = [os.path.join(shards, name) for name in sorted(os.listdir(shards)) if is_shard(name)]
            if not paths:
                raise UserError(f"{key}={shards}: no shards found, the directory has no .tar files")
        else:
            paths = [path for part in expand(shards, key) for path in sorted(glob.glob(part)) or [part]]
        paths = [os.path.join(".", path) if is_remote(path) else path for path in paths]  # a file may be named pipe:...
        missing = {path for path in paths if not os.path.exists(path)}
        if missing and not (keep_missing and all(map(is_shard, missing))):
            hint = tell_neighbours(min(missing))
            text = f"no shards found, {min(missing)} does not exist (of {len(paths)} shards){hint}"
            raise UserError(f"{key}={shards}: {text}")
        return [Shard(path, -1) if path in missing else local_shard(path) for path in paths]
    except OSError as error:
        raise UserError(f"{key}={shards}: {error.filename} {error.strerror}") from error


def locate_remote(shards: str, key: str, remote: Remote, *, keep_missing: bool = False) -> list[Shard]:
    """List the shards of a URL: of a directory or a glob by a listing, else each by its name."""
    urls = expand(shards, key)
    file_system, _ = remote.file_system(urls[0])
    ask = functools.partial(ask_file_system, remote, file_system, key)
    try:
        found = list(itertools.chain.from_iterable(list_url(url, ask, file_system) for url in urls))
    except FileNotFoundError as error:
        raise UserError(f"{key}={shards}: no shards found, {error} does not exist") from error
    if not found:
        raise UserError(f"{key}={shards}: no shards found, there are no .tar files")
    if len(urls) > REQUESTS and not is_http(shards):
        # One listing in place of a request for each: file systems keep it, and answer from it.
        with contextlib.suppress(UserError, FileNotFoundError):  # there may be a right to read, but not to list
            ask("ls", file_system._parent(file_system._strip_protocol(urls[0])), detail=True)

    def complete(shard: Shard) -> Shard:
        if shard.version:
            return shard
        try:
            return describe(shard.path, ask("info", file_system._strip_protocol(shard.path)))
        except FileNotFoundError as error:
            if keep_missing:
                return shard
            raise UserError(f"{key}={shards}: {shard.path} does not exist (of {len(found)} shards)") from error

    return list(map_in_threads(complete, found, REQUESTS))


def is_http(url: str) -> bool:
    """Say whether a URL is of a server without directories."""
    return url.startswith(("http://", "https://"))


def ask_file_system(remote: Remote, file_system: Any, key: str, method: str, path: str, **options: Any) -> Any:
    """Call a method of a file system, patiently; the key is for messages."""
    what = f"{key}={file_system.unstrip_protocol(path)}"
    return remote.ask(what, functools.partial(getattr(file_system, method), path, **options))


def list_url(url: str, ask: Callable[..., Any], file_system: Any) -> list[Shard]:
    """List the shards of a directory or a glob as the listing describes them; any other name is taken as it is."""
    path = file_system._strip_protocol(url)
    if glob.has_magic(split_query(path)[0]):
        entries = list(ask("glob", path, detail=True).values())
    elif is_http(url) or is_shard(path):
        return [Shard(url, -1)]
    else:
        entries = [entry for entry in ask("ls", path, detail=True) if is_shard(entry["name"])]
    entries = sorted(entries, key=lambda entry: entry["name"])
    return [describe(file_system.unstrip_protocol(entry["name"]), entry) for entry in entries]


def describe(url: str, entry: Mapping[str, Any]) -> Shard:
    """Describe a file by what its file system says of it; without a version if that is less than its size."""
    size = entry.get("size")
    version = next((str(entry[name]) for name in VERSION_KEYS if entry.get(name) is not None), "")
    return Shard(url, -1, -1, version) if size is None else Shard(url, -1, int(size), version or f"size {size}")


def split_query(path: str) -> tuple[str, str]:
    """Cut a URL of a web server before its query."""
    base, mark, query = path.partition("?") if is_http(path) else (path, "", "")
    return base, mark + query


def parent(path: str) -> str:
    """Return the directory of a shard, for a path as for a URL."""
    return split_query(path)[0].rsplit("/", 1)[0] if is_remote(path) else os.path.dirname(path) or "."


def real_path(path: str) -> str:
    """Return the one path of a shard that may be named in many ways; what is remote has as many as names."""
    return path if is_remote(path) else os.path.realpath(path)


def base_name(path: str) -> str:
    """Return the last part of a shard's path."""
    return split_query(path)[0].rsplit("/", 1)[-1]


def beside(path: str, name: str) -> str:
    """Return the path of another file in the directory of a shard."""
    return f"{parent(path)}/{name}{split_query(path)[1]}"
