"""Configuration: the schema of our own keys, where the yaml files lie, and the only place that instantiates."""

import argparse
import functools
import os
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hydra._internal.hydra
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import MISSING, DictConfig, OmegaConf

from clipmini import hydra_checks, redaction
from clipmini.errors import UserError
from clipmini.files import write_atomically
from clipmini.targets import PARTIAL, TARGET, Allowed, check_names, check_node, check_targets, make_factory

PACKAGE = Path(__file__).resolve().parent
# A wheel carries the yaml files inside the package, a checkout beside it.
CONFIG_DIR = next(path for path in (PACKAGE / "conf", PACKAGE.parent / "conf") if path.is_dir())


@dataclass
class CheckpointConfig:
    """When checkpoints are written and how many stay."""

    every_n_steps: int = MISSING
    every_n_minutes: float | None = MISSING
    every_n_samples: int | None = MISSING
    keep_last: int = MISSING
    keep_every_n_steps: int | None = MISSING
    background: bool = MISSING
    retries: int = MISSING
    retry_seconds: float = MISSING
    max_failures: int = MISSING
    parts_timeout: float = MISSING


@dataclass
class PreemptionConfig:
    """How signals stop a run."""

    check_every_seconds: float = MISSING
    requeue: bool = MISSING


@dataclass
class TimeoutsConfig:
    """How long the processes of a run wait for one another, in seconds."""

    start: float = MISSING
    step: float = MISSING
    stacks: float = MISSING


@dataclass
class BadStepsConfig:
    """When a step changes nothing, and how many of those a run may have."""

    max_in_a_row: int = MISSING
    skip_spikes: bool = MISSING
    window: int = MISSING
    sigmas: float = MISSING


@dataclass
class LoraConfig:
    """Low-rank changes of a trained model's weights."""

    rank: int = MISSING
    alpha: float = MISSING
    image: list[str] | None = MISSING
    text: list[str] | None = MISSING


@dataclass
class StageConfig:
    """A stage of the curriculum."""

    until: float = MISSING
    image_size: int | None = None
    patch_dropout: float | None = None


@dataclass
class LayerDecayConfig:
    """How much slower the early layers of each tower learn."""

    image: float = MISSING
    text: float = MISSING


@dataclass
class AverageConfig:
    """The average of the weights over the steps."""

    decay: float | None = MISSING
    warmup: bool = MISSING


