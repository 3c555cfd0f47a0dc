"""Zero-shot classification: pictures against the words for their classes.

C classes, N pictures, D embedding width. The protocol is that of CLIP (https://arxiv.org/abs/2103.00020, section 3.1)
as open_clip and CLIP_benchmark run it.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from clipmini import distributed
from clipmini.data.decode import EvaluationTransform
from clipmini.data.tokenizer import Tokenize, trim
from clipmini.errors import UserError
from clipmini.evaluation.datasets import ClassificationSet, LabelledPictures
from clipmini.model import Model, encode_image, encode_text, padding


@torch.inference_mode()
def build_classifier(
    model: Model, tokenize: Tokenize, dataset: ClassificationSet, *, batch_size: int, device: torch.device
) -> Tensor:
    """Return a unit vector for each class, the mean of the unit vectors of its prompts: fp32 [C, D]."""
    per_batch = max(1, batch_size // len(dataset.templates))  # classes
    vectors = []
    for start in range(0, len(dataset.class_names), per_batch):
        labels = range(start, min(start + per_batch, len(dataset.class_names)))
        prompts = [prompt for label in labels for prompt in dataset.prompts(label)]
        text = trim(tokenize(prompts), padding(model)).to(device)
        features = encode_text(model, text).float().view(len(labels), len(dataset.templates), -1)
        vectors.append(F.normalize(features.mean(dim=1), dim=-1))
    return torch.cat(vectors)


@torch.inference_mode()
def evaluate_zero_shot(
    model: Model,
    tokenize: Tokenize,
    dataset: ClassificationSet,
    *,
    transform: EvaluationTransform,
    batch_size: int,
    num_workers: int,
    device: torch.device,
) -> dict[str, float]:
    """Classify the pictures of a set; every process takes its share, and all return the same numbers.

    Returns:
        `acc1`, `acc5` (shares of N; a tie with the right class is a miss), `mean_per_class_recall` over the classes
        that have pictures, and `chance1`, `chance5` of guessing.
    """
    training = model.training
    model.eval()
    num_classes = len(dataset.class_names)
    classifier = build_classifier(model, tokenize, dataset, batch_size=batch_size, device=device)
    chosen = range(distributed.rank(), len(dataset.samples), distributed.world_size())
    pictures = LabelledPictures(dataset, chosen, transform)
    loader = DataLoader(pictures, batch_size=batch_size, num_workers=num_workers, collate_fn=collate)
    counts = torch.zeros(3, num_classes, dtype=torch.long, device=device)  # pictures, top-1 hits, top-5 hits
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        image, label = batch[0], batch[1].to(device)
        logits = encode_image(model, image.to(device)).float() @ classifier.T  # [b, C]
        better = count_not_below(logits, label)
        for row, hit in enumerate((torch.ones_like(label), better < 1, better < 5)):
            counts[row].index_add_(0, label, hit.long())
    total, top1, top5 = distributed.all_reduce_sum(counts).double().cpu()
    present = total > 0
    model.train(training)
    return {
        "acc1": float(top1.sum() / total.sum()),
        "acc5": float(top5.sum() / total.sum()),
        "mean_per_class_recall": float((top1[present] / total[present]).mean()),
        "chance1": 1 / num_classes,
        "chance5": min(5, num_classes) / num_classes,
    }


def collate(samples: Sequence[Any]) -> Any:
    """Stack samples; an error travels to the main process as a value, so that it stays one message."""
    return next((sample for sample in samples if isinstance(sample, UserError)), None) or default_collate(list(samples))


def count_not_below(logits: Tensor, label: Tensor) -> Tensor:
    """Count the wrong classes whose logit is not below the right one's: int64 [b].

    Equal logits count against the model, and so do NaNs, so that a collapsed model scores nothing.
    """
    right = logits.gather(1, label[:, None])
    return (~(logits < right)).sum(dim=1) - 1
