"""When bad samples are too many, and what a file of them that was cut still tells."""

from collections import Counter
from pathlib import Path

import pytest

from clipmini.data.health import WINDOW, BadSample, Fault, Health, check_bad_fraction, read_causes
from clipmini.errors import UserError

BAD = BadSample(7, "train", "/x/a.tar", 3, "key", "picture", "cut")


def test_window_is_one_of_positions() -> None:
    health = Health()
    assert health.add([(position, "picture") for position in range(0, 100)]) == 100
    assert health.add([(WINDOW - 1, "picture")]) == 101
    assert health.add([(WINDOW + 49, "caption")]) == 52  # 0 to 49 are forgotten
    assert health.add([(3 * WINDOW, "caption")]) == 1
    assert health.totals == Counter(picture=101, caption=2)


def test_a_burst_is_seen_however_much_is_added_at_once() -> None:
    burst = [(position, "picture") for position in range(5 * WINDOW, 5 * WINDOW + 200)]
    assert Health().add([(0, "picture"), *burst, (9 * WINDOW, "picture")]) == 200


def test_substitutes_that_are_bad_too_are_of_one_position() -> None:
    health = Health()
    assert health.add([(7, "picture"), (7, "picture"), (7, "caption")]) == 1
    assert health.totals.total() == 3


def test_new_ones_are_taken_once() -> None:
    health = Health()
    health.new += [BAD, BAD]
    assert health.take() == [BAD, BAD] and not health.take()


def test_limit_is_a_share_of_the_window() -> None:
    check_bad_fraction(100, 0.01, Counter(picture=100), "quarantine.jsonl")
    with pytest.raises(
        UserError,
        match=r"101 of the last 10000 samples.*max_bad_fraction=0.01 allows \(in all: 90 picture, 20 caption\)",
    ):
        check_bad_fraction(101, 0.01, Counter(caption=20, picture=90), "quarantine.jsonl")
    check_bad_fraction(WINDOW, 1.0, Counter(picture=WINDOW), "quarantine.jsonl")


def test_causes_of_a_file_that_was_cut(tmp_path: Path) -> None:
    assert list(read_causes(tmp_path / "q.jsonl")) == []
    (tmp_path / "q.jsonl").write_text('{"position": 1, "cause": "picture"}\n{"position": 5, "cause": "caption"}\n{"pos')
    assert list(read_causes(tmp_path / "q.jsonl")) == [(1, "picture"), (5, "caption")]


def test_a_fault_is_one_line() -> None:
    assert Fault("picture", OSError("two\n lines")).detail == "two lines"
    with pytest.raises(AssertionError):
        Fault("unheard of", "")