@dataclass
class EvaluationConfig:
    """What a model is judged by while it trains, and at the end."""

    datasets: list[Any] = field(default_factory=list)
    batch_size: int = MISSING
    precision: str = MISSING
    probes: list[str] = MISSING
    probe_features: str = MISSING
    knn_k: int = MISSING
    knn_temperature: float = MISSING
    l2: float | None = MISSING
    bootstrap_resamples: int = MISSING
    at_start: bool = MISSING
    every_n_steps: int | None = MISSING
    best_metric: str | None = MISSING
    weights: str = MISSING


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
    curriculum: list[StageConfig] | None = MISSING
    teacher: str | None = MISSING
    compile: bool = MISSING
    profile: bool = MISSING
    allow_targets: list[str] = field(default_factory=list)
    data: dict[str, Any] = MISSING
    model: dict[str, Any] = MISSING
    loss: dict[str, Any] = MISSING
    optimizer: dict[str, Any] = MISSING
    schedule: dict[str, Any] = MISSING
    trainer: dict[str, Any] = MISSING
    callbacks: dict[str, Any] = MISSING
    logger: dict[str, Any] = MISSING
    layer_decay: LayerDecayConfig = field(default_factory=LayerDecayConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    bad_steps: BadStepsConfig = field(default_factory=BadStepsConfig)
    ema: AverageConfig = field(default_factory=AverageConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    preemption: PreemptionConfig = field(default_factory=PreemptionConfig)
    timeouts: TimeoutsConfig = field(default_factory=TimeoutsConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)


@dataclass
class EvaluateConfig:
    """The keys of `clipmini evaluate`."""

    model: str = MISSING
    architecture: str | None = MISSING
    weights: str = MISSING
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
    weights: str = MISSING
    wise: float | None = MISSING
    format: str = MISSING
    output: str = MISSING
    license: str | None = MISSING


class CheckedConfigLoader(ConfigLoaderImpl):
    """Loads every config, of a run, a sweep, one of its jobs or `compose`; what Hydra itself would run is checked."""

    def load_configuration(
        self, config_name: str | None, overrides: list[str], *arguments: Any, **options: Any
    ) -> DictConfig:
        cfg = super().load_configuration(config_name, overrides, *arguments, **options)
        content = hydra_checks.read_plain(cfg)
        redaction.remember(redaction.find_secrets(content))
        hydra_checks.check_rights(cfg, overrides)
        is_job = options.get("from_shell", True)
        hydra_checks.check_hydra(content.pop("hydra"), read_allowed(content), is_job=is_job)
        check_names(content, "", read_allowed(content))  # what they lead to is checked when torch is loaded
        return cfg


def register() -> None:
    """Make schemas, the `package:` resolver and our checks known to Hydra; must run before a config is composed."""
    hydra._internal.hydra.ConfigLoaderImpl = CheckedConfigLoader  # type: ignore[misc]
    for name, schema in (("train", TrainConfig), ("evaluate", EvaluateConfig), ("export", ExportConfig)):
        ConfigStore.instance().store(f"{name}_schema", schema)
    OmegaConf.register_new_resolver("package", lambda name: str(PACKAGE / name), replace=True)


def clean_sweep() -> None:
    """Write `multirun.yaml` again without secrets: Hydra's sweepers save all overrides in it as they were given."""
    cfg = HydraConfig.get()
    path = Path(cfg.sweep.dir) / "multirun.yaml"
    if cfg.mode != RunMode.MULTIRUN or not path.is_file():
        return
    content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    assert isinstance(content, dict)
    overrides = [redaction.redact_override(word) for word in content.pop("hydra")["overrides"]["task"]]
    content = {**redaction.redact(content), "hydra": {"overrides": {"task": overrides}}}
    write_atomically(path, OmegaConf.to_yaml(OmegaConf.create(content)).encode())


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


@functools.cache
def own_names() -> frozenset[str]:
    """Return the classes and functions that our own yaml files name."""
    texts = (path.read_text(encoding="utf-8") for path in CONFIG_DIR.rglob("*.yaml"))
    return frozenset(name for text in texts for name in re.findall(rf"^\s*{TARGET}: *([\w.]+)", text, re.MULTILINE))


def read_allowed(content: Any) -> Allowed:
    """Return what a config, as plain data or not, may name.

    Raises:
        UserError: its `allow_targets` is wrong.
    """
    return Allowed(own_names()).more(list(content.get("allow_targets") or []))


def check_all(cfg: DictConfig) -> None:
    """Check every `_target_` of a whole config, also of what will not be built.

    Raises:
        UserError: one is not allowed.
    """
    check_targets(OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True), "", read_allowed(cfg))


def read_node(cfg: DictConfig, key: str, skip: Mapping[str, Any] = types.MappingProxyType({})) -> dict[str, Any]:
    """Return a node of a config as plain data, after all checks.

    Args:
        cfg: the whole config, so that messages can name the full key.
        key: where the node is, as in `callbacks.progress`.
        skip: parameters that the program sets itself.

    Raises:
        UserError: a `_target_` that is not allowed, an unknown key, or a value of another type than annotated.
    """
    node = OmegaConf.select(cfg, key, throw_on_missing=True)
    content = OmegaConf.to_container(node, resolve=True, throw_on_missing=True) if OmegaConf.is_config(node) else node
    if not isinstance(content, dict) or TARGET not in content:
        raise UserError(f"{key}={content}: must be a mapping with a {TARGET}")
    named = {str(name): value for name, value in content.items()}
    allowed = read_allowed(cfg)
    check_targets(named, key, allowed)
    check_node(named, key, allowed, skip)
    return named


def build(cfg: DictConfig, key: str, /, **runtime: Any) -> Any:
    """Make the object that a node's `_target_` names.

    Hydra's `instantiate` is not used: it resolves again what was checked, and imports whatever comes out.

    Args:
        cfg: the whole config, so that messages can name the full key.
        key: where the node is, as in `callbacks.progress`.
        runtime: what only the program knows (a model, the number of steps); wins over the node's own keys.

    Raises:
        UserError: a target that is not allowed, a key that it does not take, a value of the wrong type, or a package
            that is missing.
    """
    node = read_node(cfg, key, skip=runtime)
    factory = functools.partial(make_factory(node, key, read_allowed(cfg)), **runtime)
    if node.get(PARTIAL):
        return factory
    try:
        return factory()
    except ModuleNotFoundError as error:
        raise UserError(f"{key} needs a package that is not installed: {error}") from error


def build_all(cfg: DictConfig, key: str, /) -> list[Any]:
    """Make every object of a mapping of nodes, such as `callbacks`; a node set to null is left out."""
    return [build(cfg, f"{key}.{name}") for name, node in OmegaConf.select(cfg, key).items() if node is not None]
