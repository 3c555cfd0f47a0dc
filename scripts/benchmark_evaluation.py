"""Measures evaluation: ImageNet's zero-shot classifier against open_clip's, and retrieval against a whole matrix.

The candidates take turns for some rounds; figures are medians, of ratios those of each round. For retrieval every
measurement is made in a process of its own with one thread; memory is the peak beyond the features.
"""

import argparse
import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from benchmark_loss import Step, in_a_process, measure_medians, print_results
from benchmark_tables import print_table, take_turns
from torch import Tensor

from clipmini.architecture import MODEL_CONFIGS
from clipmini.config import compose
from clipmini.data.tokenizer import create_tokenizer
from clipmini.evaluation.evaluator import Evaluator
from clipmini.evaluation.metrics import RECALL_AT
from clipmini.evaluation.prompts import make_prompts
from clipmini.evaluation.retrieval import rank_pairs
from clipmini.evaluation.tasks import Protocol
from clipmini.model import create_model

MAX_DIFFERENCE = 1e-5  # of the weights of the two classifiers
WIDTH = 512  # of the embeddings
LEAN = 0.18  # of a caption towards its picture: about half of them are found among 20,000
DIRECTIONS = ("captions for pictures", "pictures for captions")


def make_classifiers(name: str, class_names: Sequence[str]) -> dict[str, Callable[[], Tensor]]:
    """Make a model with random weights, and return what computes its classifier [C, D] by each side's defaults."""
    torch.manual_seed(0)
    model = create_model(name=name, init_scale=14.3, init_bias=None).eval()
    templates = open_clip.OPENAI_IMAGENET_TEMPLATES
    _, prompts = make_prompts(class_names, templates, "class names", "templates")
    defaults = compose("evaluate", ["model=none", "datasets=[]"])
    evaluator = Evaluator([], Protocol(), defaults.batch_size, num_workers=0, precision=defaults.precision)
    encoder = evaluator.encoder(model, create_tokenizer(model.architecture), torch.device("cpu"))
    open_clip.add_model_config(MODEL_CONFIGS)
    tokenizer = open_clip.get_tokenizer(name)
    return {
        "clipmini": lambda: encoder.classifier(prompts),
        "open_clip": lambda: (
            open_clip.build_zero_shot_classifier(
                model, tokenizer, class_names, templates, num_classes_per_batch=10, use_tqdm=False
            ).T
        ),
    }


def measure_classifier(name: str, num_classes: int, rounds: int) -> None:
    """Print the table of the classifier.

    Raises:
        SystemExit: the two are not the same.
    """
    class_names = open_clip.IMAGENET_CLASSNAMES[:num_classes]
    classifiers = make_classifiers(name, class_names)
    weights: dict[str, Tensor] = {}

    def measure(candidate: str) -> float:
        before = time.perf_counter()
        weights[candidate] = classifiers[candidate]()
        return time.perf_counter() - before

    seconds = take_turns(rounds, measure, classifiers)
    rows = []
    for candidate, found in seconds.items():
        ratios = [theirs / ours for theirs, ours in zip(found, seconds["clipmini"], strict=True)]
        spread = f"{min(found):.2f} to {max(found):.2f}"
        rows.append([candidate, f"{statistics.median(found):.2f}", spread, f"{statistics.median(ratios):.2f}"])
    sentences = len(open_clip.OPENAI_IMAGENET_TEMPLATES)
    print_table([f"{name}, {len(class_names)} classes of {sentences} sentences", "seconds", "spread", "x"], rows)
    difference = float((weights["clipmini"] - weights["open_clip"]).abs().max())
    print(f"largest difference of the weights: {difference:.1e}")
    if not difference <= MAX_DIFFERENCE:
        raise SystemExit(f"the weights differ by {difference:.1e}, more than {MAX_DIFFERENCE}")


