"""`clipmini shards` as a user meets it: plan, index, usage, one message for what is wrong."""

import csv
import io
import json
import os
import sys
import tarfile
from pathlib import Path

import pytest
from conftest import QUICK, make_cache

from clipmini import cli
from clipmini.config import compose
from clipmini.data.counts import INDEX_NAME
from clipmini.data.index import PairFormat
from clipmini.data.manifest import read_manifest
from clipmini.train import train


def call(capsys: pytest.CaptureFixture, *arguments: str) -> tuple[int, str, str]:
    """Run the command in this process; return exit code, output and errors."""
    capsys.readouterr()
    code = cli.main(["shards", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_plan_is_what_the_run_trains(
    tiny_json: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    overrides = [*QUICK, f"model.name={tiny_json}", f"paths.cache={tmp_path}/cache", "seed=5", "data.ledger=true"]
    sources = (
        f"data.train={{x:{{shards:{shards}/a.tar,weight:1}},y:{{shards:[{shards}/b.tar,{shards}/c.tar],weight:2}}}}"
    )
    train(compose("train", [*overrides, sources, f"paths.run={tmp_path}/run"]))
    with open(tmp_path / "run/ledger/rank-00000.csv", newline="") as file:
        ledger = [(row["step"], row["position"], row["key"]) for row in csv.DictReader(file)]
    code, out, err = call(capsys, "plan", *overrides, sources, "range=2:3")
    assert code == 0 and err == ""
    header, *rows = (line.split("\t") for line in out.splitlines())
    assert header == ["step", "position", "source", "shard", "index", "key"]
    assert [(row[0], row[1], row[5]) for row in rows] == [row for row in ledger if row[0] in "23"]
    assert {(row[2], Path(row[3]).name) for row in rows} <= {("x", "a.tar"), ("y", "b.tar"), ("y", "c.tar")}
    assert all(0 <= int(row[4]) < 30 for row in rows)
    assert call(capsys, "plan", *overrides, sources, "range=3")[1].splitlines()[1:] == out.splitlines()[17:]


def test_own_experiments_are_found(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "mine/experiment").mkdir(parents=True)
    own = f"# @package _global_\nbatch_size: 3\ndata: {{train: {shards}}}\n"
    (tmp_path / "mine/experiment/own.yaml").write_text(own)
    arguments = ("--config-dir", str(tmp_path / "mine"), "experiment=own", f"paths.cache={tmp_path}/cache", "range=7")
    code, out, err = call(capsys, "plan", *arguments)
    assert (code, err) == (0, "") and [line.split("\t")[:3] for line in out.splitlines()[1:]] == [
        ["7", str(position), "train"] for position in (18, 19, 20)
    ]


def test_a_reader_that_has_enough_ends_the_plan(
    tiny_json: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    overrides = [*QUICK, f"model.name={tiny_json}", f"paths.cache={tmp_path}/cache", f"data.train={shards}"]
    for steps in ("1", "1:300"):  # less than a pipe's buffer, and more
        reader, writer = os.pipe()
        os.close(reader)
        with open(writer, "w") as stdout:
            monkeypatch.setattr(sys, "stdout", stdout)
            assert cli.main(["shards", "plan", *overrides, f"range={steps}"]) == 141
    monkeypatch.setattr(sys, "stdout", None)  # as after `>&-`
    assert cli.main(["shards", "plan", *overrides, "range=1"]) == 0
    assert capsys.readouterr().err == ""


def test_names_that_are_no_text_are_printed(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    names = [b"caf\xe9.txt", b"later.txt"]  # Latin-1
    with tarfile.open(tmp_path / "a.tar", "w", encoding="latin-1", format=tarfile.USTAR_FORMAT) as tar:
        for name in names:
            tar.addfile(tarfile.TarInfo(name.decode("latin-1")), io.BytesIO())
    output = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(output, encoding="utf-8", errors="strict"))
    arguments = [f"data.train={tmp_path}/a.tar", f"paths.cache={tmp_path}/cache", "data.num_workers=1"]
    assert cli.main(["shards", "verify", *arguments]) == 1
    keys = {line.split("\t")[1] for line in output.getvalue().decode().splitlines()}
    assert keys == {r"caf\udce9", "later"}


@pytest.mark.parametrize("range_", ["", "3:2", "0:3", "a:b", "-1", "1:2:3", "1.5"])
def test_wrong_ranges(range_: str, capsys: pytest.CaptureFixture) -> None:
    given = [f"range={range_}"] if range_ else []
    code, out, err = call(capsys, "plan", *given)
    assert (code, out) == (2, "")
    assert err == f"clipmini: range={range_}: expected FIRST:LAST, steps from 1 on, as in range=100:110 or range=100\n"


def test_index_counts_again_and_keeps_that(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    copy = tmp_path / "shards"
    copy.mkdir()
    for path in shards.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    (copy / "sizes.json").write_text(json.dumps({"a.tar": 9, "b.tar": 9, "c.tar": 9}))
    code, out, _ = call(capsys, "index", f"data.train={copy}", f"paths.cache={tmp_path}/cache")
    assert code == 0 and "train: 64 pairs in 3 shards" in out and f"kept in {copy / INDEX_NAME}" in out
    manifest = read_manifest(str(copy), PairFormat(), make_cache(tmp_path / "cache"))
    assert manifest.num_samples == 64  # what was counted wins over what is told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["verfy"],
            "shards verfy: no such command (did you mean 'verify'?); there are: plan, index, verify, leaks, pack",
        ),
        (["index"], "data.train has no value: give it one, as in data.train=..."),
        (["verify", "data.train=nowhere"], "data.train=nowhere: no shards found, nowhere does not exist (of 1 shards)"),
        (
            ["index", "data.train=/x/{0..9}.tar"],
            "cannot read the override data.train=/x/{0..9}.tar: mismatched input '{' expecting <EOF>",
        ),
        (["verify", "data.trian=x"], "unknown key data.trian (did you mean 'train'?)"),
        (["verify", "data.train=x", "data.max_pixels=many"], "data.max_pixels='many' has the wrong type: expected int"),
        (["verify", "data.train=x", "data.num_workers=-1"], "data.num_workers=-1: must be 0 or more, or null"),
        (["verify", "data.train=x", "data.max_member_bytes=0"], "data.max_member_bytes=0: must be 1 or more"),
        (["verify", "data.train=x", "data.max_pixels=-1"], "data.max_pixels=-1: must be from 1 to 178956970"),
        (["index", "data.train=x", "data.max_pixels=1000000000"], "data.max_pixels=1000000000: must be from 1 to 1789"),
        (["plan", "range=1", "data.prefetch_factor=0"], "data.prefetch_factor=0: must be 1 or more"),
        (["plan", "range=1", "data.timeout=0"], "data.timeout=0: must be 0.1 or more"),
        (["plan", "range=1", "data.max_bad_fraction=1.5"], "data.max_bad_fraction=1.5: must be from 0 to 1"),
        (["verify", "data.train=x", "data.caption_key={a:0.5}"], "data.caption_key={'a': 0.5}: the probabilities must"),
        (["verify", "data.train=x", "data.cache.fetch_timeout=0"], "data.cache.fetch_timeout=0: must be above 0"),
        (["plan", "range=1", "batch_size=0"], "batch_size=0: must be 1 or more"),
        (["plan", "range=1", "seed=-1"], "seed=-1: must be from 0 to 4294967295"),
        (["plan", "range=1", "nme=x"], "unknown key nme (did you mean 'name'"),
        (["pack", "inptu=x"], "unknown key inptu (did you mean 'input'?)"),
        (["pack", "input=x", "output=y", "+qality=3"], "unknown key qality (did you mean 'quality'?)"),
        (["pack", "input=x", "output=y", "~quality"], "quality: is missing"),
        (
            ["pack", "input=${oc.env:NOWHERE}", "output=y"],
            "input: KeyError raised while resolving interpolation: \"Environment variable 'NOWHERE'",
        ),
        (["pack", "input=x"], "output has no value: give it one, as in output=..."),
    ],
)
def test_what_is_wrong_is_one_message(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CLIPMINI_CACHE", str(tmp_path / "cache"))
    code, out, err = call(capsys, *arguments)
    assert code == 2 and out == ""
    assert err.startswith(f"clipmini: {message}") and err.count("\n") == 1


def test_usage_and_keys(capsys: pytest.CaptureFixture) -> None:
    for arguments in ([], ["--help"], ["-h"]):
        code, out, _ = call(capsys, *arguments)
        assert code == 0 and all(f"\n  {name} " in out for name in ("plan", "index", "verify", "leaks", "pack"))
    assert "samples_per_shard: " in call(capsys, "pack", "--help")[1]
    assert "batch_size: " in call(capsys, "verify", "--help")[1]
