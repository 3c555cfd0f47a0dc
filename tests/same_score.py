"""The top-1 of a run's model by three ways, which must be the same: same_score.py RUN DATASET

`clipmini evaluate` on the run, plain open_clip's own zero-shot code on the exported directory, and the exported ONNX
towers, each from pictures and prompts on.
"""

import contextlib
import io
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import open_clip
import torch
import torch.nn.functional as F
import webdataset
from PIL import Image
from torch import Tensor

from clipmini import cli

LIMIT = 0.001  # 0.1 points

Encode = Callable[[Tensor], Tensor]


def clipmini(*arguments: str) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        assert cli.main(arguments) == 0, arguments


@torch.no_grad()
def top1(encode_image: Encode, classifier: Tensor, dataset: Path, preprocess: Callable) -> float:
    """Classify the pictures of a set, by webdataset's reader and open_clip's transform."""
    samples = webdataset.WebDataset(str(dataset / "test/0.tar"), shardshuffle=False).decode("pilrgba")
    images, labels = [], []
    for image, label in samples.to_tuple("webp", "cls"):
        white = Image.new("RGBA", image.size, "white")
        images.append(preprocess(Image.alpha_composite(white, image).convert("RGB")))
        labels.append(label)
    logits = torch.cat([encode_image(batch) for batch in torch.stack(images).split(64)]) @ classifier
    return float((logits.argmax(dim=1) == torch.tensor(labels)).float().mean())


def score(run: Path, dataset: Path, scratch: Path) -> dict[str, float]:
    """Return the top-1 by each way."""
    clipmini("evaluate", f"model={run}", f"datasets=[{dataset}]", f"output={scratch}/results.jsonl", "cache=null")
    clipmini("export", f"model={run}", "format=open_clip", f"output={scratch}/open_clip")
    clipmini("export", f"model={run}", "format=onnx", f"output={scratch}/onnx")
    found = {"clipmini": json.loads((scratch / "results.jsonl").read_text())["metrics"]["acc1"]}

    name = f"local-dir:{scratch}/open_clip"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    tokenizer = open_clip.get_tokenizer(name)
    model.eval()
    names = (dataset / "classnames.txt").read_text().splitlines()
    templates = (dataset / "zeroshot_classification_templates.txt").read_text().splitlines()
    templates = [template.replace("{c}", "{}") for template in templates]
    classifier = open_clip.build_zero_shot_classifier(model, tokenizer, names, templates)
    encode: Encode = lambda images: model.encode_image(images, normalize=True)  # noqa: E731
    found["open_clip"] = top1(encode, classifier, dataset, preprocess)

    image, text = (onnxruntime.InferenceSession(scratch / f"onnx/{tower}.onnx") for tower in ("image", "text"))

    def encode_text(sentences: list[str]) -> Tensor:
        (features,) = text.run(None, {"text": tokenizer(sentences).numpy()})
        return torch.from_numpy(features)

    vectors = [encode_text([template.format(name) for template in templates]).mean(dim=0) for name in names]
    classifier = F.normalize(torch.stack(vectors), dim=-1).T
    encode = lambda images: torch.from_numpy(np.asarray(image.run(None, {"image": images.numpy()})[0]))  # noqa: E731
    found["onnx"] = top1(encode, classifier, dataset, preprocess)
    return found


def main(run: str, dataset: str) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        found = score(Path(run), Path(dataset), Path(scratch))
    print("  ".join(f"{way} {value:.2%}" for way, value in found.items()))
    assert max(found.values()) - min(found.values()) <= LIMIT, found


if __name__ == "__main__":
    main(*sys.argv[1:])
