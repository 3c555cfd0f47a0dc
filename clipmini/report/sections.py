"""What a report says of a run, section by section."""

from collections.abc import Iterator, Sequence

import yaml

from clipmini.console import format_seconds
from clipmini.evaluation.results import HEADINGS, TITLES, Row, percent, table_lines
from clipmini.redaction import redact
from clipmini.report.charts import Line, draw
from clipmini.report.page import Pictures, Section, Table
from clipmini.report.read import Run

# Curves in the order of the page: name in `metrics.csv`, title, whether it is a share, whether its axis is logarithmic.
CURVES = (
    ("train/loss", "loss", False, False),
    ("train/accuracy", "in-batch accuracy", True, False),
    ("train/scale", "scale of the logits", False, False),
    ("train/lr", "learning rate", False, False),
    ("train/grad_norm", "gradient norm", False, True),
    ("train/image_spread", "spread of the pictures' features", False, False),
    ("train/text_spread", "spread of the captions' features", False, False),
    ("throughput/samples_per_second", "samples a second", False, False),
    ("throughput/data_wait", "time waiting for data", True, False),
    ("val/loss", "loss on held-out pairs", False, False),
    ("val/accuracy", "accuracy on held-out pairs", True, False),
)
EVALUATION = "evaluation/"
CONFUSION_COLUMNS = ("class", "pictures", "recall", "most often taken for", "times")


def make_sections(run: Run) -> list[Section]:
    """Return all sections of a report."""
    return [
        summarize(run),
        Section("Curves", charts=draw_curves([run])),
        *([Section("Results", tables=list(list_results(run.rows)))] if run.rows else []),
        *show_examples(run),
        *show_confusions(run),
        tell_health(run),
        Section("Config", texts=[("config.yaml", yaml.safe_dump(redact(run.config), sort_keys=False))]),
        *show_environment(run),
    ]


def summarize(run: Run) -> Section:
    """Say in a few numbers what the run was."""
    rate = run.samples / run.seconds if run.seconds else 0.0
    facts = {"steps": f"{run.steps:,}"}
    if run.batch_size:
        facts["samples seen"] = f"{run.samples:,}"
        facts["time in training"] = format_seconds(run.seconds)
        facts["samples a second"] = f"{rate:,.0f}"
    if loss := run.curves.get("train/loss"):
        facts["last loss"] = f"{loss[1][-1]:.3f}"
    for row in run.rows:
        name = row["main_metric"]
        value, chance = row["metrics"][name], row["chance"].get(name)
        if value is not None:
            told = "" if chance is None else f" (chance {percent(chance)})"
            facts[f"{row['key']}, {HEADINGS.get(name, name)}"] = f"{percent(value)}{told}"
    return Section("Summary", facts=facts)


def draw_curves(runs: Sequence[Run]) -> list[str]:
    """Draw what was measured over the steps, of several runs over each other."""
    names = [*CURVES, *((name, name.removeprefix(EVALUATION), True, False) for name in list_evaluations(runs))]
    charts = []
    for name, title, is_share, is_logarithmic in names:
        lines = [Line(run.name, *run.curves[name]) for run in runs if name in run.curves]
        if lines:
            charts.append(draw(title, lines, is_share=is_share, is_logarithmic=is_logarithmic))
    return charts


def list_evaluations(runs: Sequence[Run]) -> list[str]:
    """Return the names of the main metrics of sets that were evaluated more than once."""
    names = dict.fromkeys(name for run in runs for name in run.curves if name.startswith(EVALUATION))
    wanted = [name for name in names if name.endswith("/main_metric")]
    return [name for name in wanted if any(len(run.curves.get(name, ([], []))[0]) > 1 for run in runs)]


def list_results(rows: Sequence[Row]) -> Iterator[Table]:
    """Yield a table for each task, with intervals and what chance gives."""
    for task in dict.fromkeys(row["task"] for row in rows):
        lines = [line for row in rows if row["task"] == task for line in table_lines(row)]
        yield Table(TITLES.get(task, task), ("data set", "metric", "value", "95 % interval", "chance", "of"), lines)


def show_examples(run: Run) -> Iterator[Section]:
    """Yield the pictures of each set, right and wrong."""
    for key, shown in run.shown.items():
        groups = [
            Pictures(f"{title}, {len(found)} of them", found)
            for title, is_hit in (("Right", True), ("Wrong", False))
            if (found := [one for one in shown["examples"] if one["is_hit"] == is_hit])
        ]
        if groups:
            text = (
                "Each picture with the texts nearest to it and their cosines; chosen evenly over the set, not by hand."
            )
            yield Section(f"Pictures of {key}", text=text, pictures=groups)


def show_confusions(run: Run) -> Iterator[Section]:
    """Yield the most confused classes of each set."""
    tables = []
    for key, shown in run.shown.items():
        rows = [
            [row["class"], str(row["pictures"]), f"{row['recall']:.0%}", row["taken_for"], str(row["times"])]
            for row in shown["classes"]
            if row["times"]
        ]
        if rows:
            tables.append(Table(key, CONFUSION_COLUMNS, rows))
    if tables:
        yield Section("Most confused classes", tables=tables)


def tell_health(run: Run) -> Section:
    """Say how good the data was."""
    bad = run.causes.total()
    seen = f"{run.samples:,} samples" if run.samples else "the samples"
    text = f"{bad:,} of {seen} could not be used." if bad else f"All of {seen} were good."
    skipped = run.curves.get("train/bad_steps", ([], [0]))[1][-1]
    text += f" {skipped:.0f} steps were skipped." if skipped else " No step was skipped."
    if wait := run.curves.get("throughput/data_wait"):
        text += f" Waiting for data took {sum(wait[1]) / len(wait[1]):.1%} of the time."
    rows = [
        [cause, f"{count:,}", f"{count / run.samples:.3%}" if run.samples else "-"]
        for cause, count in run.causes.most_common()
    ]
    tables = [Table("Bad samples", ("cause", "samples", "share"), rows)] if rows else []
    return Section("Data health", text=text, tables=tables)


def show_environment(run: Run) -> Iterator[Section]:
    """Yield what the run ran on, each time that it was started."""
    if run.environment:
        names = dict.fromkeys(name for start in run.environment for name in start)
        columns = ("", *(f"start {number}" for number in range(1, len(run.environment) + 1)))
        rows = [[name, *(str(start.get(name, "")) for start in run.environment)] for name in names]
        yield Section("Environment", tables=[Table("Environment", columns, rows, is_numeric=False)])
