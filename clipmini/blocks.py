"""open_clip's transformer blocks, with attention that holds no mask and, in the last one, only what is pooled.

The blocks stay open_clip's objects with its parameters; their class is a subclass of their own. Features are the same
but for rounding. b sequences, L tokens, H heads of d dimensions, width D = H d.
"""

import functools
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from open_clip.transformer import PatchDropout, ResidualAttentionBlock, Transformer, VisionTransformer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

# Longer sequences are left to torch: here the probabilities, b H L L of them, are kept for the gradient.
MAX_KEPT_LENGTH = 256

MAX_COMPILED = 32

Grid: TypeAlias = tuple[int, int]  # rows and columns of patches
Rows: TypeAlias = Tensor | slice | None  # of which tokens there is a result: int64 [b], a slice for all, or all of them


class KeptAttention(torch.autograd.Function):
    """Attention on a CPU, in matrix products that keep the probabilities for the backward pass.

    Torch's own for CPUs has a backward pass that takes several times as long on sequences this short. Scores are fp32
    as there, so that the result is as exact.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            dtype = torch.promote_types(query.dtype, torch.float32)
            scores = (query.to(dtype) * query.shape[-1] ** -0.5) @ key.to(dtype).transpose(-1, -2)
            if mask is not None:
                scores.masked_fill_(~mask, -torch.inf)
            probabilities = scores.softmax(-1).to(value.dtype)
            ctx.save_for_backward(query, key, value, probabilities)
            return probabilities @ value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, probabilities = ctx.saved_tensors
        with torch.autocast("cpu", enabled=False):
            d_value = probabilities.transpose(-1, -2) @ gradient
            d_probabilities = gradient @ value.transpose(-1, -2)
            d_scores = torch._softmax_backward_data(d_probabilities, probabilities, -1, probabilities.dtype)
            d_scores *= query.shape[-1] ** -0.5
            return d_scores @ key, d_scores.transpose(-1, -2) @ query, d_value, None


def attend(query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool, mask: Tensor | None = None) -> Tensor:
    """Compute attention without dropout (https://arxiv.org/abs/1706.03762, section 3.2.1).

    Args:
        query: [b, H, n, d].
        key, value: [b, H, L, d].
        is_causal: token i sees tokens up to i; then n is L, and there is no mask.
        mask: bool, where something is seen, that broadcasts to [b, H, n, L].

    Returns:
        [b, H, n, d].
    """
    length = key.shape[-2]
    if query.device.type == "cpu" and length <= MAX_KEPT_LENGTH and torch.is_grad_enabled() and query.requires_grad:
        if is_causal:
            mask = torch.ones(length, length, dtype=torch.bool).tril_()
        return KeptAttention.apply(query, key, value, mask)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=is_causal)


class Block(ResidualAttentionBlock):
    """A block of a tower; `adopt` makes it of open_clip's.

    Attributes:
        is_causal: whether a token sees only those before it; a mask that open_clip gives is this one then.
        gives_first: whether the first token's result is all that is asked for.
    """

    is_causal: bool
    gives_first: bool

    def forward(
        self,
        q_x: Tensor,
        k_x: Tensor | None = None,
        v_x: Tensor | None = None,
        attn_mask: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Take tokens [b, L, D] and return them, or those of `rows` [b] alone: [b, 1, D]."""
        if k_x is not None or v_x is not None or (attn_mask is not None and not self.is_causal):
            return super().forward(q_x, k_x, v_x, attn_mask)
        wanted: Rows = slice(1) if self.gives_first else rows
        x = take(q_x, wanted) + self.ls_1(self.attend(self.ln_1(q_x), wanted))
        return x + self.ls_2(self.mlp(self.ln_2(x)))

    def attend(self, x: Tensor, rows: Rows) -> Tensor:
        """Let tokens [b, L, D], or those of `rows`, look at all that they see."""
        attention: nn.MultiheadAttention = self.attn
        batch, length, width = x.shape
        heads, mask = attention.num_heads, None
        if rows is None:
            packed = F.linear(x, attention.in_proj_weight, attention.in_proj_bias)
            query, key, value = packed.view(batch, length, 3, heads, -1).permute(2, 0, 3, 1, 4)
        else:
            weights, biases = (
                part.split([width, 2 * width]) for part in (attention.in_proj_weight, attention.in_proj_bias)
            )
            query = F.linear(take(x, rows), weights[0], biases[0]).view(batch, 1, heads, -1).transpose(1, 2)
            key, value = F.linear(x, weights[1], biases[1]).view(batch, length, 2, heads, -1).permute(2, 0, 3, 1, 4)
            if self.is_causal:
                assert isinstance(rows, Tensor)
                mask = (torch.arange(length, device=x.device) <= rows[:, None])[:, None, None]
        seen = attend(query, key, value, is_causal=self.is_causal and rows is None, mask=mask)
        return attention.out_proj(seen.transpose(1, 2).reshape(batch, -1, width))


def take(x: Tensor, rows: Rows) -> Tensor:
    """Return some tokens of [b, L, D]."""
    if isinstance(rows, Tensor):
        return x[torch.arange(len(x), device=x.device), rows][:, None]
    return x if rows is None else x[:, rows]


def run_blocks(transformer: Transformer, x: Tensor, rows: Tensor) -> Tensor:
    """Run the blocks of a causal tower on tokens [b, L, D]; return those of `rows` [b] alone: [b, D]."""
    *blocks, last = transformer.resblocks
    for block in blocks:
        x = checkpoint(block, x, use_reentrant=False) if transformer.grad_checkpointing else block(x)
    arguments = (x, None, None, None, rows)
    x = checkpoint(last, *arguments, use_reentrant=False) if transformer.grad_checkpointing else last(*arguments)
    return x[:, 0]


class VisionTower(VisionTransformer):
    """open_clip's vision transformer, for pictures of any size: their positions are interpolated from its own."""

    def _embeds(self, x: Tensor) -> Tensor:
        x = self.conv1(x)  # [b, width, rows, columns of patches]
        positions = self.positional_embedding
        if x.shape[-2:] != torch.Size(self.grid_size):
            positions = resize_positions(positions, self.grid_size, (x.shape[-2], x.shape[-1]))
        x = x.flatten(2).transpose(1, 2)
        first = self.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1)  # len() would be a constant in ONNX
        return self.ln_pre(self.patch_dropout(torch.cat([first, x], dim=1) + positions.to(x.dtype)))


