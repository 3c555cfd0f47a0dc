"""`clipmini export`: composes the config, loads the model and writes it."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from clipmini import config
from clipmini.console import set_up_logging
from clipmini.evaluation.cache import hash_weights
from clipmini.evaluation.results import read_rows
from clipmini.export.command import export
from clipmini.export.wise import interpolate_
from clipmini.sources import load_model


def run(overrides: Sequence[str]) -> int:
    """Export a model; its card has what its run found of these very weights.

    Returns:
        The exit code.

    Raises:
        UserError: the model cannot be loaded, or cannot be written in this format.
        HydraException, OmegaConfBaseException: overrides that do not fit the config.
    """
    cfg = config.compose("export", overrides)
    OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    set_up_logging(None)
    source = load_model(cfg.model, architecture=cfg.architecture, weights=cfg.weights)
    if cfg.wise is not None:
        interpolate_(source.model, cfg.wise, source.config, cfg.model)
    weights = hash_weights(source.model)
    known = read_rows(source.run / "results.jsonl") if source.run else []
    export(
        source.model,
        format=cfg.format,
        output=Path(cfg.output),
        name=source.name,
        config=source.config,
        results=[row for row in known if row.get("weights") == weights],
        command=shlex.join(["clipmini", "export", *overrides]),
        step=source.step,
        license=cfg.license,
    )
    return 0
