"""Search by a graph (HNSW, https://arxiv.org/abs/1603.09320) of usearch: faster in large indexes, and may miss some."""

import contextlib
import json
import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipmini.console import format_seconds
from clipmini.errors import UserError
from clipmini.files import write_atomically
from clipmini.search.index import Index

log = logging.getLogger(__name__)

RECALL_AT = 10
ASKED = 128  # embeddings of the index that recall is measured with, as queries
AT_A_TIME = 16  # of them: exact scores of all rows are held for so many


def find_approximate(index: Index, query: Tensor, top_k: int) -> tuple[list[int], list[float]]:
    """Find what is nearest to a query, fp32 [D]: rows and cosines, the nearest first.

    The graph is made the first time, and kept with the index; what it is worth is said each time.

    Raises:
        UserError: usearch is not installed.
    """
    graph, facts = open_graph(index)
    log.info("recall@%d of the graph: %.3f of what is exact", RECALL_AT, facts["recall"])
    rows = graph.search(query.numpy(), min(top_k, len(index))).keys.astype(np.int64).tolist()
    scores = [float(query @ index.embedding(row)) for row in rows]
    order = sorted(range(len(rows)), key=lambda place: (-scores[place], rows[place]))
    return [rows[place] for place in order], [scores[place] for place in order]


def open_graph(index: Index) -> tuple[Any, dict[str, Any]]:
    """Open the graph of an index, or make it."""
    try:
        from usearch.index import Index as Graph
    except ImportError as error:
        raise UserError("approximate=true: needs usearch: pip install 'clipmini[usearch]'") from error
    directory = index.layout.directory / "usearch"
    path, about = directory / f"{index.kind}.usearch", directory / f"{index.kind}.json"
    facts, known = read_facts(about), {name: index.record[name] for name in ("weights", "digest")}
    if facts.items() >= {"rows": len(index), **known}.items() and path.is_file():
        with contextlib.suppress(ValueError, RuntimeError):  # a damaged one is made again
            return Graph.restore(str(path), view=True), facts
    graph = Graph(ndim=index.width, metric="ip", dtype="f16")
    start = time.perf_counter()
    for first, part in index.chunks():
        graph.add(np.arange(first, first + len(part)), part.half().numpy())
    facts = {**known, "rows": len(index), "recall": measure_recall(graph, index), "recall_at": RECALL_AT}
    log.info("made a graph of %s embeddings in %s", f"{len(index):,}", format_seconds(time.perf_counter() - start))
    try:
        write_atomically(path, bytes(graph.save() or b""))
        write_atomically(about, (json.dumps(facts) + "\n").encode())
    except OSError as error:
        log.warning("the graph cannot be kept in %s: %s", directory, error.strerror)
    return graph, facts


def read_facts(path: Path) -> dict[str, Any]:
    """Read what was measured of a graph; nothing if it was not."""
    try:
        facts = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) and {"rows", "recall"} <= facts.keys() else {}


def measure_recall(graph: Any, index: Index) -> float:
    """Return the share of the exact nearest that a graph finds, for embeddings of the index as queries."""
    asked = np.unique(np.linspace(0, len(index) - 1, ASKED).astype(np.int64)).tolist()
    top_k, hits = min(RECALL_AT, len(index)), 0
    for start in range(0, len(asked), AT_A_TIME):
        queries = torch.stack([index.embedding(row) for row in asked[start : start + AT_A_TIME]])
        exact = index.find(queries, top_k).rows
        for query, rows in zip(queries, exact.tolist(), strict=True):
            hits += len(set(rows) & set(graph.search(query.numpy(), top_k).keys.tolist()))
    return hits / (len(asked) * top_k)
