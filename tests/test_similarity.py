"""Similarities: exact to fp32, and equal to the last bit for equal rows, whatever the shape of the product."""

import itertools
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clipmini.evaluation.similarity import BLOCK, count_not_below, similarity, similarity_of_pairs, to_grid


def make_rows(count: int, width: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.mark.parametrize("width", [1, 5, 33, 257, 384, 512, 640, 769, 1024])
def test_one_embedding_for_everything_has_one_score(width: int) -> None:
    row = make_rows(1, width)
    found = set()
    for n, m in itertools.product((1, 2, 5, 11, 16, 33, 130), repeat=2):
        found.update(similarity(row.repeat(n, 1), row.repeat(m, 1)).unique().tolist())
    found.update(similarity_of_pairs(row.repeat(7, 1), row.repeat(7, 1)).tolist())
    assert len(found) == 1 and found.pop() == pytest.approx(1.0, abs=1e-6)


def test_equal_rows_score_equally_wherever_they_are() -> None:
    rows, others = make_rows(4, 96), make_rows(5, 96, seed=1)
    expected = similarity(rows, others)
    n, m = torch.randint(4, (57,)), torch.randint(5, (2 * BLOCK + 3,))
    assert torch.equal(similarity(rows[n], others[m]), expected[n][:, m])
    assert torch.equal(similarity_of_pairs(rows[n], others[m[:57]]), expected[n, m[:57]])


@pytest.mark.parametrize("width", [3, 64, 500, 1024])
def test_sums_are_exact_in_any_order(width: int) -> None:
    large = 2 - torch.rand(5, width, generator=torch.Generator().manual_seed(1)) / 9  # no others have larger sums
    for rows in (make_rows(5, width), large):
        a, b = to_grid(rows), to_grid(rows.flip(0))
        products = (a * b).tolist()  # exact: 52 bits
        expected = [sum(map(Fraction, row)) for row in products]
        for order in (torch.arange(width), torch.arange(width).flip(0), torch.randperm(width)):
            assert (a * b)[:, order].cumsum(1)[:, -1].tolist() == expected


@pytest.mark.parametrize("scale", [1e-30, 1.0, 300.0])
@pytest.mark.parametrize("width", [1, 48, 512])
def test_equals_the_exact_products(width: int, scale: float) -> None:
    a, b = make_rows(9, width), make_rows(7, width, seed=1)
    expected = a.double() @ b.double().T
    assert similarity(a, b).dtype == torch.float32
    torch.testing.assert_close(similarity(a * scale, b).double() / scale, expected, rtol=0, atol=3e-7)


def test_a_row_with_one_large_entry_keeps_the_others() -> None:
    a, b = torch.eye(1, 512), make_rows(7, 512)
    a[0, 1:] = 1e-3
    torch.testing.assert_close(similarity(a, b).double(), a.double() @ b.double().T, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_and_autocast_are_taken_as_fp32(dtype: torch.dtype) -> None:
    a, b = make_rows(9, 32).to(dtype), make_rows(7, 32, seed=1).to(dtype)
    expected = similarity(a.float(), b.float())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(similarity(a, b), expected)
        assert torch.equal(similarity_of_pairs(a[:7], b), expected[:7].diagonal())


def test_what_is_not_finite_gives_nan_and_zeros_give_zero() -> None:
    a, b = make_rows(4, 8), make_rows(3, 8, seed=1)
    a[1, 2], a[2, 0], a[3] = torch.nan, torch.inf, 0.0
    scores = similarity(a, b)
    assert scores[0].isfinite().all() and scores[1:3].isnan().all() and (scores[3] == 0).all()
    assert similarity(a[:0], b).shape == (0, 3) and similarity(a, b[:0]).shape == (4, 0)


def test_ties_and_nans_are_not_below() -> None:
    logits = torch.tensor(
        [[1.0, 2.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0], [torch.nan, 0.0, 0.0, 0.0], [3.0, 0.0, 0.0, 0.0]]
    )
    assert count_not_below(logits, torch.tensor([0, 3, 0, 0])).tolist() == [2, 3, 3, 0]
    assert count_not_below(logits, torch.tensor([1, 0, 1, 1])).tolist() == [0, 3, 3, 3]
