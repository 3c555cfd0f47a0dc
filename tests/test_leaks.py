"""`clipmini shards leaks` finds evaluation pictures that were trained on, however they were encoded, and no others."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from conftest import SAMPLE, read_sample, write_tar
from PIL import Image
from servers import serve
from test_duplicates import EVAL, KINDS, change
from test_report import HOSTILE, Reader

from clipmini.evaluation.examples import make_url


def given(shards: Path, dataset: Path | str, directory: Path, **changes: Any) -> list[str]:
    options = {
        "train": shards,
        "eval": dataset,
        "output": directory / "leaks.html",
        "details": directory / "leaks.jsonl",
    }
    return [
        *("shards", "leaks", "device=cpu", f"cache.directory={directory}/cache"),
        *(f"{key}={value}" for key, value in {"num_workers": 0, **options, **changes}.items()),
    ]


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, str]]:
    """Training shards, a set of 60 pictures of which 9 are changed training pictures, and the keys of their originals.

    Both also begin with a picture that cannot be read, and hold a white one.
    """
    root = tmp_path_factory.mktemp("planted")
    white = io.BytesIO()
    Image.new("RGB", (50, 50), "white").save(white, "PNG")
    samples = read_sample("train/noto-00002.tar", 130)
    for sample in samples:
        sample.pop("json")
    bad = [{"__key__": "bad", "jpg": b"\xff\xd8\xff"}, {"__key__": "white", "png": white.getvalue()}]
    write_tar(root / "train/a.tar", [*bad, *samples[:70]])
    write_tar(root / "train/b.tar", samples[70:])
    pictures = read_sample(EVAL, 1610)[1000:1060]
    originals = {}
    for number, kind in enumerate(KINDS):
        place, original = 5 * number + 2, samples[13 * number + 4]
        key = f"{HOSTILE.replace('/', '')}{number}" if number == 0 else pictures[place]["__key__"]
        cls = pictures[place]["cls"]
        pictures[place] = {"__key__": key, "jpg": change(original["webp"], kind), "cls": cls}
        originals[key] = original["__key__"]
    pictures[0] = {"__key__": "unreadable", "jpg": b"\xff\xd8\xff", "cls": pictures[0]["cls"]}
    pictures[-1] = {"__key__": "blank", "png": white.getvalue(), "cls": pictures[-1]["cls"]}
    shutil.copytree(SAMPLE / "wds_twemoji", root / "wds_planted", ignore=shutil.ignore_patterns("0.tar"))
    write_tar(root / "wds_planted/test/0.tar", pictures)
    return root / "train", root / "wds_planted", originals


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_tells_what_leaked(
    planted: tuple[Path, Path, dict[str, str]], shards: Path, tmp_path: Path, run_here: Callable
) -> None:
    train, dataset, originals = planted
    results = {}
    for workers in (0, 2):
        output = tmp_path / str(workers)
        result = run_here(*given(train, dataset, output, num_workers=workers))
        assert result.returncode == 1, result.stderr
        results[workers] = ((output / "leaks.jsonl").read_bytes(), (output / "leaks.html").read_bytes())
    assert results[0] == results[2]  # the same bytes
    rows = read_lines(tmp_path / "0/leaks.jsonl")
    found = {row["eval"]: row for row in rows if originals.get(row["eval"]) == row["key"]}
    assert found.keys() == originals.keys()
    assert all(Path(row["shard"]).parent == train and row["set"] == "planted" for row in rows)
    assert all(row["distance"] <= 12 and row["correlation"] >= 0.965 for row in rows)
    assert not {row["eval"] for row in rows} & {"blank", "unreadable"} and not {row["key"] for row in rows} & {
        "white",
        "bad",
    }
    count = len({row["eval"] for row in rows})
    (line,) = [
        line.replace("│", "").split() for line in result.stdout.splitlines() if "planted" in line and "│" in line
    ]
    assert line == ["planted", "60", "1", "1", str(count), str(count), f"{count / 60:.2%}"]
    assert (
        "132 pictures in 2 shards; 1 unreadable, 1 too plain" in result.stdout
        and f"{train}/a.tar/bad: " in result.stdout
    )
    # With another set before it; and that alone, as `leaks TRAIN EVAL`.
    clean = shutil.copytree(dataset, tmp_path / "wds_clean")
    write_tar(clean / "test/0.tar", read_sample(EVAL, 30))
    result = run_here(*given(train, f"[{clean},{dataset}]", tmp_path))
    assert (
        result.returncode == 1
        and [row for row in read_lines(tmp_path / "leaks.jsonl") if row["set"] != "clean"] == rows
    )
    given_here = ["shards", "leaks", str(shards), str(clean), "num_workers=0", f"cache.directory={tmp_path}/cache"]
    result = run_here(*given_here)
    assert result.returncode == 0 and "0.00%" in result.stdout and (tmp_path / "leaks.html").exists()


def test_page_needs_nothing_else(
    planted: tuple[Path, Path, dict[str, str]], tmp_path: Path, run_here: Callable
) -> None:
    train, dataset, originals = planted
    assert run_here(*given(train, dataset, tmp_path)).returncode == 1
    page = (tmp_path / "leaks.html").read_text()
    found = Reader(page)
    assert "default-src 'none'" in page and not {"script", "link", "iframe", "object"} & found.tags.keys()
    assert all(address.startswith(("#", "data:image/webp;base64,")) for address in found.addresses)
    count = len({row["eval"] for row in read_lines(tmp_path / "leaks.jsonl")})
    assert found.tags["img"] == found.tags["figure"] == 2 * count
    pictures = {sample["__key__"]: sample["webp"] for sample in read_sample("train/noto-00002.tar", 130)}
    assert {make_url(pictures[original]) for original in originals.values()} <= set(found.addresses)
    key = next(iter(originals))
    assert "<script>" in key and key in found.text and originals[key] in found.text
    assert f"By the perceptual hash: {count}" in found.text and f"{count / 60:.2%}" in found.text
    again = shutil.copytree(dataset, tmp_path / "wds_again")
    result = run_here(*given(train, f"[{dataset},{again}]", tmp_path, max_shown=3))
    found = Reader((tmp_path / "leaks.html").read_text())
    assert result.returncode == 1 and found.tags["img"] == 6 and f"hash: {count}, of which 3 are shown" in found.text


def test_with_a_model(
    planted: tuple[Path, Path, dict[str, str]], tiny_export: Path, tmp_path: Path, run_here: Callable
) -> None:
    """What open_clip's embeddings of all pictures say."""
    train, dataset, originals = planted
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tiny_export}")
    model.eval()

    def encode(pictures: list[bytes]) -> torch.Tensor:
        images = torch.stack([transform(Image.open(io.BytesIO(data)).convert("RGB")) for data in pictures])
        with torch.no_grad():
            return model.encode_image(images, normalize=True).double()

    samples = read_sample("train/noto-00002.tar", 130)
    (archive,) = (dataset / "test").glob("*.tar")
    pictures = read_sample(str(archive), 60)[1:]  # the first cannot be read
    names = [next(name for name in ("webp", "jpg", "png") if name in sample) for sample in pictures]
    evaluated = [sample[name] for sample, name in zip(pictures, names, strict=True)]
    scores = encode([sample["webp"] for sample in samples]) @ encode(evaluated).T
    limit = round(float(scores.max(0).values.sort().values[40]) - 1e-5, 6)
    result = run_here(*given(train, dataset, tmp_path, model=tiny_export, min_cosine=limit))
    assert result.returncode == 1, result.stderr
    rows = [row for row in read_lines(tmp_path / "leaks.jsonl") if row["found_by"] == "model" and row["key"] != "white"]
    found = {(row["key"], row["eval"]): row["cosine"] for row in rows}
    for (number, place), score in np.ndenumerate(scores.numpy()):
        pair = samples[number]["__key__"], pictures[place]["__key__"]
        if abs(score - limit) > 1e-6:
            assert (pair in found) == (score > limit)
        if pair in found:
            assert found[pair] == pytest.approx(score, abs=1e-4)
    assert len(found) >= 19
    text = Reader((tmp_path / "leaks.html").read_text()).text
    assert "By the model: " in text and "cosine" in text and "model ┃" in result.stdout
    assert set(originals) <= {row["eval"] for row in read_lines(tmp_path / "leaks.jsonl") if row["found_by"] == "hash"}