def resize_positions(positions: Tensor, old: Grid, new: Grid) -> Tensor:
    """Interpolate the positions of patches to another grid, as open_clip's `resize_pos_embed` does.

    Args:
        positions: [1 + rows * columns of the old grid, width], that of the first token before all others.

    Returns:
        [1 + rows * columns of the new grid, width].
    """
    weights = interpolation(old, new, positions.dtype, positions.device)
    with torch.autocast(positions.device.type, enabled=False):
        return torch.cat([positions[:1], weights @ positions[1:]])


@functools.lru_cache(maxsize=16)
def interpolation(old: Grid, new: Grid, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return what turns values on a grid into those on another: [new patches, old patches].

    A product with it has a gradient that is the same each time; that of torch's interpolation on a GPU is not.
    """
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        units = torch.eye(old[0] * old[1], dtype=dtype, device=device).unflatten(1, (1, *old))
        return F.interpolate(units, new, mode="bicubic", antialias=True, align_corners=False).flatten(1).T.contiguous()


class OwnPatchDropout(PatchDropout):
    """Draws on the device which patches stay: open_clip draws on the CPU, and the GPU waits for it."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.prob == 0.0:
            return x
        first, patches = (x[:, :1], x[:, 1:]) if self.exclude_first_token else (x[:, :0], x)
        batch, count, _ = patches.shape
        kept = torch.randn(batch, count, device=x.device).topk(max(1, int(count * (1 - self.prob))), dim=-1).indices
        return torch.cat([first, patches[torch.arange(batch, device=x.device)[:, None], kept]], dim=1)


def adopt_blocks(visual: nn.Module | None, text: nn.Module | None, *, is_causal: bool) -> None:
    """Have the blocks of open_clip's own towers compute as those here do.

    Args:
        visual: the image tower, if there is one.
        text: what holds the blocks of the text tower, if they are open_clip's.
        is_causal: whether the text tower's mask is the causal one and nothing else.
    """
    if isinstance(visual, VisionTransformer):
        if type(visual) is VisionTransformer:
            visual.__class__ = VisionTower
        adopt(visual.transformer, is_causal=False)
        last = visual.transformer.resblocks[-1]
        if isinstance(last, Block):
            last.gives_first = visual.attn_pool is None and visual.pool_type == "tok" and not visual.output_tokens
        if isinstance(visual.patch_dropout, PatchDropout):
            visual.patch_dropout.__class__ = OwnPatchDropout
    if text is not None and is_causal:
        adopt(text.transformer, is_causal=True)


def adopt(transformer: Transformer, *, is_causal: bool) -> None:
    for block in transformer.resblocks:
        if type(block) is ResidualAttentionBlock and transformer.batch_first:  # not a kind of block with more in it
            block.__class__ = Block
            block.is_causal, block.gives_first = is_causal, False


def find_blocks(module: nn.Module) -> list[nn.Module]:
    """List the layers that towers repeat: members of a list or sequence of one class, that have parts themselves."""
    members = list(module.children())
    is_list = isinstance(module, nn.ModuleList | nn.Sequential) and len({type(member) for member in members}) == 1
    if is_list and all(any(True for _ in member.children()) for member in members):
        return [member for member in members if any(parameter.ndim for parameter in member.parameters())]
    return [block for member in members for block in find_blocks(member)]


def compile_blocks(model: nn.Module) -> None:
    """Have torch compile the blocks of the towers: those of a tower share what is compiled, as do lengths of captions.

    Names of parameters stay. The number of times that anything is compiled again is bounded: what comes then runs as it
    would without.
    """
    import torch._dynamo  # a second that runs without it need not wait for

    # Of each forward pass: towers, shapes, training or not. The name is that of torch 2.6, which newer torch knows too.
    torch._dynamo.config.cache_size_limit = MAX_COMPILED
    for block in find_blocks(model):
        block.compile()
