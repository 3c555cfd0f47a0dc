"""Contrastive losses over the global batch: exact on any number of processes, memory linear in the batch.

W processes with b pairs each make B = W b pairs; D is the embedding width, S = scale * I T^T are the similarities of
pictures I with captions T. Every process returns the mean over its own b pairs, so that the mean over processes, which
DDP takes of the gradients, is the loss of the global batch. Only captions are gathered: b rows of S belong to a
process, and are made a block at a time, see `clipmini.tiles`.
"""

from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from clipmini import distributed
from clipmini.errors import UserError
from clipmini.tiles import Duplicates, Labels, Tiles


class TiledInfoNCE(Function):
    """Each picture picks its caption among all, and each caption its picture.

    L = 1/2 [CE(S, right) + CE(S^T, right)] (https://arxiv.org/abs/2103.00020, figure 3). With r_i and c_j the logsumexp
    of row i and column j of S, the gradient of 2 b L to S_ij is exp(S_ij - r_i) + exp(S_ij - c_j) - 2 [j is right for
    i]. So the forward pass keeps r and c, 2 B numbers, and the backward pass makes the tiles again. Columns run over
    the rows of all processes: their logsumexp is put together by a maximum and a sum over processes.

    Where n captions are right, each is with a probability of 1/n (https://arxiv.org/abs/2004.11362, equation 2), and
    their entropy log n is subtracted, so that the least loss is 0. Hard negatives are columns that only rows see.
    """

    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        text: Tensor,
        negative: Tensor | None,
        scale: Tensor,
        labels: Labels,
        block_size: int | None,
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(image.device.type, enabled=False):
            columns = gather_columns(text, negative)
            tiles = Tiles(image, columns, scale, labels, block_size)
            row, target, own, row_rival = (tiles.empty(len(image)) for _ in range(4))
            column, column_rival = (tiles.empty(labels.size).fill_(-torch.inf) for _ in range(2))
            for rows, tile, right in tiles:
                pairs = tile[:, : labels.size]
                row[rows] = tile.logsumexp(1)
                column = torch.logaddexp(column, pairs.logsumexp(0))
                own[rows] = labels.own(tile, rows)
                row_rival[rows], rival = labels.rivals(tile, rows, right)
                column_rival = torch.maximum(column_rival, rival)
                if right is None:
                    target[rows] = own[rows]
                else:
                    target[rows] = (pairs * labels.probabilities(right, rows, tiles.dtype)).sum(1)
            largest, column_rival = distributed.all_reduce_max(torch.stack([column, column_rival]))
            column = logsumexp_of_all(column, largest)

            mine = slice(labels.first, labels.first + len(image))
            loss = (row.mean() + column[mine].mean()) / 2 - target.mean() - labels.entropy(tiles.dtype)
            ctx.labels, ctx.block_size, ctx.has_negative = labels, block_size, negative is not None
            ctx.save_for_backward(image, columns, scale, row, column)
            accuracy = count_right(own, row_rival, column_rival[mine])
            ctx.mark_non_differentiable(accuracy)
        return loss, accuracy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        image, columns, scale, row, column = ctx.saved_tensors
        labels: Labels = ctx.labels
        with torch.autocast(image.device.type, enabled=False):
            tiles = Tiles(image, columns, scale, labels, ctx.block_size)
            d_image, d_columns = tiles.empty(*image.shape), tiles.empty(*columns.shape).zero_()
            d_scale = tiles.empty().zero_()
            for rows, tile, right in tiles:
                weights = (tile - row[rows, None]).exp_()
                pairs = weights[:, : labels.size]
                pairs += tile[:, : labels.size].sub_(column).exp_()
                # Before anything is rounded to half precision: what is left of a caption picked well is small.
                if right is None:
                    labels.own(weights, rows).sub_(2)
                else:
                    pairs -= 2 * labels.probabilities(right, rows, tiles.dtype)
                d_scale += tiles.add_gradients(weights, rows, d_image, d_columns)
            factor = gradient / (2 * len(image))
            d_text, d_negative = scatter_columns(d_columns, labels.size, ctx.has_negative)
            parts = [
                part if part is None else part.mul_(factor * scale).to(image.dtype)
                for part in (d_image, d_text, d_negative)
            ]
        return *parts, (d_scale * factor).to(scale.dtype), None, None


