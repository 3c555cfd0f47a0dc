"""`clipmini evaluate`: sets and a trained model to numbers, each with its interval and what chance gives."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from clipmini import config, distributed, launch
from clipmini.console import log_rows, log_table, set_up_logging, track
from clipmini.data.decode import EvaluationTransform
from clipmini.data.loader import default_num_workers
from clipmini.ema import check_weights
from clipmini.errors import UserError, check_choice
from clipmini.evaluation.cache import FeatureCache
from clipmini.evaluation.datasets import Opened, open_sets
from clipmini.evaluation.details import write_details
from clipmini.evaluation.encoder import MAX_UNREADABLE, check_precision, load_pictures, make_batches
from clipmini.evaluation.entries import read_entries
from clipmini.evaluation.evaluator import Evaluator, Result
from clipmini.evaluation.published import check_published, log_comparison
from clipmini.evaluation.results import add_row, log_results, read_rows, write_clip_benchmark
from clipmini.evaluation.sets import ClassificationSet
from clipmini.evaluation.tables import import_parquet
from clipmini.evaluation.tasks import make_protocol
from clipmini.model import count_parameters, image_size
from clipmini.sources import Source, load_model
from clipmini.watch import watch

log = logging.getLogger(__name__)

DETAILS_FORMATS = ("csv", "parquet")
NOT_WATCHED = ("again", "architecture", "details", "clip_benchmark", "compare_to")


def run(overrides: Sequence[str]) -> int:
    """Compose the config and evaluate.

    Returns:
        The exit code.

    Raises:
        UserError: anything that cannot work; what was found before stays in the file of results.
        HydraException, OmegaConfBaseException: overrides that do not fit the config.
    """
    content = OmegaConf.to_container(config.compose("evaluate", overrides), resolve=True, throw_on_missing=True)
    assert isinstance(content, dict)
    options = {str(name): value for name, value in content.items()}
    processes = launch.read_launch()
    set_up_logging(None, rank=processes.rank)
    check_options(options)
    device = launch.choose_device(options["device"], processes)
    with launch.joined(processes, device):
        evaluate(options, device, num_cores=processes.num_cores)
    return 0


def check_options(options: dict[str, Any]) -> None:
    """See that what is asked for at the end can be done, before anything is.

    Raises:
        UserError: it cannot.
    """
    check_published(options["compare_to"])
    check_weights(options["weights"], "weights")
    check_precision(options["precision"])
    check_choice("details_format", options["details_format"], DETAILS_FORMATS)
    if options["details"] and options["details_format"] == "parquet":
        import_parquet("details_format=parquet")
    if not options["datasets"]:
        raise UserError("datasets=[]: no set to evaluate on")
    if options["model"] is None and not options["check"]:
        raise UserError("model has no value: give it one, as in model=..., or only read the sets by check=true")
    if options["best_metric"] is not None and not options["watch"]:
        raise UserError(f"best_metric={options['best_metric']}: is for watch=true")
    given = [f"{name}=" for name in NOT_WATCHED if options[name]]
    if options["watch"] and given:
        raise UserError(
            f"watch=true: is without {', '.join(given)}: it writes to output= and the run's TensorBoard only"
        )
    read_rows(Path(options["output"]))


def evaluate(options: dict[str, Any], device: torch.device, *, num_cores: int) -> None:
    """Read the sets, load the model, and write results."""
    protocol, num_workers = make_protocol(options), options["num_workers"]
    entries = read_entries(options["datasets"], "datasets")
    evaluator = Evaluator(
        open_sets(entries, "datasets", with_train=bool(options["probes"])),
        protocol,
        options["batch_size"],
        default_num_workers(num_cores) if num_workers is None else num_workers,
        options["precision"],
    )
    if options["check"]:
        check_sets(evaluator)
    elif options["watch"]:
        if options["best_metric"] is not None:
            evaluator.check_metric(options["best_metric"])
        watch(
            Path(options["model"]),
            evaluator,
            Path(options["output"]),
            device,
            weights=options["weights"],
            best_metric=options["best_metric"],
            poll_seconds=options["poll_seconds"],
        )
    else:
        evaluate_once(options, evaluator, device)


def evaluate_once(options: dict[str, Any], evaluator: Evaluator, device: torch.device) -> None:
    """Evaluate one model and print what was found."""
    source = load_model(options["model"], architecture=options["architecture"], weights=options["weights"])
    tokenize = source.tokenizer()
    output = Path(options["output"])
    cache = FeatureCache(Path(options["cache"])) if options["cache"] else None
    encoder = evaluator.encoder(source.model.to(device), tokenize, device, cache)
    log_source(source, device)
    known = [] if options["again"] else read_rows(output)
    rows = []
    about = {"model": f"{source.name} {source.weights}", "step": source.step}
    for result in evaluator.run(encoder, known, about):
        rows.append(result.row)
        if distributed.rank() == 0:
            write(result, options, source)
    log_results(rows)
    if options["compare_to"]:
        log_comparison(rows, options["compare_to"])
    if distributed.rank() == 0:
        log.info("results in %s", output)


def write(result: Result, options: dict[str, Any], source: Source) -> None:
    """Write a result to all files that are asked for."""
    if result.finding is None:
        log.info("%s: known from %s; again=true does it again", result.row["key"], options["output"])
    else:
        add_row(Path(options["output"]), result.row)
        if options["details"]:
            about = options["details_format"], source.name, source.weights
            write_details(Path(options["details"]), result.opened.dataset, result.finding, *about)
    if options["clip_benchmark"]:
        write_clip_benchmark(Path(options["clip_benchmark"]), result.row, source.name, source.weights)


def log_source(source: Source, device: torch.device) -> None:
    """Say what is evaluated, and on what."""
    millions = count_parameters(source.model) / 1e6
    log_rows(
        {
            "model": f"{source.name}, {source.weights}, {millions:.1f} M parameters, {image_size(source.model)} px",
            "device": f"{distributed.world_size()} x {launch.describe_device(device)}",
        }
    )


def check_sets(evaluator: Evaluator) -> None:
    """Decode every picture of the sets, and say what is in them; no model is needed.

    Raises:
        UserError: a set has more than 1 % of pictures that cannot be read.
    """
    rows = []
    broken = []
    for opened in evaluator.opened:
        dataset = opened.dataset
        batches = make_batches(len(dataset.pictures), evaluator.batch_size)
        loaded = load_pictures(dataset.pictures, EvaluationTransform(32), batches, evaluator.num_workers)
        bad = [text for _, _, texts in track(loaded, len(batches), dataset.name) for text in texts]
        for text in bad[:5]:
            log.warning("%s: %s", dataset.name, text)
        if len(bad) > MAX_UNREADABLE * len(dataset.pictures):
            broken.append(f"{dataset.name} has {len(bad)} of {len(dataset.pictures)}")
        rows.append([dataset.name, f"{len(dataset.pictures):,}", f"{len(bad):,}", describe(opened)])
    log_table("Sets", ("data set", "pictures", "unreadable", "what"), rows)
    if broken:
        raise UserError(f"more than {MAX_UNREADABLE:.0%} of the pictures cannot be read: {', '.join(broken)}")


def describe(opened: Opened) -> str:
    """Say what a set is made of."""
    dataset = opened.dataset
    if not isinstance(dataset, ClassificationSet):
        return f"{len(dataset.captions):,} captions"
    sentences = set(map(len, dataset.prompts))
    per_class = f"{min(sentences)}" if len(sentences) == 1 else f"{min(sentences)} to {max(sentences)}"
    present = dataset.labels.max(axis=0).sum() if dataset.is_multilabel else len(set(dataset.labels.tolist()))
    return f"{len(dataset.class_names):,} classes, {present:,} with pictures, {per_class} sentences each"
