"""`clipmini search`: what is nearest, exactly; sums of texts and pictures; wrong models, queries, indexes refused."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import read_sample, write_tar
from test_model import make_model

from clipmini.errors import UserError
from clipmini.export.open_clip_directory import export_open_clip
from clipmini.search import approximate
from clipmini.search import index as index_module
from clipmini.search.index import Index, list_results, open_index
from clipmini.search.layout import Layout, Partition, check_output
from clipmini.search.query import Term, load_query_encoder, parse_query

RECORD = {
    **{"partitions": 3, "width": 16, "kinds": ["image"], "digest": "d", "input": "i"},
    **{"model": "x", "architecture": None, "weights_of": "trained", "weights": "y", "name": "z", "precision": "fp32"},
}


def write_index(directory: Path, embeddings: torch.Tensor) -> Index:
    """Write embeddings as an index in three partitions, the second of them empty."""
    check_output(directory, RECORD)
    layout = Layout(directory, 3, ("image",))
    half = len(embeddings) // 2
    for number, part in enumerate((embeddings[:half], embeddings[:0], embeddings[half:])):
        rows = [{"image_path": f"{number}-{row}"} for row in range(len(part))]
        layout.write(number, Partition({"image": part.half().numpy()}, rows, []))
    return open_index(directory)


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.mark.parametrize("chunk", [3, 1 << 16])
def test_finds_what_a_loop_finds(chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "CHUNK", chunk)
    index = write_index(tmp_path / "index", unit(101, 16))
    queries = unit(5, 16, seed=1)
    found = index.find(queries, 7)
    stored = torch.cat([torch.from_numpy(np.array(part)) for part in index.parts]).double()
    for query, rows, scores, percentiles in zip(queries.double(), *found, strict=True):
        cosines = [math.fsum((query * row).tolist()) for row in stored]
        expected = sorted(range(101), key=lambda row: (-cosines[row], row))[:7]
        assert rows.tolist() == expected
        np.testing.assert_allclose(scores, [cosines[row] for row in expected], atol=1e-6)
        lower = [sum(cosine < cosines[row] for cosine in cosines) for row in expected]
        np.testing.assert_allclose(percentiles, [100 * count / 101 for count in lower], rtol=1e-6)
    assert [row["image_path"] for row in index.describe([0, 49, 50, 100])] == ["0-0", "0-49", "2-0", "2-50"]
    torch.testing.assert_close(index.embedding(50), stored[50].float())


def test_of_equal_ones_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A product of matrices gives equal rows other last bits by where they lie."""
    monkeypatch.setattr(index_module, "CHUNK", 7)
    embeddings = unit(101, 16)
    same = [3, 4, 20, 51, 77, 100]
    embeddings[same] = unit(16, seed=5)
    index = write_index(tmp_path / "index", embeddings)
    rows, scores, percentiles = (part[0].tolist() for part in index.find(unit(16, seed=5)[None], 6))
    assert rows == same and len(set(scores)) == 1 and percentiles == pytest.approx([100 * 95 / 101] * 6)
    embeddings[:] = unit(16, seed=5)
    rows = write_index(tmp_path / "collapsed", embeddings).find(unit(16, seed=5)[None], 4).rows[0]
    assert rows.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("query", "terms"),
    [
        ("a red car", [Term(1.0, "a red car")]),
        ("2*cat - dog", [Term(2.0, "cat"), Term(-1.0, "dog")]),
        ("cat + .5 * a t-shirt + x.png", [Term(1.0, "cat"), Term(0.5, "a t-shirt"), Term(1.0, "x.png", True)]),
        ("- dog + cat", [Term(-1.0, "dog"), Term(1.0, "cat")]),
        ('"rock - and - roll" - 2*"3*x"', [Term(1.0, "rock - and - roll"), Term(-2.0, "3*x")]),
        ("1+1 makes 2", [Term(1.0, "1+1 makes 2")]),
        ("-2*dog +.5*cat", [Term(-2.0, "dog"), Term(0.5, "cat")]),
    ],
)
def test_reads_queries(query: str, terms: list[Term]) -> None:
    assert parse_query(query) == terms
    assert parse_query(query, with_paths=False) == [replace(term, is_picture=False) for term in terms]