class TiledSigLIP(Function):
    """Each picture and caption of the global batch are told apart as a pair or not, one by one.

    L = -1/b sum_ij log sigmoid(z_ij (S_ij + bias)), z_ij = 1 for what is right and -1 else
    (https://arxiv.org/abs/2303.15343, algorithm 1). The sum needs nothing from other tiles, so that one pass gives the
    loss and its gradients, which are kept for the backward pass in place of any tile.
    """

    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        text: Tensor,
        negative: Tensor | None,
        scale: Tensor,
        bias: Tensor,
        labels: Labels,
        block_size: int | None,
        needs_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(image.device.type, enabled=False):
            columns = gather_columns(text, negative)
            tiles = Tiles(image, columns, scale, labels, block_size)
            own, row_rival = tiles.empty(len(image)), tiles.empty(len(image))
            column_rival = tiles.empty(labels.size).fill_(-torch.inf)
            loss, d_scale, d_bias = (tiles.empty().zero_() for _ in range(3))
            if needs_gradient:
                d_image, d_columns = tiles.empty(*image.shape), tiles.empty(*columns.shape).zero_()
            for rows, tile, right in tiles:
                own[rows] = labels.own(tile, rows)
                row_rival[rows], rival = labels.rivals(tile, rows, right)
                column_rival = torch.maximum(column_rival, rival)
                flip_right_(labels, tile.add_(bias).neg_(), rows, right)  # z_ij (S_ij + bias)
                # A few rows at a time: it takes two more tensors of the same size.
                loss -= sum(F.logsigmoid(part).sum() for part in tile.split(-(-len(tile) // 8)))
                if needs_gradient:
                    weights = flip_right_(labels, tile.neg_().sigmoid_(), rows, right)
                    d_bias += weights.sum()
                    d_scale += tiles.add_gradients(weights, rows, d_image, d_columns)
            mine = slice(labels.first, labels.first + len(image))
            accuracy = count_right(own, row_rival, distributed.all_reduce_max(column_rival)[mine])
            ctx.mark_non_differentiable(accuracy)
            if needs_gradient:
                # fp16 could not hold them: they are not scaled yet by what keeps fp16 gradients in its range.
                dtype = tiles.dtype if image.dtype == torch.float16 else image.dtype
                parts = [d_image, *scatter_columns(d_columns, labels.size, negative is not None)]
                factor = tiles.scale / len(image)
                parts = [part if part is None else part.mul_(factor).to(dtype) for part in parts]
                ctx.save_for_backward(*parts, d_scale / len(image), d_bias / len(image))
                ctx.dtypes = image.dtype, scale.dtype, bias.dtype
        return loss / len(image), accuracy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        *parts, d_scale, d_bias = ctx.saved_tensors
        dtype, scale_dtype, bias_dtype = ctx.dtypes
        features = [part if part is None else (part * gradient).to(dtype) for part in parts]
        return *features, (d_scale * gradient).to(scale_dtype), (d_bias * gradient).to(bias_dtype), None, None, None


def flip_right_(labels: Labels, tile: Tensor, rows: slice, right: Tensor | None) -> Tensor:
    """Change the sign of what is right, and return the tile."""
    if right is None:
        labels.own(tile, rows).neg_()
    else:
        pairs = tile[:, : labels.size]
        pairs.copy_(torch.where(right, -pairs, pairs))
    return tile


def logsumexp_of_all(column: Tensor, largest: Tensor | None = None) -> Tensor:
    """Put the logsumexp of columns [..., B] over the rows of a process together to that over the rows of all.

    Args:
        largest: of all processes, if it is known.
    """
    largest = distributed.all_reduce_max(column) if largest is None else largest
    return largest + distributed.all_reduce_sum((column - largest).exp()).log()


def count_right(own: Tensor, row_rival: Tensor, column_rival: Tensor) -> Tensor:
    """Return the share of pictures and captions that pick what is right, []; a tie is a miss."""
    return ((own > row_rival).float().mean() + (own > column_rival).float().mean()) / 2


def gather_columns(text: Tensor, negative: Tensor | None) -> Tensor:
    """Return the captions of all processes, and after them their hard negatives: [C, D]."""
    if negative is None:
        return distributed.all_gather(text)
    return torch.cat([distributed.all_gather(text), distributed.all_gather(negative)])


def scatter_columns(d_columns: Tensor, size: int, has_negative: bool) -> tuple[Tensor, Tensor | None]:
    """Sum the gradients of columns over processes, and return those of this one's captions and hard negatives."""
    d_text = distributed.reduce_scatter_sum(d_columns[:size])
    return d_text, distributed.reduce_scatter_sum(d_columns[size:]) if has_negative else None


@torch.compiler.disable
def info_nce(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    *,
    duplicates: Duplicates = "ignore",
    ids: Tensor | None = None,
    negative: Tensor | None = None,
    negative_ids: Tensor | None = None,
    block_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute InfoNCE, see `TiledInfoNCE`.

    Args:
        image, text: unit vectors [b, D] of pairs, fp16 to fp64; b is the same on every process.
        scale: what similarities are multiplied with, [].
        duplicates: what the equal captions of other pictures are, see `Labels`.
        ids: of the captions, int64 [b], for `mask` and `share`: equal captions have equal ones.
        negative: unit vectors [h, D] of captions that belong to no picture; h is the same on every process.
        negative_ids: int64 [h], with `negative`; 0 where there is no caption.
        block_size: rows of S that exist at a time; None chooses.

    Returns:
        The loss [] with gradient, fp32 (fp64 of fp64 features), and the accuracy [], the share of pictures and captions
        that pick what is right.

    Raises:
        UserError: shapes that do not fit, on this process or between processes; a scale that is no number.
    """
    check_inputs(image, text, scale, duplicates, ids, negative, negative_ids)
    image, text, negative, labels = prepare(image, text, duplicates, ids, negative, negative_ids)
    return TiledInfoNCE.apply(image, text, negative, scale, labels, block_size)


@torch.compiler.disable
def siglip(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    duplicates: Duplicates = "ignore",
    ids: Tensor | None = None,
    negative: Tensor | None = None,
    negative_ids: Tensor | None = None,
    block_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the sigmoid loss, see `TiledSigLIP`.

    Args:
        bias: what is added to similarities, []; the others are those of `info_nce`, as is what is returned and raised.
    """
    check_inputs(image, text, scale, duplicates, ids, negative, negative_ids)
    image, text, negative, labels = prepare(image, text, duplicates, ids, negative, negative_ids)
    inputs = [value for value in (image, text, negative, scale, bias) if value is not None]
    needs_gradient = torch.is_grad_enabled() and any(value.requires_grad for value in inputs)
    return TiledSigLIP.apply(image, text, negative, scale, bias, labels, block_size, needs_gradient)


def prepare(
    image: Tensor,
    text: Tensor,
    duplicates: Duplicates,
    ids: Tensor | None,
    negative: Tensor | None,
    negative_ids: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, Labels]:
    """Return features in the widest of their dtypes, and which of all columns is right for which of our rows."""
    dtype = torch.promote_types(image.dtype, text.dtype)
    first, size = distributed.rank() * len(image), distributed.world_size() * len(image)
    column_ids = absent = None
    if duplicates != "ignore":
        assert ids is not None
        column_ids = distributed.all_gather(ids)
    if negative_ids is not None:
        negative_ids = distributed.all_gather(negative_ids)
        absent = torch.cat([torch.zeros(size, dtype=torch.bool, device=negative_ids.device), negative_ids == 0])
        column_ids = column_ids if column_ids is None else torch.cat([column_ids, negative_ids])
    labels = Labels(first, size, duplicates, None if column_ids is None else ids, column_ids, absent)
    return image.to(dtype), text.to(dtype), None if negative is None else negative.to(dtype), labels


def check_inputs(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    duplicates: Duplicates,
    ids: Tensor | None,
    negative: Tensor | None,
    negative_ids: Tensor | None,
) -> None:
    """See that everything has its shape, and the same on every process.

    Raises:
        UserError: it has not. A scale on a GPU is not looked at: that would wait for all that is still to be done.
    """
    if image.ndim != 2:
        raise UserError(f"image features have the shape {list(image.shape)}: must be [pairs, width]")
    if text.shape != image.shape:
        raise UserError(f"text features have the shape {list(text.shape)}: must be {list(image.shape)}, as the image's")
    if negative is not None and (negative.ndim != 2 or negative.shape[1] != image.shape[1]):
        raise UserError(f"negative features have the shape {list(negative.shape)}: must be [any, {image.shape[1]}]")
    if (negative is None) != (negative_ids is None):
        raise UserError("negative and negative_ids: must be given together")
    for name, values, length in (
        ("ids", ids, len(image)),
        ("negative_ids", negative_ids, 0 if negative is None else len(negative)),
    ):
        if values is not None and values.shape != (length,):
            raise UserError(f"{name} have the shape {list(values.shape)}: must be [{length}], one for each caption")
    if duplicates not in get_args(Duplicates):
        raise UserError(f"loss.duplicates={duplicates}: must be {', '.join(get_args(Duplicates))}")
    if duplicates != "ignore" and ids is None:
        raise UserError(f"loss.duplicates={duplicates}: needs the ids of captions")
    if scale.device.type == "cpu" and not scale.isfinite().all():
        raise UserError(f"the scale of similarities is {float(scale)}: must be finite (loss.init_scale, optimizer.lr)")
    counts = distributed.all_gather_numbers(len(image), 0 if negative is None else len(negative))
    for name, found in zip(("pairs", "hard negatives"), zip(*counts, strict=True), strict=True):
        if len(set(found)) > 1:
            limit = "must be as many on each, batch_size divided by the number of processes"
            raise UserError(f"the processes have {list(found)} {name}: {limit}")
