"""Measures exact search in a large index: seconds a query, memory against the size of the index; and usearch beside it.

The embeddings are clusters of random unit vectors. Each search is made in a process of its own, and its memory is the
most that it held beyond what it held with the index open. The first query of a process reads the index from the disk,
or from the system's cache of it, and is told apart.
"""

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from benchmark_tables import print_table

from clipmini.check.measure import peak_memory, reset_memory
from clipmini.search.approximate import find_approximate, open_graph
from clipmini.search.index import open_index
from clipmini.search.layout import REQUIRED, Layout, Partition, check_output

PARTITION = 100_000  # rows
CLUSTERS = 1000
SPREAD = 0.5  # of a row from the middle of its cluster, against 1 for the middle itself
CPU = torch.device("cpu")


def write_index(directory: Path, rows: int, width: int) -> None:
    """Write an index of pictures that are in no file."""
    generator = torch.Generator().manual_seed(0)
    middles = F.normalize(torch.randn(CLUSTERS, width, generator=generator), dim=1)
    partitions = -(-rows // PARTITION)
    record = dict.fromkeys(REQUIRED, "none") | {"partitions": partitions, "width": width, "kinds": ["image"]}
    check_output(directory, record)
    layout = Layout(directory, partitions, ("image",))
    for number in range(partitions):
        count = min(PARTITION, rows - number * PARTITION)
        chosen = torch.randint(CLUSTERS, (count,), generator=generator)
        noise = F.normalize(torch.randn(count, width, generator=generator), dim=1)
        part = F.normalize(middles[chosen] + SPREAD * noise, dim=1).half().numpy()
        known = [{"image_path": f"{number}-{row}"} for row in range(count)]
        layout.write(number, Partition({"image": part}, known, []))


def search_exactly(directory: Path, queries: int) -> tuple[float, list[float], int, int]:
    """Search for some rows of an index: seconds of the first and of the others, bytes held, and bytes of the index."""
    index = open_index(directory)
    reset_memory(CPU)
    before = peak_memory(CPU)
    seconds = []
    for number in range(queries + 1):
        query = index.embedding(number * (len(index) // (queries + 1)))
        start = time.perf_counter()
        found = index.find(query[None], 10)
        index.describe(found.rows[0].tolist())
        seconds.append(time.perf_counter() - start)
    size = sum(index.layout.embeddings("image", number).stat().st_size for number in range(index.layout.partitions))
    return seconds[0], seconds[1:], peak_memory(CPU) - before, size


def search_approximately(directory: Path, queries: int) -> tuple[float, list[float], float]:
    """Search by the graph: seconds to make it, seconds of each query, and its recall."""
    index = open_index(directory)
    start = time.perf_counter()
    _, facts = open_graph(index)
    made, seconds = time.perf_counter() - start, []
    for number in range(queries):
        query = index.embedding(number * (len(index) // queries))
        start = time.perf_counter()
        find_approximate(index, query, 10)
        seconds.append(time.perf_counter() - start)
    return made, seconds, facts["recall"]


def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        return executor.submit(function, *arguments).result()


def run(options: argparse.Namespace) -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory(dir=options.directory) as temporary:
        directory = Path(temporary) / "index"
        write_index(directory, options.rows, options.width)
        print(f"\n{options.rows:,} x {options.width} in fp16, {torch.get_num_threads()} threads\n", flush=True)
        first, seconds, memory, size = in_own_process(search_exactly, directory, options.queries)
        rows = [["exact", f"{1000 * statistics.median(seconds):.0f}", f"{1000 * first:.0f}"]]
        rows[0] += [f"{memory / 2**20:,.0f}", f"x {memory / size:.2f}", "1.000", ""]
        if options.approximate:
            made, seconds, recall = in_own_process(search_approximately, directory, options.queries)
            median = f"{1000 * statistics.median(seconds):.1f}"
            rows.append(["graph", median, "", "", "", f"{recall:.3f}", f"{made:.0f}"])
        print_table(("", "ms a query", "first, ms", "MiB", "of the index", "recall@10", "made in, s"), rows)


def add_parser(commands: Any) -> None:
    """Add the command and its options."""
    formatter = argparse.RawDescriptionHelpFormatter
    text = "exact search in a large index: time and memory; and by a graph"
    parser = commands.add_parser("search", help=text, description=__doc__, formatter_class=formatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--queries", type=int, default=20)
    parser.add_argument("--approximate", action="store_true", help="also make a graph, which takes minutes")
    parser.add_argument("--directory", help="for the index, which is deleted; none: the system's")
    parser.set_defaults(run=run)
