"""Configuration: the schema of our own keys, where the yaml files lie, and the only place that instantiates."""

import argparse
import functools
import inspect
import os
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from omegaconf import MISSING, DictConfig, OmegaConf

from clipmini.annotations import check_values
from clipmini.errors import UserError

PACKAGE = Path(__file__).resolve().parent
# A wheel carries the yaml files inside the package, a checkout beside it.
CONFIG_DIR = next(path for path in (PACKAGE / "conf", PACKAGE.parent / "conf") if path.is_dir())


@dataclass
class CheckpointConfig:
    """When checkpoints are written and how many stay."""

    every_n_steps: int = MISSING
    keep_last: int = MISSING


@dataclass
class EvaluationConfig:
    """What a model is judged by while it trains, and at the end."""

    datasets: list[Any] = field(default_factory=list)
    batch_size: int = MISSING
    precision: str = MISSING
    bootstrap_resamples: int = MISSING
    every_n_steps: int | None = MISSING
    best_metric: str | None = MISSING


@dataclass
class PathsConfig:
    """Where things lie; `run` is the directory of this run, `cache` one of this node."""

    sample: str = MISSING
    output: str = MISSING
    run: str = MISSING
    cache: str = MISSING


@dataclass
class TrainConfig:
    """The keys of `clipmini train`; a group typed `dict` is checked against the signature of its `_target_`."""

    name: str = MISSING
    seed: int = MISSING
    batch_size: int = MISSING
    micro_batch: int | None = MISSING
    epochs: float | None = MISSING
    steps: int | None = MISSING
    image_size: int | None = MISSING
    data: dict[str, Any] = MISSING
    model: dict[str, Any] = MISSING
    loss: dict[str, Any] = MISSING
    optimizer: dict[str, Any] = MISSING
    schedule: dict[str, Any] = MISSING
    trainer: dict[str, Any] = MISSING
    callbacks: dict[str, Any] = MISSING
    logger: dict[str, Any] = MISSING
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)


@dataclass
class EvaluateConfig:
    """The keys of `clipmini evaluate`."""

    model: str = MISSING
    architecture: str | None = MISSING
    datasets: list[Any] = MISSING
    output: str = MISSING
    again: bool = MISSING
    batch_size: int = MISSING
    num_workers: int | None = MISSING
    precision: str = MISSING
    device: str = MISSING
    probes: list[str] = MISSING
    probe_features: str = MISSING
    knn_k: int = MISSING
    knn_temperature: float = MISSING
    l2: float | None = MISSING
    bootstrap_resamples: int = MISSING
    seed: int = MISSING
    shuffled: bool = MISSING
    details: str | None = MISSING
    details_format: str = MISSING
    clip_benchmark: str | None = MISSING
    compare_to: str | None = MISSING
    check: bool = MISSING
    watch: bool = MISSING
    best_metric: str | None = MISSING
    poll_seconds: float = MISSING
    cache: str | None = MISSING


@dataclass
class ExportConfig:
    """The keys of `clipmini export`."""

    model: str = MISSING
    architecture: str | None = MISSING
    format: str = MISSING
    output: str = MISSING
    license: str | None = MISSING


def register() -> None:
    """Make the schemas and the `package:` resolver known to Hydra; must run before a config is composed."""
    for name, schema in (("train", TrainConfig), ("evaluate", EvaluateConfig), ("export", ExportConfig)):
        ConfigStore.instance().store(f"{name}_schema", schema)
    OmegaConf.register_new_resolver("package", lambda name: str(PACKAGE / name), replace=True)


def config_file(name: str) -> Path:
    """Return the yaml file of a command; all but training's are apart from the groups: `model=` is no choice there."""
    return CONFIG_DIR / f"{name}.yaml" if name == "train" else CONFIG_DIR / "commands" / f"{name}.yaml"


def compose(name: str, overrides: Sequence[str]) -> DictConfig:
    """Compose a config, without a job; `--config-dir` adds one's own yaml files, as it does for `clipmini train`."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config-dir", "-cd")
    options, overrides = parser.parse_known_args(overrides)
    if options.config_dir:
        overrides = [f"hydra.searchpath=[file://{os.path.abspath(options.config_dir)}]", *overrides]
    register()
    with initialize_config_dir(str(config_file(name).parent), version_base="1.3"):
        return hydra_compose(name, list(overrides))


def build(cfg: DictConfig, key: str, /, **runtime: Any) -> Any:
    """Make the object that a node's `_target_` names.

    Args:
        cfg: the whole config, so that messages can name the full key.
        key: where the node is, as in `callbacks.progress`.
        runtime: what only the program knows (a model, the number of steps); wins over the node's own keys.

    Raises:
        UserError: a key that the target does not take, a value of the wrong type, or a package that is missing.
    """
    node = OmegaConf.select(cfg, key, throw_on_missing=True)
    check_node(node, key, skip=runtime)
    # As a partial first: Hydra would deep-copy what is passed to it, models and data sets too.
    try:
        factory = instantiate(node, _partial_=True, _convert_="all")
    except InstantiationException as error:
        raise error.__cause__ if isinstance(error.__cause__, UserError) else error from error.__cause__
    if node.get("_partial_"):
        return functools.partial(factory, **runtime)
    try:
        return factory(**runtime)
    except ModuleNotFoundError as error:
        raise UserError(f"{key} needs a package that is not installed: {error}") from error


def build_all(cfg: DictConfig, key: str, /) -> list[Any]:
    """Make every object of a mapping of nodes, such as `callbacks`; a node set to null is left out."""
    return [build(cfg, f"{key}.{name}") for name, node in OmegaConf.select(cfg, key).items() if node is not None]


def check_node(node: DictConfig, key: str, skip: Mapping[str, Any] = types.MappingProxyType({})) -> None:
    """Compare a node's keys and values with the parameters of its `_target_` and their annotations.

    Args:
        node: a mapping with a `_target_`; nodes inside it that have one too are checked as well.
        key: where it is in the config.
        skip: parameters that the program sets itself.

    Raises:
        UserError: a target that cannot be imported, an unknown key, or a value of another type than annotated.
    """
    try:
        target = get_object(node["_target_"])
    except Exception as error:  # whatever the import of a module of the user's may raise
        raise UserError(f"{key}._target_={node['_target_']} cannot be imported: {error}") from error
    parameters = inspect.signature(target).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    try:
        hints = typing.get_type_hints(inspect.unwrap(target.__init__ if inspect.isclass(target) else target))
    except (NameError, TypeError):  # annotations that only a type checker can resolve
        hints = {}
    values = {str(name): value for name, value in node.items() if name not in ("_target_", "_partial_", *skip)}
    nodes = {name for name, value in values.items() if OmegaConf.is_dict(value) and "_target_" in value}
    known = values.keys() if takes_any else parameters.keys()
    check_values(key, values, known, {name: hint for name, hint in hints.items() if name not in nodes})
    for name in nodes:
        check_node(values[name], f"{key}.{name}")
