"""An index on the disk: its embeddings, mapped and not read until they are compared, and what is known of each."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from clipmini.errors import UserError, tell_choices
from clipmini.evaluation.similarity import similarity
from clipmini.search.layout import FOLDERS, Kind, Layout, Row, import_pyarrow, join, read_record, read_row

SLACK = 2e-6  # of a cosine: more than what the order of a sum changes
CHUNK = 1 << 14  # embeddings that exist in fp32 at a time


class Found(NamedTuple):
    """What is nearest to each of Q queries, the nearest first.

    Attributes:
        rows: of the index, int64 [Q, k].
        scores: cosines, fp32 [Q, k].
        percentiles: the share of the index that scores lower, per cent, fp32 [Q, k].
    """

    rows: Tensor
    scores: Tensor
    percentiles: Tensor


@dataclass(frozen=True)
class Index:
    """Embeddings of one kind.

    Attributes:
        layout: of its files.
        record: what it was made of and with.
        kind: image or text.
        parts: fp16 [n, D] of each partition, mapped.
    """

    layout: Layout
    record: Row
    kind: Kind
    parts: tuple[np.ndarray, ...]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    @property
    def width(self) -> int:
        return self.parts[0].shape[1]

    def chunks(self) -> Iterator[tuple[int, Tensor]]:
        """Yield the embeddings, fp32 [n, D], each with the number of its first row."""
        first = 0
        for part in self.parts:
            for start in range(0, len(part), CHUNK):
                yield first + start, torch.from_numpy(np.array(part[start : start + CHUNK])).float()
            first += len(part)

    def embedding(self, row: int) -> Tensor:
        """Return the embedding of a row: fp32 [D]."""
        number, within = self.place(row)
        return torch.from_numpy(np.array(self.parts[number][within])).float()

    def place(self, row: int) -> tuple[int, int]:
        """Return the partition of a row, and its number there."""
        ends = np.cumsum([len(part) for part in self.parts])
        number = int(np.searchsorted(ends, row, side="right"))
        return number, row - int(ends[number - 1] if number else 0)

    def describe(self, rows: Sequence[int]) -> list[Row]:
        """Read what is known of some rows."""
        import_pyarrow()
        return [read_row(self.layout.metadata(number), within) for number, within in map(self.place, rows)]

    @torch.inference_mode()
    def find(self, queries: Tensor, top_k: int) -> Found:
        """Compare queries with every embedding, and return those with the highest cosines; of equal ones the first.

        Args:
            queries: unit vectors, fp32 [Q, D]; their scores of all rows are held, fp32 [Q, N].
        """
        queries = queries.cpu().float()
        scores = torch.empty(len(queries), len(self))
        for first, part in self.chunks():
            scores[:, first : first + len(part)] = queries @ part.T
        found = [self.choose(query, row, min(top_k, len(self))) for query, row in zip(queries, scores, strict=True)]
        return Found(*(torch.stack(parts) for parts in zip(*found, strict=True)))

    def choose(self, query: Tensor, scores: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return rows, scores and percentiles of the best of all scores, fp32 [N].

        The last bits of a product of matrices depend on where a row lies: those near the best are scored again so that
        equal rows have equal scores.
        """
        least = scores.topk(top_k).values[-1]
        candidates = (scores >= least - SLACK).nonzero()[:, 0]
        exact = torch.cat([similarity(query[None], self.gather(some))[0] for some in candidates.split(CHUNK)])
        order = exact.argsort(descending=True, stable=True)[:top_k]
        best = exact[order]
        lower = torch.searchsorted(scores.sort().values, best - SLACK)
        return candidates[order], best, 100 * lower / len(self)

    def gather(self, rows: Tensor) -> Tensor:
        """Return the embeddings of some rows, in ascending order: fp32 [n, D]."""
        parts, first = [], 0
        for part in self.parts:
            within = rows[(rows >= first) & (rows < first + len(part))] - first
            parts.append(np.array(part[within.numpy()]))
            first += len(part)
        return torch.from_numpy(np.concatenate(parts)).float()


def list_results(
    index: Index, numbers: Sequence[int], scores: Sequence[float], percentiles: Sequence[float | None]
) -> list[Row]:
    """Return a row for each result: rank, score, percentile, its row of the index, and what is known of it."""
    measured = zip(numbers, scores, percentiles, index.describe(numbers), strict=True)
    return [
        join(known, {"rank": rank, "score": score, "percentile": percentile, "row": number})
        for rank, (number, score, percentile, known) in enumerate(measured, 1)
    ]


def open_index(directory: Path, among: str | None = None) -> Index:
    """Open an index.

    Args:
        among: image or text; None takes pictures if there are any.

    Raises:
        UserError: there is none, it is not complete, or has no such embeddings.
    """
    record = read_record(directory, "index")
    layout = Layout(directory, record["partitions"], tuple(record["kinds"]))
    if among is not None and among not in layout.kinds:
        raise UserError(f"among={among}: {directory} has no such embeddings{tell_choices(among, layout.kinds)}")
    if missing := layout.missing():
        raise UserError(
            f"index={directory}: {len(missing)} of {layout.partitions} partitions are missing, first {missing[0]}: the "
            "`clipmini embed` that made it goes on"
        )
    kind: Kind = next(kind for kind in layout.kinds if among in (kind, None))
    parts = tuple(read_part(layout, kind, number, record["width"]) for number in range(layout.partitions))
    index = Index(layout, record, kind, parts)
    if not len(index):
        raise UserError(f"index={directory}: is empty")
    return index


def read_part(layout: Layout, kind: Kind, number: int, width: int) -> np.ndarray:
    """Map the embeddings of a partition: fp16 [n, D].

    Raises:
        UserError: they cannot be read, or are others than the index says.
    """
    path = layout.embeddings(kind, number)
    try:
        part = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"index={layout.directory}: cannot read {path.name} in {FOLDERS[kind]}: {error}") from error
    if part.ndim != 2 or part.shape[1] != width or part.dtype.kind != "f":
        raise UserError(
            f"index={layout.directory}: {path.name} is {part.dtype} {list(part.shape)}, not fp16 [n, {width}]"
        )
    return part