def test_shards_of_a_server(planted: tuple[Path, Path, dict[str, str]], tmp_path: Path, run_here: Callable) -> None:
    """With the same pairs, by several processes through one cache, and no secret in what is written."""
    train, dataset, _ = planted
    near = run_here(*given(train, dataset, tmp_path / "near"))
    with serve(train) as server:
        urls = f"['{server.url}/a.tar?token=abcdefgh','{server.url}/b.tar?token=abcdefgh']"
        far = run_here(*given(train, dataset, tmp_path / "far", train=urls, num_workers=2))
    assert near.returncode == far.returncode == 1, far.stderr
    rows = [read_lines(tmp_path / name / "leaks.jsonl") for name in ("near", "far")]
    assert [row | {"shard": ""} for row in rows[0]] == [row | {"shard": ""} for row in rows[1]]
    assert all(row["shard"].startswith("http://") for row in rows[1])
    written = far.stdout + "".join((tmp_path / f"far/leaks.{name}").read_text() for name in ("html", "jsonl"))
    assert "abcdefgh" not in written and f"{server.url}/a.tar" in written


def test_damaged_shards_are_counted(
    planted: tuple[Path, Path, dict[str, str]], tmp_path: Path, run_here: Callable
) -> None:
    train, dataset, _ = planted
    own = shutil.copytree(train, tmp_path / "own")
    content = (own / "b.tar").read_bytes()
    (own / "b.tar").write_bytes(content[: len(content) // 2])
    result = run_here(*given(own, dataset, tmp_path))
    assert result.returncode == 1 and "2 shards, 1 of them damaged" in result.stdout
    assert f"{own}/b.tar: ends inside" in result.stdout and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_distance": 40}, "max_distance=40: must be from 0 to 31"),
        ({"min_correlation": 2}, "min_correlation=2.0: must be from 0.5 to 1"),
        ({"min_cosine": -1}, "min_cosine=-1.0: must be from 0 to 1"),
        ({"num_workers": -1}, "num_workers=-1: must be 0 or more"),
        ({"max_pixels": 0}, "max_pixels=0: must be 1 or more"),
        ({"max_pixels": 10}, "eval: planted: not one of 60 pictures can be read"),
        ({"output": "."}, "output=.: is a directory, a file is expected"),
        ({"max_distance": "many"}, "max_distance: Value 'many'"),
        ({"model": "nothing/here"}, "model"),
        ({"weights": "best"}, "weights=best: is one of trained, average"),
        ({"thrshold": 3}, "unknown key thrshold; there are train, eval"),
        ({"max_distence": 3}, "unknown key max_distence (did you mean 'max_distance'"),
        ({"precision": "fp8"}, "precision=fp8: is one of fp32"),
        ({"train": "nowhere"}, "train=nowhere: no shards found, nowhere does not exist"),
        ({"train": "{a:{shard:x}}"}, "train.a={'shard': 'x'}: expected {shards: ..., weight: ...}"),
        ({"eval": "nowhere"}, "eval=nowhere: there is no such file or directory"),
        ({"eval": "[]"}, "eval=[]: no set to look for"),
        ({"eval": 3}, "eval[0]: expected a path"),
        ({"train": "pipe:x"}, "train=pipe:x: would run a command in a shell for every shard; allow_pipe=true allows"),
        ({"train": 2023}, "train=2023: expected a path or a list of paths"),
    ],
)
def test_what_is_wrong_is_one_message(
    changes: dict, message: str, planted: tuple[Path, Path, dict[str, str]], tmp_path: Path, run_here: Callable
) -> None:
    result = run_here(*given(planted[0], planted[1], tmp_path, **changes))
    assert result.returncode == 2 and result.stderr.startswith("clipmini: "), result.stderr
    assert message in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "leaks.html").exists() and not (tmp_path / "leaks.jsonl").exists()


def test_keys_without_names(planted: tuple[Path, Path, dict[str, str]], run_here: Callable) -> None:
    train, dataset, _ = (str(one) for one in planted)
    for words, message in (
        ([train, dataset, "more"], "more: what is it?"),
        ([f"trian={train}", f"eval={dataset}"], "unknown key trian (did you mean 'train'"),
        ([train], "eval has no value: give it one, as in eval=..."),
        ([train, dataset, f"eval={dataset}"], f"{dataset}: what is it?"),
    ):
        result = run_here("shards", "leaks", *words)
        assert result.returncode == 2 and message in result.stderr, result.stderr
    assert "max_distance: " in run_here("shards", "leaks", "--help").stdout
    assert "leaks TRAIN EVAL" in run_here("shards", "--help").stdout
