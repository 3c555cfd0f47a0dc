"""Configuration: where the yaml files lie, what composes and checks them, and the only place that instantiates."""

import argparse
import functools
import inspect
import os
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import hydra._internal.hydra
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from clipmini import hydra_checks, redaction
from clipmini.annotations import check_meant, check_schema
from clipmini.errors import UserError, did_you_mean
from clipmini.files import write_atomically
from clipmini.schemas import COMMANDS, POSITIONAL, TrainConfig
from clipmini.targets import PARTIAL, TARGET, Allowed, check_names, check_node, check_targets, make_factory

TYPO = 0.75  # likeness to a key above which KEY=VALUE is no value without a key
SCHEMAS = {"train": TrainConfig, **COMMANDS}
PACKAGE = Path(__file__).resolve().parent
# A wheel carries the yaml files inside the package, a checkout beside it.
CONFIG_DIR = next(path for path in (PACKAGE / "conf", PACKAGE.parent / "conf") if path.is_dir())


class CheckedConfigLoader(ConfigLoaderImpl):
    """Loads every config, of a run, a sweep, one of its jobs or `compose`; what Hydra itself would run is checked."""

    def load_configuration(
        self, config_name: str | None, overrides: list[str], *arguments: Any, **options: Any
    ) -> DictConfig:
        try:
            cfg = super().load_configuration(config_name, overrides, *arguments, **options)
        except OmegaConfBaseException:  # some of which are ValueErrors
            raise
        except UnicodeDecodeError as error:
            raise UserError(f"a config file is not UTF-8: {error}") from error
        except ValueError as error:
            raise UserError(str(error)) from error
        content = hydra_checks.read_plain(cfg)
        redaction.remember(redaction.find_secrets(content))
        hydra_checks.check_rights(cfg, overrides)
        is_job = options.get("from_shell", True)
        hydra_checks.check_hydra(content.pop("hydra"), read_allowed(content), is_job=is_job)
        check_names(content, "", read_allowed(content))  # what they lead to is checked when torch is loaded
        check_content(config_name, content)
        return cfg


def check_content(command: str | None, content: dict[str, Any]) -> None:
    """Check what types do not tell of a composed config, as plain data.

    Raises:
        UserError: a number that is none or out of its limits, an empty text, or a name that is no directory's.
    """
    check_meant(content, "")
    if schema := SCHEMAS.get(command or ""):
        check_schema(content, schema)
    if command == "train":
        check_run_name(content["name"])


def check_run_name(name: str) -> None:
    """See that a run's name is that of a directory below paths.output.

    Raises:
        UserError: it is not.
    """
    if not name.isprintable() or {"", ".", ".."} & set(name.split("/")):
        raise UserError(f"name={name!r}: must be the name of a directory below paths.output, as in mine or tests/mine")


def register() -> None:
    """Make schemas, the `package:` resolver and our checks known to Hydra; must run before a config is composed."""
    hydra._internal.hydra.ConfigLoaderImpl = CheckedConfigLoader  # type: ignore[misc]
    for name, schema in SCHEMAS.items():
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
        path = QuotedString(f"file://{os.path.abspath(options.config_dir)}", Quote.double)
        overrides = [f"hydra.searchpath=[{path.with_quotes()}]", *overrides]
    register()
    with initialize_config_dir(str(config_file(name).parent), version_base="1.3"):
        return hydra_compose(name, list(overrides))


def read_options(name: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Compose the config of a command, and return it as plain data.

    What is given without the name of its key (`POSITIONAL`) is taken as it is: it is no override of Hydra's.

    Raises:
        UserError: an unknown key, or more values than keys.
    """
    known = [entry.name for entry in fields(COMMANDS[name])]
    overrides = [word for word in arguments if "=" in word and word.partition("=")[0].split(".")[0] in known]
    values = [word for word in arguments if word not in overrides]
    named = {word.partition("=")[0] for word in overrides}
    keys = [key for key in POSITIONAL.get(name, ()) if key.removesuffix("...") not in named]
    positional = {key.removesuffix("..."): key.endswith("...") for key in keys}
    surplus = [] if any(positional.values()) else values[len(positional) :]
    named_values = [word for word in values if re.match(r"[+~]*[\w.]+=", word)]  # a path may hold = too
    typos = [word for word in named_values if get_close_matches(word.partition("=")[0], known, cutoff=TYPO)]
    for word in (*typos, *(named_values if surplus else ()), *surplus):
        key = word.partition("=")[0]
        what = f"unknown key {key}{did_you_mean(key, known)}" if "=" in word else f"{word}: what is it?"
        raise UserError(f"{what}; there are {', '.join(known)}")
    cfg = compose(name, overrides)
    given: dict[str, Any] = {}
    for key, is_many in positional.items():
        if values:
            given[key] = values if is_many else values.pop(0)
            cfg[key] = given[key][:0]  # as it is, it might be taken for an interpolation
    content = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    assert isinstance(content, dict)
    return {str(key): given.get(str(key), value) for key, value in content.items()}


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
        inspect.signature(factory).bind()
    except TypeError as error:  # as when a key was taken out by ~
        raise UserError(f"{key}: {error}") from error
    try:
        return factory()
    except ModuleNotFoundError as error:
        raise UserError(f"{key} needs a package that is not installed: {error}") from error


def build_all(cfg: DictConfig, key: str, /) -> list[Any]:
    """Make every object of a mapping of nodes, such as `callbacks`; a node set to null is left out."""
    return [build(cfg, f"{key}.{name}") for name, node in OmegaConf.select(cfg, key).items() if node is not None]
