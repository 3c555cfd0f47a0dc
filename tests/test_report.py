"""A run's report says what its files say, needs nothing else, and lets no name in the data become markup."""

import csv
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import QUICK
from forked import run_forked

from clipmini.evaluation.results import percent
from clipmini.report import command
from clipmini.report.charts import MAX_POINTS, Line, draw, thin
from clipmini.report.compare import list_config_differences, list_metric_differences
from clipmini.report.page import Section, Table, make_page
from clipmini.report.read import read_run

HOSTILE = "<script>alert(1)</script> & 'more'"


class Reader(HTMLParser):
    """Collects the tags, the addresses and the text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.addresses: list[str] = []
        self.identifiers: list[str] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.addresses += [value or "" for name, value in attributes if name in ("href", "src", "xlink:href")]
        self.identifiers += [value or "" for name, value in attributes if name == "id"]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


@pytest.fixture(scope="module")
def trained(tiny_json: Path, shards: Path, classification_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 4 steps in two starts, evaluated twice, whose classes have hostile names."""
    directory = tmp_path_factory.mktemp("trained")
    hostile = directory / "wds_hostile"
    shutil.copytree(classification_set, hostile)
    (hostile / "classnames.txt").write_text("".join(f"{HOSTILE} {number}\n" for number in range(7)))
    given = (*QUICK, "name=run", f"model.name={tiny_json}", f"data.train={shards}", "evaluation.every_n_steps=2")
    datasets = f"evaluation.datasets=[{hostile}]"
    for steps in (2, 4):
        result = run_forked(["train", *given, datasets, f"steps={steps}"], directory)
        assert result.returncode == 0, result.stderr
        assert f"file://{directory}/outputs/run/report.html" in result.stdout
    return directory / "outputs/run"


