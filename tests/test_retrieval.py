"""Ranks of retrieval against loops in fp64, and of models that found nothing."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clipmini.evaluation import metrics
from clipmini.evaluation.metrics import Queries
from clipmini.evaluation.retrieval import rank_pairs

NUM_PICTURES, NUM_CAPTIONS = 23, 41


def make_rows(count: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(count, 16, generator=torch.Generator().manual_seed(seed)), dim=-1)


def make_pairs(seed: int = 0) -> Tensor:
    """Pair each caption and each picture with one, and some with more."""
    generator = torch.Generator().manual_seed(seed)
    captions = torch.arange(NUM_CAPTIONS)
    own = torch.stack([captions % NUM_PICTURES, captions], 1)
    more = torch.stack([torch.randint(size, (30,), generator=generator) for size in (NUM_PICTURES, NUM_CAPTIONS)], 1)
    pairs = torch.cat([own, more])
    return pairs[torch.randperm(len(pairs), generator=generator)]


def by_hand(scores: Tensor, pairs: set[tuple[int, int]]) -> list[tuple[int, bool, int]]:
    """Return rank, tie and right candidates of each row."""
    found = []
    for row, values in enumerate(scores.tolist()):
        right = [value for column, value in enumerate(values) if (row, column) in pairs]
        wrong = [value for column, value in enumerate(values) if (row, column) not in pairs]
        found.append((sum(not value < max(right) for value in wrong), max(right) in wrong, len(right)))
    return found


def rows_of(queries: Queries) -> list[tuple[int, bool, int]]:
    return list(zip(queries.ranks.tolist(), queries.is_tied.tolist(), queries.num_right.tolist(), strict=True))


def assert_never_above_chance(image: Tensor, text: Tensor, pairs: Tensor, chunk_size: int = 8) -> None:
    outcome = metrics.retrieval(*rank_pairs(image, text, pairs, chunk_size=chunk_size), len(image))
    found = outcome.measure(np.ones(len(image)))
    for name, chance in outcome.chance.items():
        assert found[name] >= chance if name.endswith("median_rank") else found[name] <= chance, name


@pytest.mark.parametrize("chunk_size", [1, 7, 1000])
@pytest.mark.parametrize("seed", [0, 1])
def test_equals_a_loop(seed: int, chunk_size: int) -> None:
    image, text, pairs = make_rows(NUM_PICTURES, seed), make_rows(NUM_CAPTIONS, seed + 9), make_pairs(seed)
    image_to_text, text_to_image = rank_pairs(image, text, pairs, chunk_size=chunk_size)
    right = {(picture, caption) for picture, caption in pairs.tolist()}
    scores = image.double() @ text.double().T
    assert rows_of(image_to_text) == by_hand(scores, right)
    assert rows_of(text_to_image) == by_hand(scores.T, {(caption, picture) for picture, caption in right})
    assert (image_to_text.num_candidates, text_to_image.num_candidates) == (NUM_CAPTIONS, NUM_PICTURES)
    assert image_to_text.picture.tolist() == list(range(NUM_PICTURES))
    assert text_to_image.picture.tolist() == [min(i for i, j in right if j == number) for number in range(NUM_CAPTIONS)]


@pytest.mark.parametrize("chunk_size", [1, 7, 1000])
def test_ties_equal_a_loop(chunk_size: int) -> None:
    rows, pairs = make_rows(6, 3), make_pairs()
    image, text = rows[torch.arange(NUM_PICTURES) % 6], rows[torch.arange(NUM_CAPTIONS) % 5]
    scores = (rows.double() @ rows.double().T)[torch.arange(NUM_PICTURES) % 6][:, torch.arange(NUM_CAPTIONS) % 5]
    right = {(picture, caption) for picture, caption in pairs.tolist()}
    image_to_text, text_to_image = rank_pairs(image, text, pairs, chunk_size=chunk_size)
    assert rows_of(image_to_text) == by_hand(scores, right)
    assert rows_of(text_to_image) == by_hand(scores.T, {(caption, picture) for picture, caption in right})
    assert image_to_text.is_tied.any()


def test_a_case_by_hand() -> None:
    image = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    text = torch.tensor([[0.8, 0.6], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    # Scores: [0.8, 0, 1, 0], [0.6, 1, 0, 1], [0.96, 0.8, 0.6, 0.8]
    pairs = torch.tensor([[0, 0], [1, 1], [2, 2], [2, 3], [1, 0], [2, 3]])
    image_to_text, text_to_image = rank_pairs(image, text, pairs)
    assert rows_of(image_to_text) == [(1, False, 1), (1, True, 2), (2, True, 2)]
    assert rows_of(text_to_image) == [(1, False, 2), (0, False, 1), (1, False, 1), (1, False, 1)]
    assert text_to_image.picture.tolist() == [0, 1, 2, 2]


@pytest.mark.parametrize("chunk_size", [1, 7, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", ["constant", "zeros", "nan", "two captions"])
def test_collapsed_embeddings_are_never_above_chance(kind: str, dtype: torch.dtype, chunk_size: int) -> None:
    rows = make_rows(2, 5).to(dtype)
    image, text = rows[:1].repeat(NUM_PICTURES, 1), rows[:1].repeat(NUM_CAPTIONS, 1)
    if kind == "two captions":
        text = rows[torch.arange(NUM_CAPTIONS) % 2]
    factor = {"zeros": 0.0, "nan": torch.nan}.get(kind, 1.0)
    assert_never_above_chance(image * factor, text * factor, make_pairs(), chunk_size)


@pytest.mark.parametrize("chunk_size", [1, 7, 1000])
def test_captions_find_nothing_among_equal_pictures(chunk_size: int) -> None:
    image, text = make_rows(1, 0).repeat(NUM_PICTURES, 1), make_rows(NUM_CAPTIONS, 1)
    _, text_to_image = rank_pairs(image, text, make_pairs(), chunk_size=chunk_size)
    assert (text_to_image.ranks == NUM_PICTURES - text_to_image.num_right).all() and text_to_image.is_tied.all()


def test_pictures_that_come_twice_never_come_first() -> None:
    image = make_rows(10, 1).repeat(2, 1)
    pairs = torch.arange(20)[:, None].expand(-1, 2)
    for queries in rank_pairs(image, image, pairs, chunk_size=3):
        assert queries.is_tied.all() and (queries.ranks == 1).all()


def test_a_caption_that_is_nan_is_wrong_for_all_but_no_burden_to_its_picture() -> None:
    text = make_rows(8, 1)
    text[7] = torch.nan
    pairs = torch.tensor([[number % 7, number] for number in range(8)])
    image_to_text, text_to_image = rank_pairs(text[:7].clone(), text, pairs, chunk_size=3)
    assert image_to_text.ranks.tolist() == [0, 1, 1, 1, 1, 1, 1]
    assert text_to_image.ranks.tolist() == [0] * 7 + [6]
    assert not image_to_text.is_tied.any() and not text_to_image.is_tied.any()


def test_half_precision_is_scored_in_fp32() -> None:
    image, text, pairs = make_rows(NUM_PICTURES, 0).half(), make_rows(NUM_CAPTIONS, 1).half(), make_pairs()
    for found, expected in zip(
        rank_pairs(image, text, pairs), rank_pairs(image.float(), text.float(), pairs), strict=True
    ):
        assert rows_of(found) == rows_of(expected)


def test_what_is_in_no_pair_is_told() -> None:
    rows, pairs = make_rows(3, 0), torch.tensor([[0, 0], [1, 1], [2, 1]])
    with pytest.raises(ValueError, match="caption 2 is in no pair"):
        rank_pairs(rows, rows, pairs)
    with pytest.raises(ValueError, match="picture 2 is in no pair"):
        rank_pairs(rows, rows, pairs.flip(1).clamp(max=1))
