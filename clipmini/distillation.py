"""What a student learns from a teacher: to make the same features, and the same similarities.

Shapes are those of `clipmini.losses`; the teacher's embeddings may have another width. As there, every process returns
the mean over its own pairs, captions are gathered once, and a block of rows of similarities exists at a time.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from clipmini import distributed
from clipmini.errors import UserError
from clipmini.losses import check_inputs, count_right, logsumexp_of_all
from clipmini.tiles import MIN_ROWS, Labels, Tiles, widen


def feature_distance(features: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean squared difference of features and a teacher's, over pairs and dimensions.

    CLIP-KD's FD (https://arxiv.org/abs/2307.12732; `fd_loss` in src/open_clip/loss.py of its repository).

    Args:
        features, teacher: unit vectors [b, D], fp16 to fp64.

    Returns:
        [] with gradient, fp32 (fp64 of fp64 features).
    """
    with torch.autocast(features.device.type, enabled=False):
        features = widen(features)
        return F.mse_loss(features, teacher.to(features.dtype))


class TiledDistillation(Function):
    """Each picture shall be as like each caption as a teacher finds it, and each caption each picture.

    L = 1/2 [KL(softmax(Z) || softmax(S)) + KL(softmax(Z^T) || softmax(S^T))], means over rows, S and Z the similarities
    of student and teacher (MobileCLIP, https://arxiv.org/abs/2311.17049). With r, c the logsumexp of rows and columns
    of S and q, d those of Z, the divergence of row i is sum_j exp(Z_ij - q_i) (Z_ij - S_ij) + r_i - q_i, and the
    gradient of 2 b L to S_ij is exp(S_ij - r_i) + exp(S_ij - c_j) - exp(Z_ij - q_i) - exp(Z_ij - d_j). So the forward
    pass keeps these, and the backward pass makes the tiles again. A column's sum is kept with weights that add up to 1
    over the rows seen so far, and put together over processes as its logsumexp is.
    """

    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        text: Tensor,
        scale: Tensor,
        teacher_image: Tensor,
        teacher_text: Tensor,
        teacher_scale: Tensor,
        block_size: int | None,
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(image.device.type, enabled=False):
            count, columns = len(image), distributed.all_gather(text)
            labels = Labels(distributed.rank() * count, len(columns), "ignore")
            tiles = Tiles(image, columns, scale, labels, block_size)
            if block_size is None:  # there are more tiles at a time than with other losses
                tiles.block_size = max(MIN_ROWS, tiles.block_size // 2)
            teacher_columns = distributed.all_gather(teacher_text)
            teacher = Tiles(teacher_image, teacher_columns, teacher_scale, labels, tiles.block_size)
            row, teacher_row, row_gap, own, row_rival = (tiles.empty(count) for _ in range(5))
            column, teacher_column, column_rival = (tiles.empty(len(columns)).fill_(-torch.inf) for _ in range(3))
            column_gap = tiles.empty(len(columns)).zero_()
            for rows, tile, _ in tiles:
                of_teacher = teacher.multiply(rows)
                row[rows], teacher_row[rows] = tile.logsumexp(1), of_teacher.logsumexp(1)
                gap = of_teacher - tile
                row_gap[rows] = ((of_teacher - teacher_row[rows, None]).exp_() * gap).sum(1)
                so_far = torch.logaddexp(teacher_column, of_teacher.logsumexp(0))
                column_gap *= (teacher_column - so_far).exp_()
                column_gap += (of_teacher.sub_(so_far).exp_() * gap).sum(0)
                teacher_column = so_far
                column = torch.logaddexp(column, tile.logsumexp(0))
                own[rows] = labels.own(tile, rows)
                row_rival[rows], rival = labels.rivals(tile, rows, None)
                column_rival = torch.maximum(column_rival, rival)
            column, of_all = logsumexp_of_all(torch.stack([column, teacher_column]))
            column_gap = distributed.all_reduce_sum(column_gap * (teacher_column - of_all).exp())
            teacher_column = of_all

            mine = slice(labels.first, labels.first + count)
            by_row, by_column = row_gap + row - teacher_row, (column_gap + column - teacher_column)[mine]
            ctx.labels, ctx.block_size = labels, tiles.block_size
            ctx.save_for_backward(image, columns, scale, row, column, teacher_image, teacher_columns, teacher_scale)
            ctx.teacher_sums = teacher_row, teacher_column
            accuracy = count_right(own, row_rival, distributed.all_reduce_max(column_rival)[mine])
            ctx.mark_non_differentiable(accuracy)
        return (by_row.mean() + by_column.mean()) / 2, accuracy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _accuracy: Tensor) -> tuple[Tensor | None, ...]:
        image, columns, scale, row, column, teacher_image, teacher_columns, teacher_scale = ctx.saved_tensors
        teacher_row, teacher_column = ctx.teacher_sums
        with torch.autocast(image.device.type, enabled=False):
            tiles = Tiles(image, columns, scale, ctx.labels, ctx.block_size)
            teacher = Tiles(teacher_image, teacher_columns, teacher_scale, ctx.labels, ctx.block_size)
            d_image, d_columns = tiles.empty(*image.shape), tiles.empty(*columns.shape).zero_()
            d_scale = tiles.empty().zero_()
            for rows, tile, _ in tiles:
                of_teacher = teacher.multiply(rows)
                weights = (tile - row[rows, None]).exp_()
                weights += tile.sub_(column).exp_()
                weights -= (of_teacher - teacher_row[rows, None]).exp_()
                weights -= of_teacher.sub_(teacher_column).exp_()
                d_scale += tiles.add_gradients(weights, rows, d_image, d_columns)
            factor = gradient / (2 * len(image))
            d_text = distributed.reduce_scatter_sum(d_columns)
            parts = [part.mul_(factor * scale).to(image.dtype) for part in (d_image, d_text)]
        return *parts, (d_scale * factor).to(scale.dtype), None, None, None, None


@torch.compiler.disable
def similarity_distillation(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    teacher_image: Tensor,
    teacher_text: Tensor,
    teacher_scale: Tensor,
    *,
    block_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the divergence from a teacher's similarities, see `TiledDistillation`.

    Args:
        image, text: unit vectors [b, D] of pairs, fp16 to fp64; b is the same on every process.
        scale: what similarities are multiplied with, [].
        teacher_image, teacher_text: the teacher's unit vectors [b, T] of the same pairs, which get no gradient.
        teacher_scale: what its similarities are multiplied with, [].
        block_size: rows of S that exist at a time; None chooses.

    Returns:
        The loss [] with gradient, fp32 (fp64 of fp64 features), and the accuracy [], the share of pictures and captions
        that pick each other.

    Raises:
        UserError: shapes that do not fit, on this process or between processes; a scale that is no number.
    """
    check_inputs(image, text, scale, "ignore", None, None, None)
    for name, features in (("image", teacher_image), ("text", teacher_text)):
        if features.ndim != 2 or len(features) != len(image) or features.shape != teacher_image.shape:
            raise UserError(
                f"the teacher's {name} features have the shape {list(features.shape)}: must be [{len(image)}, width]"
            )
    dtype = torch.promote_types(image.dtype, text.dtype)
    of_teacher = torch.float64 if dtype == torch.float64 else torch.float32
    theirs = teacher_image.to(of_teacher), teacher_text.to(of_teacher), teacher_scale
    return TiledDistillation.apply(image.to(dtype), text.to(dtype), scale, *theirs, block_size)
