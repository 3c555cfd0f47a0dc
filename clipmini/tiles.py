"""Similarities of the pictures of one process with the captions of all, a block of rows at a time.

Rows are the b pictures of this process. Columns are the B = W b captions of all W processes, and after them the hard
negatives, captions that belong to no picture, if there are any: C columns in all. D is the embedding width. A block of
rows makes a tile [rows, C]; no more than one tile of similarities and one of weights exist at a time.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol, TypeAlias

import torch
from torch import Tensor

from clipmini.annotations import Limits

Duplicates: TypeAlias = Literal["ignore", "mask", "share"]
TILE_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}  # of the two tiles together: what caches hold, what makes launches few
MIN_ROWS = 128  # a block of fewer rows reads the columns too often


class Hides(Protocol):
    """Which columns a row is not compared with."""

    def hide_(self, tile: Tensor, rows: slice) -> Tensor | None:
        """Set them to -inf in a tile, and return what else is to be known of it."""


@dataclass(frozen=True)
class Labels:
    """Which columns are right for a row.

    Attributes:
        first: the column of row 0; those of the next rows follow.
        size: B, columns that are captions of pictures.
        duplicates: what equal captions of other pictures are: wrong (`ignore`), left out (`mask`) or right (`share`).
        ids: of the captions of the rows, int64 [b]; None for `ignore`.
        column_ids: of all columns, int64 [C]; None for `ignore`.
        absent: columns that are no captions at all, bool [C]; None if all are.
    """

    first: int
    size: int
    duplicates: Duplicates
    ids: Tensor | None = None
    column_ids: Tensor | None = None
    absent: Tensor | None = None

    def own(self, tile: Tensor, rows: slice) -> Tensor:
        """Return the view of each row's own caption: [rows]."""
        return tile.narrow(1, self.first + rows.start, len(tile)).diagonal()

    def equal(self, rows: slice) -> Tensor:
        """Say which columns have a row's caption, its own among them: bool [rows, C]."""
        assert self.ids is not None and self.column_ids is not None
        return self.ids[rows, None] == self.column_ids

    def hide_(self, tile: Tensor, rows: slice) -> Tensor | None:
        """Set to -inf what a row is not compared with.

        Returns:
            Which captions of pictures are right for a row, bool [rows, B]; None if only its own is.
        """
        if self.absent is not None:
            tile.masked_fill_(self.absent, -torch.inf)
        if self.duplicates == "ignore":
            return None
        equal = self.equal(rows)
        if self.duplicates == "mask":
            self.own(equal, rows).fill_(False)
            tile.masked_fill_(equal, -torch.inf)
            return None
        tile[:, self.size :].masked_fill_(equal[:, self.size :], -torch.inf)  # a hard negative that is right is none
        return equal[:, : self.size]

    @cached_property
    def counts(self) -> Tensor:
        """How many captions of pictures are right for each row, with `share`: int64 [b]."""
        assert self.ids is not None and self.column_ids is not None
        ids, counts = self.column_ids[: self.size].unique(return_counts=True)  # sorted
        return counts[torch.searchsorted(ids, self.ids)]

    def probabilities(self, right: Tensor, rows: slice, dtype: torch.dtype) -> Tensor:
        """Return how likely each caption of a picture shall be for a row: [rows, B]."""
        return right / self.counts[rows, None].to(dtype)

    def entropy(self, dtype: torch.dtype) -> Tensor | float:
        """Return the entropy of these probabilities, the mean over rows."""
        return self.counts.to(dtype).log().mean() if self.duplicates == "share" else 0.0

    def rivals(self, tile: Tensor, rows: slice, right: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the largest similarity of each row [rows] and of each caption [B] with what is not right for it."""
        if right is not None:
            others = tile.clone()
            others[:, : self.size].masked_fill_(right, -torch.inf)
            return others.amax(1), others[:, : self.size].amax(0)
        own = self.own(tile, rows)
        kept = own.clone()
        own.fill_(-torch.inf)
        result = tile.amax(1), tile[:, : self.size].amax(0)
        own.copy_(kept)
        return result


class Tiles:
    """The tiles of scale * rows @ columns^T, in fp32 or, for fp64 features, in fp64.

    Args:
        rows: features [b, D].
        columns: features [C, D] of the same dtype.
        scale: [].
        labels: what is hidden.
        block_size: rows of a tile; None takes as many as `TILE_BYTES` hold.

    Raises:
        UserError: no rows in a tile.
    """

    def __init__(self, rows: Tensor, columns: Tensor, scale: Tensor, labels: Hides, block_size: int | None) -> None:
        Limits(least=1).check("loss.block_size", block_size, int | None)
        self.rows = rows
        # Half precision is multiplied as it is and summed in fp32 where torch can do that (CUDA, torch 2.8 and newer).
        is_half = rows.dtype in (torch.bfloat16, torch.float16)
        self.mixed = is_half and rows.is_cuda and "dtype" in torch.ops.aten.mm.overloads()
        self.columns = columns if self.mixed else widen(columns)
        self.dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
        self.scale = scale.detach().to(self.dtype)
        self.labels = labels
        self.block_size = block_size or self.choose_block_size()

    def choose_block_size(self) -> int:
        """Return the rows of a tile."""
        limit = TILE_BYTES.get(self.rows.device.type, TILE_BYTES["cuda"])
        return max(MIN_ROWS, limit // (2 * self.dtype.itemsize * len(self.columns)))

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """Yield rows, their tile with what is hidden at -inf, and what is right for them, see `Labels.hide_`."""
        for start in range(0, len(self.rows), self.block_size):
            rows = slice(start, min(start + self.block_size, len(self.rows)))
            tile = self.multiply(rows)
            yield rows, tile, self.labels.hide_(tile, rows)

    def multiply(self, rows: slice) -> Tensor:
        """Return one tile: [rows, C]."""
        if self.mixed:
            return torch.mm(self.rows[rows], self.columns.T, out_dtype=self.dtype).mul_(self.scale)
        return (widen(self.rows[rows]) * self.scale) @ self.columns.T

    def empty(self, *shape: int) -> Tensor:
        """Make a tensor to accumulate in."""
        return self.rows.new_empty(shape, dtype=self.dtype)

    def add_gradients(self, weights: Tensor, rows: slice, d_rows: Tensor, d_columns: Tensor) -> Tensor:
        """Set weights @ columns in the rows of `d_rows` [b, D], and add weights^T @ rows to `d_columns` [C, D].

        Returns:
            What the tile says of the scale, []: the sum of weights times similarities without the scale.
        """
        features = self.rows[rows]
        if self.mixed:
            weights = weights.to(features.dtype)
            d_rows[rows] = torch.mm(weights, self.columns, out_dtype=self.dtype)
            d_columns += torch.mm(weights.T, features, out_dtype=self.dtype)
        else:
            torch.mm(weights, self.columns, out=d_rows[rows])
            d_columns.addmm_(weights.T, widen(features))
        return (d_rows[rows] * features).sum()


def widen(features: Tensor) -> Tensor:
    """Return features in at least fp32."""
    return features if features.dtype == torch.float64 else features.float()
