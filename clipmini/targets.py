"""The classes and functions that a config names: which ones it may, with what values, and making their objects."""

import functools
import importlib
import importlib.util
import inspect
import re
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from clipmini.annotations import check_values
from clipmini.errors import UserError, did_you_mean

TARGET, PARTIAL = "_target_", "_partial_"
# Beside the names in our own conf/: what users choose optimizers, callbacks and loggers from.
PREFIXES = (
    "torch.optim.",
    *(f"pytorch_lightning.{name}." for name in ("callbacks", "loggers", "profilers", "strategies")),
)

# Packages that these need, each in an extra of the same name.
PACKAGES = {
    "pytorch_lightning.loggers.WandbLogger": "wandb",
    "pytorch_lightning.loggers.MLFlowLogger": "mlflow",
    "clipmini.loggers.MlflowRun": "mlflow",
    "clipmini.loggers.WandbRun": "wandb",
}


@dataclass(frozen=True)
class Allowed:
    """What may be named.

    Attributes:
        names: of classes and functions.
        prefixes: of names; what such a name leads to must be defined under one of them too, not only imported there.
    """

    names: frozenset[str]
    prefixes: tuple[str, ...] = PREFIXES

    def more(self, prefixes: list[str]) -> "Allowed":
        """Allow more prefixes.

        Raises:
            UserError: one is no name of a package or module with a dot at its end.
        """
        for prefix in prefixes:
            if not isinstance(prefix, str) or not re.fullmatch(r"([^\W\d]\w*\.)+", prefix):
                raise UserError(
                    f"allow_targets={prefix}: must be the name of a package or module with a dot at its end, as in "
                    "'allow_targets=[my_package.]'"
                )
        return Allowed(self.names, (*self.prefixes, *prefixes))

    def has(self, name: str) -> bool:
        """Say whether a name may be imported."""
        return name in self.names or name.startswith(self.prefixes)


def check_targets(tree: Any, key: str, allowed: Allowed) -> None:
    """Check all of a config: the names of every node first, then what they lead to.

    Args:
        tree: plain data, resolved.
        key: where it is in the config; empty for the whole.

    Raises:
        UserError: a name that is not allowed, a key that would run code or be passed over, or a missing package.
    """
    check_names(tree, key, allowed)
    for at, node in find_nodes(tree, key):
        check_package(at, node[TARGET])
        locate(at, node[TARGET], allowed)


def check_names(tree: Any, key: str, allowed: Allowed) -> None:
    """Check the names alone, for which nothing is imported; else as `check_targets`."""
    for at, node in find_nodes(tree, key):
        check_keys(at, node)
        check_name(at, node[TARGET], allowed)


