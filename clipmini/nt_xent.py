"""NT-Xent over the global batch: two views of an item pick each other among all other views.

W processes with b items each have 2 B = 2 W b views; D is the embedding width. As in `clipmini.losses`, every process
returns the mean over its own views, features are gathered once, and a block of rows of similarities exists at a time.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from clipmini import distributed
from clipmini.errors import UserError
from clipmini.tiles import Tiles


@dataclass(frozen=True)
class OtherView:
    """Which columns are a view itself and the other view of its item.

    A process has the first views of its b items and then the second ones; the columns are those of all processes.

    Attributes:
        first: the column of row 0; those of the next rows follow.
        count: b.
    """

    first: int
    count: int

    def hide_(self, tile: Tensor, rows: slice) -> None:
        """Set to -inf what a row is not compared with: itself."""
        tile.narrow(1, self.first + rows.start, len(tile)).diagonal().fill_(-torch.inf)

    def columns(self, tile: Tensor, rows: slice) -> Tensor:
        """Return the column of the other view of each row: int64 [rows, 1]."""
        numbers = torch.arange(rows.start, rows.stop, device=tile.device)
        return (self.first + (numbers + self.count) % (2 * self.count))[:, None]


class TiledNTXent(Function):
    """Each view picks the other view of its item among all but itself (https://arxiv.org/abs/2002.05709, equation 1).

    With r_i the logsumexp of row i of S without its own column, the gradient of 2 b L to S_ij is exp(S_ij - r_i) less 1
    where j is the other view of i. Rows and columns are the same features, so that both sides of a tile are theirs.
    """

    @staticmethod
    def forward(ctx: Any, views: Tensor, scale: Tensor, block_size: int | None) -> tuple[Tensor, Tensor]:
        with torch.autocast(views.device.type, enabled=False):
            columns = distributed.all_gather(views)
            labels = OtherView(distributed.rank() * len(views), len(views) // 2)
            tiles = Tiles(views, columns, scale, labels, block_size)
            row, target, rival = (tiles.empty(len(views)) for _ in range(3))
            for rows, tile, _ in tiles:
                other = labels.columns(tile, rows)
                row[rows] = tile.logsumexp(1)
                target[rows] = tile.gather(1, other)[:, 0]
                rival[rows] = tile.scatter_(1, other, -torch.inf).amax(1)
            ctx.labels, ctx.block_size = labels, block_size
            ctx.save_for_backward(views, columns, scale, row)
            accuracy = (target > rival).float().mean()
            ctx.mark_non_differentiable(accuracy)
        return (row - target).mean(), accuracy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _accuracy: Tensor) -> tuple[Tensor | None, ...]:
        views, columns, scale, row = ctx.saved_tensors
        with torch.autocast(views.device.type, enabled=False):
            tiles = Tiles(views, columns, scale, ctx.labels, ctx.block_size)
            d_views, d_columns = tiles.empty(*views.shape), tiles.empty(*columns.shape).zero_()
            d_scale, one = tiles.empty().zero_(), tiles.empty().fill_(1)
            for rows, tile, _ in tiles:
                other = ctx.labels.columns(tile, rows)
                weights = (tile - row[rows, None]).exp_()
                weights.scatter_add_(1, other, -one.expand(len(tile), 1))
                d_scale += tiles.add_gradients(weights, rows, d_views, d_columns)
            factor = gradient / len(views)
            d_views += distributed.reduce_scatter_sum(d_columns)
        return d_views.mul_(factor * scale).to(views.dtype), (d_scale * factor).to(scale.dtype), None


@torch.compiler.disable
def nt_xent(first: Tensor, second: Tensor, scale: Tensor, *, block_size: int | None = None) -> tuple[Tensor, Tensor]:
    """Compute NT-Xent, see `TiledNTXent`.

    Args:
        first, second: unit vectors [b, D] of two views of the same items, fp16 to fp64; b is the same on every process.
        scale: what similarities are multiplied with, one over the temperature, [].
        block_size: rows of S that exist at a time; None chooses.

    Returns:
        The loss [] with gradient, fp32 (fp64 of fp64 features), and the accuracy [], the share of views that pick the
        other view of their item.

    Raises:
        UserError: shapes that do not fit, on this process or between processes.
    """
    if first.ndim != 2 or second.shape != first.shape:
        raise UserError(
            f"features of two views have the shapes {list(first.shape)} and {list(second.shape)}: must be "
            "[items, width] and the same"
        )
    counts = {count for (count,) in distributed.all_gather_numbers(len(first))}
    if len(counts) > 1:
        raise UserError(
            f"the processes have {sorted(counts)} items: must be as many on each, batch_size divided by the number of "
            "processes"
        )
    return TiledNTXent.apply(torch.cat([first, second]), scale, block_size)
