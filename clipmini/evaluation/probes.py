"""What embeddings of pictures tell without any words: the votes of nearest neighbours, and a linear classifier.

M training pictures, N test pictures, C classes, D embedding width. Both return a rank for each test picture, how many
wrong classes do not score below the right one, and a prediction, which is the right class where the rank is 0 only.
"""

import logging

import torch
import torch.nn.functional as F
from torch import Tensor

from clipmini.errors import UserError
from clipmini.evaluation.similarity import count_not_below, similarity

STRENGTHS = tuple(10.0**exponent for exponent in range(2, -7, -1))  # of L2, the easiest to fit first
TOLERANCE = 1e-8  # of each entry of the gradient
STUCK = 1e-15  # a change of the loss that is no more than its rounding, which may come before the gradient is so small
CONVERGED = 1e-6  # a gradient that is no reason for a warning
MIN_TRAIN = 5  # pictures to hold one out of

log = logging.getLogger(__name__)


@torch.no_grad()
def nearest_neighbours(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    num_classes: int,
    k: int = 20,
    temperature: float = 0.07,
    chunk_size: int = 256,
) -> tuple[Tensor, Tensor]:
    """Let the k nearest training pictures vote for their classes, each with exp(cosine / temperature).

    This is the weighted classifier of DINO (Caron et al. 2021, https://arxiv.org/abs/2104.14294, section 4.1).

    Args:
        train: unit vectors [M, D].
        train_labels: int64 [M].
        test: unit vectors [N, D].
        test_labels: int64 [N].
        num_classes: C.
        chunk_size: test pictures that are compared at a time, each with all M.

    Returns:
        Ranks and predictions, int64 [N] each; equal votes and NaNs count against the model, see `count_votes`.

    Raises:
        UserError: fewer than k training pictures.
    """
    if not 1 <= k <= len(train):
        raise UserError(f"knn_k={k}: must be 1 to {len(train)}, the number of training pictures")
    found = []
    for test_part, labels in zip(test.split(chunk_size), test_labels.split(chunk_size), strict=True):
        scores = similarity(test_part, train)
        found.append(rank_and_predict(count_votes(scores, train_labels, labels, num_classes, k, temperature), labels))
    ranks, predictions = zip(*found, strict=True)
    return torch.cat(ranks), torch.cat(predictions)


def count_votes(
    scores: Tensor, train_labels: Tensor, labels: Tensor, num_classes: int, k: int, temperature: float
) -> Tensor:
    """Return the votes for each class: fp64 [n, C].

    Training pictures that tie with the k-th nearest one compete for the places that are left by nearer ones. The right
    class gets as few of these places as possible, every other class as many as it could fill. So one and the same
    embedding for all pictures never gives the right class more votes than the others have. If everything is NaN, the
    votes are too.

    Args:
        scores: similarities fp32 [n, M]; NaNs become -inf.
        train_labels: int64 [M].
        labels: int64 [n].
    """
    scores.masked_fill_(scores.isnan(), -torch.inf)
    nearest, neighbours = scores.topk(k)
    last = nearest[:, -1:]
    weights = ((nearest.double() - nearest[:, :1]) / temperature).exp()
    is_certain = nearest > last
    votes = weights.new_zeros(len(scores), num_classes)
    votes.scatter_add_(1, train_labels[neighbours], weights.where(is_certain, 0.0))

    row, column = (scores == last).nonzero(as_tuple=True)
    cells = row * num_classes + train_labels[column]
    tied = torch.bincount(cells, minlength=votes.numel()).view_as(votes)  # pictures of each class
    places = k - is_certain.sum(1, keepdim=True)
    others = tied.sum(1, keepdim=True) - tied.gather(1, labels[:, None])
    taken = torch.minimum(places, tied).scatter(1, labels[:, None], (places - others).clamp_min(0))
    return votes + taken * weights[:, -1:]