def find_nodes(tree: Any, key: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield full key and content of every mapping with a `_target_`, in any depth.

    Raises:
        UserError: `trust_remote_code` is somewhere.
    """
    if isinstance(tree, Mapping):
        if TARGET in tree:
            yield key, tree
        for name, value in tree.items():
            at = f"{key}.{name}" if key else str(name)
            if name == "trust_remote_code":
                raise UserError(f"{at}={value}: the code of a model hub is never run; leave the key out")
            yield from find_nodes(value, at)
    elif isinstance(tree, list | tuple):
        for number, value in enumerate(tree):
            yield from find_nodes(value, f"{key}[{number}]")


def check_keys(key: str, node: Mapping[str, Any]) -> None:
    """Refuse keys that Hydra gives a meaning to and clipmini does not: `_args_`, `_convert_`, `_recursive_`.

    Raises:
        UserError: there is one, or `_partial_` is neither true nor false.
    """
    for name in node:
        if re.fullmatch(r"_\w+_", str(name)) and name not in (TARGET, PARTIAL):
            raise UserError(f"{key}.{name}: of Hydra's own keys a node may have {TARGET} and {PARTIAL}")
    if not isinstance(node.get(PARTIAL, False), bool):
        raise UserError(f"{key}.{PARTIAL}={node[PARTIAL]}: must be true or false")


def check_name(key: str, target: Any, allowed: Allowed) -> None:
    """Refuse a name that is not allowed, without importing anything.

    Raises:
        UserError: it is not.
    """
    if not isinstance(target, str) or not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)+", target) or ".__" in target:
        raise UserError(f"{key}.{TARGET}={target}: is no name of a class or function, as in torch.optim.AdamW")
    if not allowed.has(target):
        raise UserError(
            f"{key}.{TARGET}={target}: a config may name what conf/ of clipmini names, and what begins with "
            f"{', '.join(allowed.prefixes)}; 'allow_targets=[{target.split('.')[0]}.]' on the command line allows "
            "more, for code that you trust"
        )


def check_package(key: str, target: str) -> None:
    """See that an optional package is there, without importing it.

    Raises:
        UserError: it is not; the message says how to install it.
    """
    package = PACKAGES.get(target)
    if package is None:
        return
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:  # a directory of that name, as loggers write, is no package
        raise UserError(f"{key} needs the package {package}, which is not installed: pip install 'clipmini[{package}]'")


def locate(key: str, target: Any, allowed: Allowed) -> Any:
    """Import the class or function that an allowed name leads to.

    Every step is a module of the package or a class, and the end is defined where it may be: `torch.optim.adamw.torch`
    is torch, imported there, and would lead to anything.

    Raises:
        UserError: the name is not allowed, cannot be imported, or leads elsewhere.
    """
    check_name(key, target, allowed)
    try:
        found = follow(target)
    except Exception as error:  # whatever the import of a module of the user's may raise
        raise UserError(f"{key}.{TARGET}={target} cannot be imported: {error}") from error
    module = getattr(found, "__module__", None)
    is_ours = target in allowed.names or (isinstance(module, str) and f"{module}.".startswith(allowed.prefixes))
    if not is_ours or not (inspect.isclass(found) or inspect.isroutine(found)):
        what = f"defined in {module}" if isinstance(module, str) else "no class or function"
        raise UserError(
            f"{key}.{TARGET}={target}: is {what}; a config may name classes and functions that are defined under "
            f"{', '.join(allowed.prefixes)}"
        )
    return found


def follow(target: str) -> Any:
    """Import modules as far as a name has them, then take attributes of classes.

    Raises:
        ImportError: there is no such module, or no such thing in it.
    """
    parts = target.split(".")
    found: Any = importlib.import_module(parts[0])
    for number, part in enumerate(parts[1:], 2):
        name = ".".join(parts[:number])
        if isinstance(found, ModuleType) and found.__name__ == ".".join(parts[: number - 1]):
            try:
                found = importlib.import_module(name)
                continue
            except ModuleNotFoundError as error:
                if error.name != name:
                    raise
        elif not inspect.isclass(found):
            raise ImportError(f"{'.'.join(parts[: number - 1])} is neither a module of {parts[0]} nor a class")
        try:
            found = getattr(found, part)
        except AttributeError as error:
            hint = did_you_mean(part, (name for name in dir(found) if not name.startswith("_")))
            raise ImportError(f"there is no {part} in {'.'.join(parts[: number - 1])}{hint}") from error
    return found


def check_node(node: Mapping[str, Any], key: str, allowed: Allowed, skip: Mapping[str, Any]) -> None:
    """Compare a node's keys and values with the parameters of its `_target_` and their annotations.

    Args:
        node: a mapping with a `_target_`; nodes inside it that have one too are checked as well.
        key: where it is in the config.
        skip: parameters that the program sets itself.

    Raises:
        UserError: a target that cannot be imported, an unknown key, or a value of another type than annotated.
    """
    target = locate(key, node[TARGET], allowed)
    parameters = inspect.signature(target).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    function = inspect.unwrap(target.__init__ if inspect.isclass(target) else target)
    try:
        hints = typing.get_type_hints(function, include_extras=True)
    except (NameError, TypeError):  # annotations that only a type checker can resolve
        hints = {}
    values = {str(name): value for name, value in node.items() if name not in (TARGET, PARTIAL, *skip)}
    nodes = {name for name, value in values.items() if isinstance(value, Mapping) and TARGET in value}
    known = values.keys() if takes_any else parameters.keys()
    check_values(key, values, known, {name: hint for name, hint in hints.items() if name not in nodes})
    for name in nodes:
        check_node(values[name], f"{key}.{name}", allowed, {})


def make_factory(node: Mapping[str, Any], key: str, allowed: Allowed) -> functools.partial:
    """Take the target of a node and its keys together; nodes inside it are made now."""
    values = {str(name): value for name, value in node.items() if name not in (TARGET, PARTIAL)}
    arguments = {name: make(value, f"{key}.{name}", allowed) for name, value in values.items()}
    return functools.partial(locate(key, node[TARGET], allowed), **arguments)


def make(value: Any, key: str, allowed: Allowed) -> Any:
    """Make what a value describes, in any depth.

    Raises:
        UserError: a class or function does not take its values.
    """
    if isinstance(value, Mapping):
        if TARGET not in value:
            return {name: make(inner, f"{key}.{name}", allowed) for name, inner in value.items()}
        factory = make_factory(value, key, allowed)
        try:
            return factory if value.get(PARTIAL) else factory()
        except (TypeError, ValueError) as error:
            raise error if isinstance(error, UserError) else UserError(f"{key}: {error}") from error
    if isinstance(value, list):
        return [make(inner, f"{key}[{number}]", allowed) for number, inner in enumerate(value)]
    return value