def test_holds_all_of_a_run(trained: Path) -> None:
    page = (trained / "report.html").read_text()
    found = Reader(page)
    for title in (
        "Summary",
        "Curves",
        "Results",
        "Pictures of hostile",
        "Most confused classes",
        "Data health",
        "Config",
    ):
        assert title in found.text
    # Of the last start: nothing is lost, and nothing told twice.
    with open(trained / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert f"{float(rows[-1]['train/loss']):.3f}" in found.text and "samples seen 64" in found.text
    row = json.loads((trained / "results.jsonl").read_text().splitlines()[-1])
    low, high = row["interval"]["acc1"]
    assert f"{percent(row['metrics']['acc1'])} {percent(low)} - {percent(high)} 14.3%" in found.text
    assert found.tags["svg"] >= 8 and found.text.count("start 1") == found.text.count("start 2") == 1
    assert "from step 0 2" in found.text and "torch" in found.text and "All of 64 samples were good" in found.text
    pictures = [address for address in found.addresses if address.startswith("data:image/webp;base64,")]
    shown = json.loads((trained / "evaluation/hostile.json").read_text())
    assert pictures == [
        one["picture"] for is_hit in (True, False) for one in shown["examples"] if one["is_hit"] == is_hit
    ]


def test_needs_nothing_else(trained: Path) -> None:
    found = Reader((trained / "report.html").read_text())
    for address in found.addresses:
        assert address.startswith(("#", "data:image/")), address
    anchors = [address[1:] for address in found.addresses if address.startswith("#")]
    assert anchors and set(anchors) <= set(found.identifiers)
    assert len(found.identifiers) == len(set(found.identifiers))
    assert not {"script", "link", "iframe", "object"} & found.tags.keys()
    assert HOSTILE in found.text  # as text


def test_examples_are_right_and_evenly_chosen(trained: Path) -> None:
    shown = json.loads((trained / "evaluation/hostile.json").read_text())
    examples = shown["examples"]
    assert 1 <= len(examples) <= 24 and len({one["number"] for one in examples}) == len(examples)
    for one in examples:
        texts, scores, is_right = zip(*one["nearest"], strict=True)
        assert len(texts) == 5 and list(scores) == sorted(scores, reverse=True)
        assert one["right"] == [f"{HOSTILE} {one['number'] % 7}"]
        assert list(is_right) == [text in one["right"] for text in texts]
        assert one["is_hit"] == is_right[0] and one["picture"].startswith("data:image/webp;base64,")
    row = json.loads((trained / "results.jsonl").read_text().splitlines()[-1])
    hits = sum(one["is_hit"] for one in examples)
    assert hits == min(12, round(21 * row["metrics"]["acc1"]))


def change(run: Path, to: Path, *, metrics: dict[str, Any], shown: Callable[[dict], None] = lambda _: None) -> Path:
    """Copy a run, with other numbers in the last row of its results, and in what is kept beside it."""
    shutil.copytree(run, to)
    rows = [json.loads(line) for line in (to / "results.jsonl").read_text().splitlines()]
    rows[-1] |= metrics
    (to / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    kept = json.loads((to / "evaluation/hostile.json").read_text())
    shown(kept)
    (to / "evaluation/hostile.json").write_text(json.dumps(kept))
    return to


def test_compares(trained: Path, tmp_path: Path, run_here: Callable) -> None:
    row = read_run(trained).rows[0]
    value, (low, high) = row["metrics"]["acc1"], row["interval"]["acc1"]
    changed = {"metrics": row["metrics"] | {"acc1": 0.5}, "interval": row["interval"] | {"acc1": [0.4, 0.6]}}
    other = change(trained, tmp_path / "outputs/other", metrics=changed | {"resamples": "of other pictures"})
    config = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(re.sub(r"(?m)^seed: .*$", "seed: 77", config))

    runs = [read_run(trained), read_run(other)]
    assert list_config_differences(runs).rows == [["seed", "0", "77"]]
    table = list_metric_differences(runs)
    error = ((high - low) ** 2 / 4 + 0.1**2) ** 0.5
    difference = 0.5 - value
    expected = [
        f"{100 * difference:+.1f} points",
        f"{100 * (difference - error):+.1f} to {100 * (difference + error):+.1f}, unpaired",
    ]
    assert table.rows[0] == ["hostile, top-1", f"{value:.1%}", "50.0%", *expected]

    result = run_here("compare", str(trained), str(other), f"output={tmp_path}/both.html")
    assert result.returncode == 0 and "seed" in result.stdout and "unpaired" in result.stdout
    page = (tmp_path / "both.html").read_text()
    assert page.count("stroke-dasharray") > 4 and "run and other" in page and f"{expected[1]}</td>" in page
    result = run_here("compare", str(trained), str(trained))
    assert result.returncode == 2 and "is there twice" in result.stderr
    result = run_here("compare", str(trained))
    assert result.returncode == 2 and "needs two or more" in result.stderr


def test_compares_pairwise_what_was_measured_on_the_same_pictures(trained: Path, tmp_path: Path) -> None:
    row = read_run(trained).rows[0]
    draws = json.loads((trained / "evaluation/hostile.json").read_text())["draws"]["values"]
    assert draws.keys() == row["interval"].keys() and len(draws["acc1"]) == 1000
    assert np.nanpercentile(draws["acc1"], (2.5, 97.5)) == pytest.approx(row["interval"]["acc1"], abs=1e-6)

    def better(kept: dict) -> None:
        """Each resample is between 10 and 30 points better."""
        found = kept["draws"]["values"]
        found["acc1"] = [value + 0.1 + 0.2 * number / 999 for number, value in enumerate(found["acc1"])]

    changed = {"metrics": row["metrics"] | {"acc1": row["metrics"]["acc1"] + 0.2}}
    paired = read_run(change(trained, tmp_path / "paired", metrics=changed, shown=better))
    stale = read_run(change(trained, tmp_path / "stale", metrics=changed | {"weights": "of a later step"}))
    older = read_run(change(trained, tmp_path / "older", metrics=changed, shown=lambda kept: kept.pop("draws")))
    found = list_metric_differences([read_run(trained), paired, stale, older]).rows[0]
    assert found[3:5] == ["+20.0 points", "+10.5 to +29.5"]
    assert found[7].endswith("unpaired") and found[10].endswith("unpaired")


def test_compares_what_only_another_run_has(trained: Path, tmp_path: Path) -> None:
    other = change(trained, tmp_path / "other", metrics={})
    (other / "metrics.csv").write_text("step,train/loss,val/loss\n4,1.5,2.5\n")
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "metrics.csv").write_text("step,train/loss\n4,1.25\n")
    rows = list_metric_differences([read_run(bare), read_run(other)]).rows
    value = f"{read_run(trained).rows[0]['metrics']['acc1']:.1%}"
    assert rows[0] == ["hostile, top-1", "-", value, "-", "-"]
    assert rows[-2:] == [["last loss", "1.250", "1.500", "+0.250", ""], ["last val/loss", "-", "2.500", "-", ""]]


def test_charts_are_told_apart_without_colours_and_by_those_who_do_not_see() -> None:
    lines = [Line(f"run <{number}>", range(10), [number + step for step in range(10)]) for number in range(6)]
    chart = draw("loss & more", lines)
    looks = re.findall(r"stroke-dasharray: ([^;]+)", chart)
    assert len(set(looks)) >= 5 and "#0" not in chart.replace("&#", "") and "var(--curve-5)" in chart
    label = re.findall(r'role="img" aria-label="([^"]*)"', chart)
    assert label and label[0].startswith("loss &amp; more. run &lt;0>: 0 at step 0, 9 at step 9; ")
    assert "run <0>" not in chart
    many = draw("loss", [Line("", range(100_000), [1.0] * 100_000)])
    assert many.count("L ") < MAX_POINTS + 50
    assert draw("a", lines[:1]) == draw("a", lines[:1])  # the same bytes
    assert "12.5%" in draw("accuracy", [Line("", [1], [0.125])], is_share=True)


def test_a_thinned_curve_keeps_its_ends_and_what_stands_out() -> None:
    values = [1.0] * 100_000
    values[12_345], values[54_321] = 9.0, -9.0
    shown = thin(values)
    assert {0, 12_345, 54_321, 99_999} <= set(shown) and shown == sorted(shown) and len(shown) <= MAX_POINTS
    assert thin(values[:600]) == list(range(600)) and thin([]) == []


def test_a_page_escapes() -> None:
    table = Table(HOSTILE, (HOSTILE,), [[HOSTILE]])
    page = make_page(
        HOSTILE, HOSTILE, [Section("A", HOSTILE, {HOSTILE: HOSTILE}, tables=[table], texts=[(HOSTILE,) * 2])]
    )
    found = Reader(page.decode())
    assert found.tags["script"] == 0 and found.text.count(HOSTILE) >= 8


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no metrics.csv: no run of `clipmini train`"),
        ("step\n", "has no measurements yet"),
        ("step,train/loss\n1,high\n", "cannot be read"),
        ("loss\n1\n", "cannot be read"),
    ],
)
def test_bad_runs(content: str | None, message: str, tmp_path: Path, run_here: Callable) -> None:
    if content is not None:
        (tmp_path / "metrics.csv").write_text(content)
    result = run_here("report", str(tmp_path))
    assert result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "report.html").exists()
    assert "no such directory" in run_here("report", str(tmp_path / "nothing")).stderr