def rank_and_predict(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the ranks of the right classes, and the class that comes first, a wrong one in a tie: int64 [n] each.

    Args:
        scores: [n, C].
        labels: int64 [n].
    """
    ranks = count_not_below(scores, labels)
    wrong = scores.scatter(1, labels[:, None], -torch.inf).argmax(1)
    return ranks, torch.where(ranks == 0, labels, wrong)


@torch.no_grad()
def linear_probe(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    num_classes: int,
    l2: float | None,
    seed: int,
    max_iterations: int = 1000,
) -> tuple[Tensor, Tensor, float]:
    """Fit a multinomial logistic regression to the embeddings as they are, by L-BFGS in fp64.

    This is the linear probe of CLIP (Radford et al. 2021, https://arxiv.org/abs/2103.00020, section 3.2). It minimises
    the mean cross entropy + l2 / 2 * ||W||^2 with a bias that is not penalised: scikit-learn's C is 1 / (l2 * M).

    Args:
        train: [M, D].
        train_labels: int64 [M].
        test: [N, D].
        test_labels: int64 [N].
        num_classes: C.
        l2: None takes the power of ten from 1e-6 to 1e2 that is best on a fifth of the training pictures when it is
            fitted to the others, by top-1, then by cross entropy.
        seed: of the choice of that fifth.
        max_iterations: of L-BFGS, for each fit; if they are not enough for the last, a warning says so.

    Returns:
        Ranks and predictions, int64 [N] each (equal logits count against the model), and the l2 that was used.

    Raises:
        UserError: embeddings that are not finite, or too few training pictures to choose l2 with.
    """
    for name, features in (("training", train), ("test", test)):
        bad = int((~features.isfinite()).any(1).sum())
        if bad:
            raise UserError(f"the linear probe: {bad} of {len(features)} {name} embeddings are not finite")
    train, test = add_one(train), add_one(test)
    weights = train.new_zeros(num_classes, train.shape[1])
    if l2 is None:
        l2 = choose_l2(train, train_labels, weights.clone(), seed, max_iterations)
    gradient = fit(train, train_labels, weights, l2, max_iterations)
    if gradient > CONVERGED:
        log.warning(
            "the linear probe (l2=%g) did not converge in %d iterations: its gradient is %.1e, and should be %.1e",
            *(l2, max_iterations, gradient, CONVERGED),
        )
    return *rank_and_predict(test @ weights.T, test_labels), l2


def add_one(features: Tensor) -> Tensor:
    """Return features with a last column of ones, which the bias is multiplied with: fp64 [n, D + 1]."""
    return F.pad(features.double(), (0, 1), value=1.0)


def choose_l2(train: Tensor, labels: Tensor, weights: Tensor, seed: int, max_iterations: int) -> float:
    """Return the strength that is best on a fifth of the pictures, see `linear_probe`; `weights` [C, D + 1] change.

    Each fit starts where the last one ended.

    Raises:
        UserError: fewer than 5 pictures.
    """
    if len(train) < MIN_TRAIN:
        raise UserError(f"the linear probe: l2 cannot be chosen on {len(train)} training pictures, give it one")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).to(train.device)
    held_out, kept = order[: len(train) // 5], order[len(train) // 5 :]
    quality = {}
    for l2 in STRENGTHS:
        fit(train[kept], labels[kept], weights, l2, max_iterations)
        logits = train[held_out] @ weights.T
        hits = int((count_not_below(logits, labels[held_out]) == 0).sum())
        quality[l2] = hits, -float(F.cross_entropy(logits, labels[held_out]))
    return max(STRENGTHS, key=lambda l2: quality[l2])


def fit(features: Tensor, labels: Tensor, weights: Tensor, l2: float, max_iterations: int) -> float:
    """Change `weights`, fp64 [C, D + 1], the bias last, to those of the least loss.

    Returns:
        The largest magnitude in its gradient there.
    """
    target = F.one_hot(labels, len(weights)).to(features.dtype)

    def loss() -> Tensor:
        logits = features @ weights.T
        penalised = F.pad(weights[:, :-1], (0, 1))
        weights.grad = (logits.softmax(1) - target).T @ features / len(features) + l2 * penalised
        return F.cross_entropy(logits, labels) + l2 / 2 * penalised.square().sum()

    optimizer = torch.optim.LBFGS(
        [weights],
        max_iter=max_iterations,
        tolerance_grad=TOLERANCE,
        tolerance_change=STUCK,
        history_size=20,
        line_search_fn="strong_wolfe",
    )
    optimizer.step(loss)
    loss()
    assert weights.grad is not None
    return float(weights.grad.abs().max())
