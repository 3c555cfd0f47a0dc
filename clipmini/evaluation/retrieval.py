"""Retrieval: captions for pictures and pictures for captions, any number of them right for each.

N pictures, T captions, P pairs, D embedding width. Similarities exist a tile [chunk, chunk] at a time; each tile counts
for its pictures and for its captions.
"""

import torch
from torch import Tensor

from clipmini.evaluation.metrics import Queries
from clipmini.evaluation.similarity import similarity, similarity_of_pairs

CHUNK_SIZE = 1024  # the fastest of 512 to 4096 on a CPU: what is counted is still in its caches


@torch.no_grad()
def rank_pairs(image: Tensor, text: Tensor, pairs: Tensor, *, chunk_size: int = CHUNK_SIZE) -> tuple[Queries, Queries]:
    """Rank the captions for each picture and the pictures for each caption, by cosine.

    The rank of a query is the number of wrong candidates whose score is not below that of the best right one: equal
    scores count against the model, and so do NaNs. That number is one of all candidates less one of the right ones,
    whose scores come from the pairs alone with the same bits, see `clipmini.evaluation.similarity`.

    Args:
        image: unit vectors [N, D], floating point; compared in fp32, on their device.
        text: unit vectors [T, D].
        pairs: int64 [P, 2], a picture and a caption that is right for it; one that is there twice counts once.
        chunk_size: pictures and captions of a tile.

    Returns:
        The queries of the pictures and those of the captions. A caption belongs to the first of its pictures.

    Raises:
        ValueError: a picture or caption is in no pair.
    """
    pairs = pairs.to(image.device).unique(dim=0)
    right = torch.cat([similarity_of_pairs(image[part[:, 0]], text[part[:, 1]]) for part in pairs.split(chunk_size)])
    pictures = Tally(right, pairs[:, 0], len(image), len(text), "picture")
    captions = Tally(right, pairs[:, 1], len(text), len(image), "caption")
    for row in range(0, len(image), chunk_size):
        for column in range(0, len(text), chunk_size):
            rows, columns = slice(row, row + chunk_size), slice(column, column + chunk_size)
            tile = similarity(image[rows], text[columns])
            pictures.count(tile, rows, 1)
            captions.count(tile, columns, 0)
    first = torch.full_like(captions.best, len(image), dtype=torch.long)
    first = first.scatter_reduce(0, pairs[:, 1], pairs[:, 0], "amin")
    return pictures.queries(torch.arange(len(image))), captions.queries(first)


class Tally:
    """How many candidates score below the best right one of each query, and how many just as high.

    Args:
        right: scores of the pairs, fp32 [P].
        query: of each pair, int64 [P].
        num_queries: Q.
        num_candidates: of each query.
        kind: of query, for messages.

    Raises:
        ValueError: a query is in no pair.
    """

    def __init__(self, right: Tensor, query: Tensor, num_queries: int, num_candidates: int, kind: str) -> None:
        self.num_candidates = num_candidates
        self.num_right = torch.bincount(query, minlength=num_queries)
        if (self.num_right == 0).any():
            raise ValueError(f"{kind} {int(self.num_right.argmin())} is in no pair")
        self.best = right.new_full((num_queries,), -torch.inf)  # which nothing is below, if all of them are NaN
        self.best.scatter_reduce_(0, query, right.masked_fill(right.isnan(), -torch.inf), "amax")
        # What is right is among the candidates that are counted, and is taken off here.
        self.below, self.equal = torch.zeros(2, num_queries, dtype=torch.long, device=right.device)
        self.below.index_add_(0, query, -(right < self.best[query]).long())
        self.equal.index_add_(0, query, -(right == self.best[query]).long())

    def count(self, tile: Tensor, queries: slice, dimension: int) -> None:
        """Count the candidates of a tile, which lie along its dimension 1 or 0."""
        best = self.best[queries].unsqueeze(dimension)
        self.below[queries] += (tile < best).sum(dimension, dtype=torch.int32)
        self.equal[queries] += (tile == best).sum(dimension, dtype=torch.int32)

    def queries(self, picture: Tensor) -> Queries:
        """Return what was found, after all tiles; `picture` is that of each query, int64 [Q]."""
        num_wrong = self.num_candidates - self.num_right
        return Queries(
            (num_wrong - self.below).cpu().numpy(),
            (self.equal > 0).cpu().numpy(),
            self.num_right.cpu().numpy(),
            self.num_candidates,
            picture.cpu().numpy(),
        )