@pytest.mark.parametrize("query", ["", "  ", "cat - ", "cat + + dog", "2*", '""', "0*cat", " + ".join("a" * 17)])
def test_refuses_queries(query: str) -> None:
    with pytest.raises(UserError, match="a part of it is empty|all of its weights are 0|17 parts, more than 16"):
        parse_query(query)


def test_what_is_known_of_a_row_and_what_was_found_are_both_kept(tmp_path: Path) -> None:
    index = write_index(tmp_path / "index", unit(10, 16))
    partition = Partition({"image": unit(5, 16).half().numpy()}, [{"row": 99, "row_": 98, "score": "good"}] * 5, [])
    index.layout.write(0, partition)
    (row,) = list_results(index, [2], [0.5], [80.0])
    own = {"row": 2, "score": 0.5, "rank": 1, "percentile": 80.0}
    assert row == {**own, "row_": 98, "row__": 99, "score_": "good"}


def test_arithmetic_is_that_of_unit_vectors(tiny_export: Path, folder: Path, made_index: Path) -> None:
    encoder = load_query_encoder(open_index(made_index).record, str(tiny_export), torch.device("cpu"))
    cat, dog = (encoder.encode(text) for text in ("cat", "dog"))
    picture = encoder.encode(str(folder / "003.webp"))
    torch.testing.assert_close(encoder.encode("2*cat - dog"), F.normalize(2 * cat - dog, dim=0))
    mixed = encoder.encode(f"{folder / '003.webp'} + 0.5*cat")
    torch.testing.assert_close(mixed, F.normalize(picture + 0.5 * cat, dim=0))
    with pytest.raises(UserError, match="its parts cancel each other"):
        encoder.encode("cat - cat")


def test_a_picture_and_a_text_find_themselves(
    made_index: Path, folder: Path, tmp_path: Path, run_here: Callable
) -> None:
    result = run_here("search", str(made_index), str(folder / "013.webp"), "top_k=3", f"output={tmp_path}/found.jsonl")
    assert result.returncode == 0, result.stderr
    assert re.search(r"1 +│ +1.000 │ +9\d.\d\d │ +013.webp", result.stdout)
    rows = [json.loads(line) for line in (tmp_path / "found.jsonl").read_text().splitlines()]
    assert [row["rank"] for row in rows] == [1, 2, 3] and rows[0]["row"] == 13
    assert rows[0]["score"] == pytest.approx(1, abs=1e-3) and rows[0]["image_path"] == "013.webp"
    assert "nearest of 30" in run_here("search", str(made_index), "cost ${5} [/b]", "top_k=1").stdout  # as it is
    caption = (folder / "021.txt").read_text()
    result = run_here("search", str(made_index), f'"{caption}"', "among=text", "top_k=1")
    assert "1.000" in result.stdout and "021.webp" in result.stdout and "nearest of 30 texts" in result.stdout


def test_equals_the_retrieval_of_the_evaluation(tiny_export: Path, tmp_path: Path, run_here: Callable) -> None:
    samples = read_sample("wds_twemoji/test/0.tar", 60)
    for number, sample in enumerate(samples):
        sample["txt"] = f"thing number {number}".encode()
        del sample["cls"]
    root = tmp_path / "wds_pairs"
    write_tar(root / "test/0.tar", samples)
    (root / "test/nshards.txt").write_text("1")
    (root / "dataset_type.txt").write_text("retrieval")
    output = tmp_path / "results.jsonl"
    given = (f"datasets=[{root}]", f"output={output}", f"cache={tmp_path}/cache", "bootstrap_resamples=0")
    assert run_here("evaluate", f"model={tiny_export}", *given, "num_workers=0", "device=cpu").returncode == 0
    metrics = json.loads(output.read_text())["metrics"]
    assert (
        run_here("embed", f"model={tiny_export}", f"input={root}", f"output={tmp_path}/index", "device=cpu").returncode
        == 0
    )
    index = open_index(tmp_path / "index")
    encoder = load_query_encoder(index.record, None, torch.device("cpu"))
    queries = torch.stack([encoder.encode(f"thing number {number}") for number in range(60)])
    rows = index.find(queries, 10).rows
    for k in (1, 5, 10):
        recall = (rows[:, :k] == torch.arange(60)[:, None]).any(dim=1).float().mean()
        assert metrics[f"image_retrieval_recall@{k}"] == pytest.approx(float(recall), abs=1e-6)


