"""`clipmini search INDEX QUERY`: prints what is nearest to a text, a picture or a sum of them."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

from clipmini import config, launch
from clipmini.console import log_table, set_up_logging
from clipmini.errors import UserError
from clipmini.files import write_atomically
from clipmini.search.approximate import find_approximate
from clipmini.search.index import Index, list_results, open_index
from clipmini.search.layout import Row
from clipmini.search.query import load_query_encoder, parse_query

log = logging.getLogger(__name__)

SHOWN = ("image_path", "source", "caption")  # of what is known, on the screen


def run(arguments: Sequence[str]) -> int:
    """Search.

    Returns:
        The exit code.

    Raises:
        UserError: no such index, a query that cannot be read, or another model.
    """
    options = config.read_options("search", arguments)
    set_up_logging(None)
    parse_query(options["query"])  # before a model is loaded
    index = open_index(Path(options["index"]), options["among"])
    device = launch.choose_device(options["device"], launch.read_launch())
    encoder = load_query_encoder(index.record, options["model"], device)
    query = encoder.encode(options["query"])
    if options["approximate"]:
        numbers, scores = find_approximate(index, query, options["top_k"])
        rows = list_results(index, numbers, scores, [None] * len(numbers))
    else:
        found = index.find(query[None], options["top_k"])
        rows = list_results(index, *(values[0].tolist() for values in found))
    log_results(options["query"], index, rows)
    if options["output"] is not None:
        lines = (json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
        try:
            write_atomically(Path(options["output"]), "".join(lines).encode())
        except OSError as error:
            raise UserError(f"output={options['output']}: cannot be written: {error.strerror}") from error
    return 0


def log_results(query: str, index: Index, rows: Sequence[Row]) -> None:
    """Print results as a table."""
    shown = [name for name in SHOWN if any(row.get(name) for row in rows)]
    lines = [
        [
            str(row["rank"]),
            f"{row['score']:.3f}",
            "" if row["percentile"] is None else f"{row['percentile']:.2f}",
            *(" / ".join(str(row.get(name) or "").splitlines()) for name in shown),
        ]
        for row in rows
    ]
    what = "pictures" if index.kind == "image" else "texts"
    log_table(f"{query}: nearest of {len(index):,} {what}", ("rank", "score", "percentile", *shown), lines)
