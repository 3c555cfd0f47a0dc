"""Inputs of contrastive losses, and the losses as the papers write them, one pair after the other."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from clipmini.losses import info_nce, siglip

LOSSES = ("infonce", "siglip")
MODES = ("ignore", "mask", "share")
Share: TypeAlias = tuple[Tensor, list[Tensor], Tensor]  # of a process: the loss, gradients of all inputs, the accuracy


def make_inputs(
    rows: int, dtype: torch.dtype = torch.float64, *, width: int = 8, scale: float = 20.0, negatives: bool = False
) -> dict[str, Tensor]:
    """Make unit features of pairs of which many have the same caption, a scale and a bias, all with gradient."""
    generator = torch.Generator().manual_seed(0)

    def features(count: int) -> Tensor:
        values = torch.randn(count, width, generator=generator, dtype=torch.float64)
        return F.normalize(values, dim=-1).to(dtype).requires_grad_()

    number = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = {"image": features(rows), "text": features(rows)}
    inputs |= {
        name: torch.tensor(value, dtype=number).requires_grad_() for name, value in (("scale", scale), ("bias", -3.0))
    }
    inputs["ids"] = torch.randint(1, max(2, rows // 2), (rows,), generator=generator)
    if negatives:
        inputs["negative"] = features(rows)
        inputs["negative_ids"] = torch.randint(0, rows, (rows,), generator=generator)  # some absent, some right
    return inputs


def call(name: str, inputs: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    """Call one of ours."""
    values = {key: value for key, value in inputs.items() if name == "siglip" or key != "bias"}
    return (siglip if name == "siglip" else info_nce)(**values, **options)


def by_hand(name: str, inputs: dict[str, Tensor], duplicates: str) -> Tensor:
    """Compute a loss with loops."""
    image, text, scale, bias, ids = (inputs[key] for key in ("image", "text", "scale", "bias", "ids"))
    size = len(image)
    captions, caption_ids, is_pair = list(text), ids.tolist(), [True] * size
    for caption, number in zip(
        inputs.get("negative", []), inputs.get("negative_ids", torch.tensor([])).tolist(), strict=True
    ):
        if number:  # 0: absent
            captions.append(caption)
            caption_ids.append(number)
            is_pair.append(False)
    total = image.new_zeros(())
    columns: list[list[Tensor]] = [[] for _ in range(size)]
    for i in range(size):
        row, right = [], []
        for j, caption in enumerate(captions):
            is_equal = caption_ids[i] == caption_ids[j] and i != j
            if (duplicates == "mask" and is_equal) or (duplicates == "share" and is_equal and not is_pair[j]):
                continue
            similarity = scale * (image[i] @ caption)
            is_right = i == j or (duplicates == "share" and is_equal)
            if name == "siglip":
                total = total - F.logsigmoid((similarity + bias) * (1 if is_right else -1))
            row.append(similarity)
            if is_right:
                right.append(similarity)
            if is_pair[j]:
                columns[j].append(similarity)
        if name == "infonce":
            entropy = torch.tensor(float(len(right)), dtype=image.dtype).log()
            total = total + (torch.stack(row).exp().sum().log() - torch.stack(right).mean() - entropy) / 2
            # Equal captions have as many right pictures, so that the mean over columns is the mean over rows.
            total = total - (torch.stack(right).mean() + entropy) / 2
    if name == "infonce":
        for column in columns:
            total = total + torch.stack(column).exp().sum().log() / 2
    return total / size


def gradients(loss: Tensor, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the gradients of all inputs that have one."""
    names = [name for name, value in inputs.items() if value.requires_grad]
    found = torch.autograd.grad(loss, [inputs[name] for name in names], allow_unused=True)
    return {name: gradient for name, gradient in zip(names, found, strict=True) if gradient is not None}


def peak_bytes(action: Callable[[], Any]) -> int:
    """Return the most bytes that tensors made by an action held at a time, by torch's own record."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        action()
    now = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def assert_mean_is(whole: Share, parts: Sequence[Share]) -> None:
    """Compare what DDP makes of processes with one process: the mean over them, of losses and of gradients."""
    loss, gradients, accuracy = whole
    torch.testing.assert_close(torch.stack([part[0] for part in parts]).mean(), loss, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.stack([part[2] for part in parts]).mean(), accuracy)
    for number, gradient in enumerate(gradients):
        mean = torch.stack([part[1][number] for part in parts]).mean(dim=0)
        torch.testing.assert_close(mean, gradient, rtol=0, atol=1e-12)