def test_approximate(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    index = write_index(tmp_path / "index", unit(400, 16))
    query = unit(16, seed=1)
    with caplog.at_level("INFO", "clipmini"):
        rows, scores = approximate.find_approximate(index, query, 5)
    exact = index.find(query[None], 5)
    assert rows == exact.rows[0].tolist()
    np.testing.assert_allclose(scores, exact.scores[0], atol=1e-6)
    assert "made a graph of 400 embeddings" in caplog.text
    recall = float(re.findall(r"recall@10 of the graph: (\S+)", caplog.text)[0])
    assert 0.9 < recall <= 1
    caplog.clear()
    assert approximate.find_approximate(index, query, 5)[0] == rows and "made a graph" not in caplog.text
    (tmp_path / "index/usearch/image.usearch").write_bytes(b"torn")  # is made again
    assert approximate.find_approximate(index, query, 5)[0] == rows


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["x.png"], r"query=x.png: No such file or directory; a text that ends like a picture's name goes in quotes"),
        (["cat", "topk=3"], r"unknown key topk \(did you mean 'top_k'\?\)"),
        (["cat", "dog"], r"dog: what is it\?"),
        (["cat", "top_k=0"], r"top_k=0: must be 1 or more"),
        (["cat", "among=pictures"], r"among=pictures: .* has no such embeddings; there are: image, text"),
        (["word " * 40], r"has 42 tokens and the model takes 24"),
        ([], r"query has no value"),
        (["cat", "output=/dev/null/x"], r"output=/dev/null/x: cannot be written"),
    ],
)
def test_bad_values(words: list[str], message: str, made_index: Path, run_here: Callable) -> None:
    result = run_here("search", str(made_index), *words)
    assert result.returncode == 2 and re.search(message, result.stderr), result.stderr


def test_bad_index_model_and_picture(
    made_index: Path, tiny_export: Path, tiny_json: Path, tmp_path: Path, run_here: Callable
) -> None:
    def refused(*words: str) -> str:
        result = run_here("search", *words)
        assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
        return result.stderr

    assert f"index={tmp_path}: no index there" in refused(str(tmp_path), "cat")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    assert "broken.png: picture: not a JPEG, PNG or WebP" in refused(str(made_index), str(tmp_path / "broken.png"))
    other = make_model(str(tiny_json))
    with torch.no_grad():
        other.visual.proj[0, 0] += 1
    export_open_clip(other, tmp_path / "other/tiny")
    assert "the index was made with" in refused(str(made_index), "cat", f"model={tmp_path}/other/tiny")
    index = write_index(tmp_path / "index", unit(10, 16))
    index.layout.metadata(2).unlink()
    assert "1 of 3 partitions are missing, first 2" in refused(str(tmp_path / "index"), "cat")
    write_index(tmp_path / "index", unit(10, 16))
    index.layout.embeddings("image", 0).write_bytes(b"torn")
    assert "cannot read img_emb_0.npy" in refused(str(tmp_path / "index"), "cat")
    np.save(index.layout.embeddings("image", 0), np.zeros((5, 8), np.float16))
    assert "img_emb_0.npy is float16 [5, 8], not fp16 [n, 16]" in refused(str(tmp_path / "index"), "cat")
