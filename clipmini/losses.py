"""Contrastive losses over the global batch, exact on any number of processes.

W processes with b pairs each make B = W b pairs; D is the embedding width. Every process returns the mean over its own
b pairs, so that the mean over processes, which DDP takes of the gradients, is the loss of the global batch.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipmini import distributed
from clipmini.errors import UserError


class ContrastiveLoss(nn.Module):
    """What both losses share: how the scale (and bias) of the similarities starts, and how far the scale may go.

    The parameters themselves are open_clip's `logit_scale` (a logarithm) and `logit_bias`, in the model.

    Args:
        init_scale: what similarities are multiplied with at the start.
        max_scale: its limit; CLIP's is 100 (https://arxiv.org/abs/2103.00020, section 2.5).
        init_bias: what is added to them at the start; None for a loss without a bias.

    Raises:
        UserError: scales outside 1 <= init_scale <= max_scale.
    """

    def __init__(self, init_scale: float, max_scale: float, init_bias: float | None) -> None:
        super().__init__()
        if not 1 <= init_scale <= max_scale:
            raise UserError(f"loss.init_scale={init_scale:g}: must be from 1 to loss.max_scale={max_scale:g}")
        self.init_scale = init_scale
        self.max_scale = max_scale
        self.init_bias = init_bias

    @torch.no_grad()
    def clamp_(self, logit_scale: Tensor) -> None:
        """Keep a logarithmic scale within its limits, after an optimizer step."""
        logit_scale.clamp_(0, math.log(self.max_scale))


class InfoNCE(ContrastiveLoss):
    """Each picture picks its caption, and each caption its picture, among all of the global batch.

    L = 1/2 [CE(S, diagonal) + CE(S^T, diagonal)] with S = scale * I T^T. Source: https://arxiv.org/abs/2103.00020,
    figure 3.
    """

    def __init__(self, *, init_scale: float, max_scale: float) -> None:
        super().__init__(init_scale, max_scale, None)

    def forward(self, image: Tensor, text: Tensor, *, scale: Tensor, bias: Tensor | None = None) -> dict[str, Tensor]:
        """Compute the loss of this process's pairs.

        Args:
            image, text: unit vectors [b, D] of equal pairs; b is the same on every process.
            scale: what similarities are multiplied with, [].
            bias: must be None.

        Returns:
            `loss` [] with gradient, and `accuracy` [], the share of pictures and captions that pick the right one.
        """
        assert bias is None, "InfoNCE has no bias"
        # The logits of one bf16 rounding are off by up to 0.25 at scale 100: fp32 whatever surrounds us.
        with torch.autocast(image.device.type, enabled=False):
            image, text = upcast(image), upcast(text)
            image_logits = scale * image @ distributed.all_gather(text).T  # [b, B]
            text_logits = scale * text @ distributed.all_gather(image).T  # [b, B]
            labels = torch.arange(len(image), device=image.device) + distributed.rank() * len(image)
            loss = (F.cross_entropy(image_logits, labels) + F.cross_entropy(text_logits, labels)) / 2
            right = (image_logits.argmax(1) == labels).sum() + (text_logits.argmax(1) == labels).sum()
        return {"loss": loss, "accuracy": right / (2 * len(image))}


class SigLIP(ContrastiveLoss):
    """Each picture and caption of the global batch are told apart as a pair or not, one by one.

    L = -1/b sum_ij log sigmoid(z_ij (scale * I_i T_j + bias)), z_ij = 1 for pairs and -1 else. Source:
    https://arxiv.org/abs/2303.15343, algorithm 1.
    """

    def __init__(self, *, init_scale: float, init_bias: float, max_scale: float) -> None:
        super().__init__(init_scale, max_scale, init_bias)

    def forward(self, image: Tensor, text: Tensor, *, scale: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
        """Compute the loss of this process's pictures with all captions.

        Args:
            image, text: unit vectors [b, D] of equal pairs; b is the same on every process.
            scale: what similarities are multiplied with, [].
            bias: what is added to them, [].

        Returns:
            `loss` [] with gradient, and `accuracy` [], the share of pictures that pick the right caption.
        """
        assert bias is not None, "SigLIP needs a bias"
        with torch.autocast(image.device.type, enabled=False):
            image, text = upcast(image), upcast(text)
            logits = scale * image @ distributed.all_gather(text).T + bias  # [b, B]
            labels = torch.arange(len(image), device=image.device) + distributed.rank() * len(image)
            signs = torch.full_like(logits, -1.0)
            signs[torch.arange(len(image), device=image.device), labels] = 1.0
            loss = -F.logsigmoid(signs * logits).sum() / len(image)
            accuracy = (logits.argmax(1) == labels).sum() / len(image)
        return {"loss": loss, "accuracy": accuracy}


def upcast(features: Tensor) -> Tensor:
    """Return features in at least fp32."""
    return features if features.dtype == torch.float64 else features.float()