@pytest.mark.parametrize("content", [b"a: [1,\n", b"\xff\n"])
def test_a_config_that_cannot_be_read(content: bytes, tmp_path: Path, run_here: Callable) -> None:
    (tmp_path / "metrics.csv").write_text("step,train/loss\n1,2.0\n")
    (tmp_path / "environment.jsonl").write_bytes(b"\xff\n")  # a line that is left out
    (tmp_path / "config.yaml").write_bytes(content)
    result = run_here("report", str(tmp_path))
    assert result.returncode == 2 and result.stderr.startswith(f"clipmini: {tmp_path}/config.yaml: cannot be read: ")


def test_a_run_of_another_version_is_told_without_what_it_lacks(trained: Path, tmp_path: Path) -> None:
    """Files that are missing or cut leave their sections out."""
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    shutil.rmtree(run / "evaluation")
    (run / "results.jsonl").unlink()
    (run / "config.yaml").unlink()
    lines = (run / "environment.jsonl").read_text()
    (run / "environment.jsonl").write_text(lines[:-20])
    command.write_report(run)
    text = Reader((run / "report.html").read_text()).text
    assert "Curves" in text and "start 1" in text and "start 2" not in text and "Pictures of" not in text


def test_a_batch_size_that_the_config_takes_from_a_variable(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(
        config.replace("\nbatch_size: 16\n", "\nbatch_size: ${oc.decode:${oc.env:BATCH}}\n")
    )
    (run / "quarantine.jsonl").write_text(json.dumps({"position": 1, "cause": "picture"}) + "\n")
    command.write_report(run)
    text = Reader((run / "report.html").read_text()).text
    assert "samples seen 64 time in training" in text and "1 of 64 samples could not be used" in text
    environment = (run / "environment.jsonl").read_text()
    (run / "environment.jsonl").write_text(environment.replace('"batch_size": 16, ', ""))  # of an older version
    command.write_report(run)
    text = Reader((run / "report.html").read_text()).text
    assert "time in training" not in text and "1 of the samples could not be used" in text


def test_what_goes_wrong_with_a_report_does_not_end_a_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError("no space")

    monkeypatch.setattr(command, "write_report", fail)
    command.report_at_end(tmp_path)
    assert "the report could not be written" in caplog.text and "clipmini report" in caplog.text
