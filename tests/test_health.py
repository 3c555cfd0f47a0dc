"""When bad samples are too many, and what a file of them that was cut still tells."""

from collections import Counter
from pathlib import Path

import pytest

from clipmini.data.health import WINDOW, BadSample, Fault, Health, check_bad_fraction, count_causes
from clipmini.errors import UserError

BAD = BadSample(7, "train", "/x/a.tar", 3, "key", "picture", "cut")


def test_window_forgets_what_is_long_ago() -> None:
    health = Health(world_size=1)
    for step in range(300):
        health.record(100, [BAD] if step < 150 else [])
        seen = min(step + 1, 100)  # batches in the window
        assert health.in_window() == sum(1 for batch in range(step + 1 - seen, step + 1) if batch < 150)
    assert health.in_window() == 0 and len(health.take()) == 150 and not health.take()


def test_processes_share_the_window() -> None:
    healths = [Health(world_size=4) for _ in range(4)]
    for _ in range(WINDOW // 100 + 20):
        for health in healths:
            health.record(25, [BAD])
    assert sum(health.in_window() for health in healths) == WINDOW // 100 * 4


def test_batches_larger_than_the_window_count_as_they_are() -> None:
    health = Health(world_size=1)
    for _ in range(3):
        health.record(3 * WINDOW, [BAD])
    assert health.in_window() == 1


def test_limit_is_a_share_of_the_window() -> None:
    check_bad_fraction(100, 0.01, Counter(picture=100), "quarantine.jsonl")
    with pytest.raises(
        UserError,
        match=r"101 of the last 10000 samples.*max_bad_fraction=0.01 allows \(in all: 90 picture, 20 caption\)",
    ):
        check_bad_fraction(101, 0.01, Counter(caption=20, picture=90), "quarantine.jsonl")
    check_bad_fraction(WINDOW, 1.0, Counter(picture=WINDOW), "quarantine.jsonl")


def test_causes_of_a_file_that_was_cut(tmp_path: Path) -> None:
    assert count_causes(tmp_path / "q.jsonl") == Counter()
    (tmp_path / "q.jsonl").write_text('{"cause": "picture"}\n{"cause": "caption"}\n{"cause": "picture"}\n{"cau')
    assert count_causes(tmp_path / "q.jsonl") == Counter(picture=2, caption=1)


def test_a_fault_is_one_line() -> None:
    assert Fault("picture", OSError("two\n lines")).detail == "two lines"
    with pytest.raises(AssertionError):
        Fault("unheard of", "")