def rank_by_tiles(image: Tensor, text: Tensor, picture: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Rank as clipmini does."""
    images, texts = rank_pairs(image, text, torch.stack((picture, torch.arange(len(text))), dim=1))
    return images.ranks, texts.ranks


def rank_by_matrix(image: Tensor, text: Tensor, picture: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Rank by all similarities at once; counted by NumPy, as torch's sum first makes an int64 of each comparison."""
    scores = (image @ text.T).numpy()
    right = scores[picture, np.arange(len(text))]
    of_pictures = right.reshape(-1, len(image))  # captions are dealt to the pictures in turn
    best = of_pictures.max(axis=0)
    images = (scores >= best[:, None]).sum(axis=1) - (of_pictures == best).sum(axis=0)
    return images, (scores >= right).sum(axis=0) - 1


RANKINGS = {"clipmini": rank_by_tiles, "whole matrix": rank_by_matrix}


def make_retrieval_step(name: str, num_pictures: int, captions: int, directory: Path) -> Step:
    """Make features, and return what ranks them and writes the ranks into a directory."""
    generator = torch.Generator().manual_seed(0)
    image, noise = (
        F.normalize(torch.randn(count, WIDTH, generator=generator), dim=-1)
        for count in (num_pictures, num_pictures * captions)
    )
    picture = torch.arange(num_pictures * captions) % num_pictures
    text = F.normalize(noise.add_(image[picture], alpha=LEAN), dim=-1)
    del noise

    def step() -> None:
        for direction, ranks in zip(DIRECTIONS, RANKINGS[name](image, text, picture), strict=True):
            np.save(directory / f"{name}, {direction}.npy", ranks)

    return step


def measure_retrieval(num_pictures: int, captions: int, rounds: int) -> None:
    """Print the table of retrieval, and whether the same is found."""
    with tempfile.TemporaryDirectory() as root:
        directory = Path(root)
        candidates = {
            name: functools.partial(in_a_process, make_retrieval_step, name, num_pictures, captions, directory)
            for name in RANKINGS
        }
        title = f"retrieval, {num_pictures} pictures x {num_pictures * captions} captions"
        results = measure_medians(rounds, candidates)
        print_results(title, results)
        if None not in results.values():
            for direction in DIRECTIONS:
                compare_ranks(direction, *(np.load(directory / f"{name}, {direction}.npy") for name in RANKINGS))


def compare_ranks(direction: str, ours: np.ndarray, theirs: np.ndarray) -> None:
    """Print recalls, whether they are equal, and how many ranks are not, as fp32 rounds by the order of its sums."""
    recalls, others = ([float((ranks < k).mean()) for k in RECALL_AT] for ranks in (ours, theirs))
    told = " ".join(f"{recall:.4%}" for recall in recalls)
    same = "equal" if recalls == others else f"not equal: {' '.join(f'{recall:.4%}' for recall in others)}"
    differ = int((ours != theirs).sum())
    print(f"{direction}: recall@{', '.join(map(str, RECALL_AT))} {told}, {same}; {differ} of {len(ours)} ranks differ")


def run(options: argparse.Namespace) -> None:
    """Print all there is to measure."""
    threads = torch.get_num_threads()
    print(f"fp32, medians of {options.rounds} rounds; the classifier with {threads} threads, retrieval with 1\n")
    measure_classifier(options.model, options.classes, options.rounds)
    measure_retrieval(options.pictures, options.captions, options.rounds)


def add_parser(commands: Any) -> None:
    """Add the command and its options."""
    parser = commands.add_parser("evaluation", help="the zero-shot classifier, and retrieval", description=__doc__)
    parser.add_argument("--model", default="ViT-B-32", help="whose text tower makes the classifier")
    parser.add_argument("--classes", type=int, default=50, help="of ImageNet's 1000, the first ones")
    parser.add_argument("--pictures", type=int, default=20_000)
    parser.add_argument("--captions", type=int, default=5, help="of each picture")
    parser.add_argument("--rounds", type=int, default=3)
    parser.set_defaults(run=run)
