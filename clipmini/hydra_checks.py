"""What Hydra itself would run or write by a config, before `train` sees anything of it."""

import contextlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from clipmini.annotations import flatten
from clipmini.errors import UserError
from clipmini.targets import Allowed, check_targets

# These let a config run code. A file that came from elsewhere must not give itself that right.
COMMAND_LINE_ONLY = ("allow_targets", "data.allow_pipe", "hydra.job.env_set")
PLUGINS = ["hydra._internal.core_plugins.", "hydra_plugins."]  # launchers and sweepers; both are Hydra's to check
LOGGING_CLASS = re.compile(r"logging\.(handlers\.)?[A-Z]\w*")
LOGGING_CODE = ("queue", "listener", ".")  # what else logging.config imports, calls or sets


def read_plain(node: Any) -> Any:
    """Return a config as plain data, resolved as far as that can be done before a run; the rest is as written."""
    if OmegaConf.is_dict(node):
        return {str(name): read_child(node, name) for name in node}
    if OmegaConf.is_list(node):
        return [read_child(node, number) for number in range(len(node))]
    return node


def read_child(node: Any, name: Any) -> Any:
    """Return an element of a config as plain data; what cannot be resolved yet is its text."""
    try:
        return read_plain(node[name])
    except OmegaConfBaseException:
        return str(node._get_node(name)._value())


def check_rights(cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Refuse that a file of a config gives itself the right to run code.

    Raises:
        UserError: one of COMMAND_LINE_ONLY is set elsewhere.
    """
    given: set[str] = set()
    with contextlib.suppress(OverrideParseException):  # told by Hydra
        for override in OverridesParser.create().parse_overrides(list(overrides)):
            if not override.is_delete():
                given |= flatten({override.key_or_group: override.value()}).keys()
    for key in COMMAND_LINE_ONLY:
        value = read_raw(cfg, key.split("."))
        for name, leaf in flatten({key: value} if value else {}).items():
            if name not in given:
                raise UserError(
                    f"{name}={leaf}: comes from a file; what lets a config run code must be given on the command line"
                )


def read_raw(node: Any, path: Sequence[str]) -> Any:
    """Return what is written at a place, or in place of what it would be in: text, if it is open what that will be."""
    for part in path:
        if not OmegaConf.is_dict(node) or part not in node:
            return None
        if OmegaConf.is_interpolation(node, part):
            return str(node._get_node(part)._value())
        node = node._get_node(part)
    return OmegaConf.to_container(node, resolve=False) if OmegaConf.is_config(node) else node._value()


def check_hydra(content: Mapping[str, Any], allowed: Allowed, *, is_job: bool) -> None:
    """Check Hydra's own part of a config, whose classes Hydra makes before the job begins.

    Raises:
        UserError: it cannot work, would run what is not allowed, or would write the overrides with all their secrets.
    """
    for name in ("callbacks", "launcher", "sweeper"):
        check_resolved(content.get(name), f"hydra.{name}")
        check_targets(content.get(name), f"hydra.{name}", allowed.more(PLUGINS))
    for name in ("hydra_logging", "job_logging"):
        check_resolved(content.get(name), f"hydra.{name}")
        check_logging(content.get(name), f"hydra.{name}", allowed)
    for name in ("run", "sweep"):
        if content[name]["dir"] == "":
            raise UserError(f"hydra.{name}.dir is empty: must be a directory")
    if not isinstance(content["verbose"], bool | str | list):
        raise UserError(f"hydra.verbose={content['verbose']}: must be true, false, or names of loggers")
    if is_job and content.get("output_subdir") is not None:
        raise UserError(
            f"hydra.output_subdir={content['output_subdir']}: must be null; the run writes its config.yaml itself, "
            "without secrets"
        )


def check_resolved(tree: Any, key: str) -> None:
    """Refuse what is not known yet and may turn out to be more than text.

    Raises:
        UserError: there is such a value.
    """
    if isinstance(tree, Mapping):
        for name, value in tree.items():
            check_resolved(value, f"{key}.{name}")
    elif isinstance(tree, list):
        for number, value in enumerate(tree):
            check_resolved(value, f"{key}[{number}]")
    elif isinstance(tree, str) and re.fullmatch(r"\s*\$\{.*\}\s*", tree, re.DOTALL):
        raise UserError(f"{key}={tree}: cannot be resolved before the run begins, and so not be checked; write it out")


def check_logging(tree: Any, key: str, allowed: Allowed) -> None:
    """Refuse a configuration of logging with other classes than logging's own: it can call any function.

    Raises:
        UserError: it has one.
    """
    if isinstance(tree, Mapping):
        for name, value in tree.items():
            is_code = name in LOGGING_CODE or (name == "()" and not allowed.has(str(value)))
            is_foreign = name == "class" and not (LOGGING_CLASS.fullmatch(str(value)) or allowed.has(str(value)))
            if is_code or is_foreign:
                raise UserError(
                    f"{key}.{name}={value}: would run code; take classes of Python's logging, or allow more with "
                    "'allow_targets=[my_package.]' on the command line"
                )
            check_logging(value, f"{key}.{name}", allowed)
    elif isinstance(tree, list):
        for number, value in enumerate(tree):
            check_logging(value, f"{key}[{number}]", allowed)
    elif isinstance(tree, str) and "ext://" in tree and tree not in ("ext://sys.stdout", "ext://sys.stderr"):
        raise UserError(f"{key}={tree}: only ext://sys.stdout and ext://sys.stderr may be named")
