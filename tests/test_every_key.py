"""Whatever is given for any key of any command: it is taken, or refused in one message; nothing else comes out."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from clipmini import config, hydra_checks
from clipmini.errors import UserError

BAD = ("abc", "", -1, None, [1, "abc"], {"a": 1}, 1e30, float("nan"), "${nope}")
GIVEN = {
    "train": ["experiment=none", "data.train=x", "paths.run=x"],
    "evaluate": ["model=x", "datasets=[x]"],
    "export": ["model=x", "output=x"],
    "embed": ["model=x", "input=x", "output=x"],
    "search": ["index=x", "query=x"],
    "serve": ["index=x"],
    "report": ["run=x"],
    "compare": ["runs=[x,y]"],
    "leaks": ["train=x", "eval=x"],
}
# What is made of a group without data, a model or the disk; and what else is checked against a signature.
MADE = ("loss", "optimizer", "schedule", "data.cache", "data.augmentation", "callbacks.")
CHECKED = (*MADE, "data", "model", "trainer", "logger.")
# What a run itself passes on.
OWN = dict.fromkeys(("terms", "all_views", "accelerator", "devices", "num_nodes", "strategy", "precision"))


def list_leaves(tree: Any, key: str = "") -> Iterator[str]:
    if isinstance(tree, dict) and tree:
        for name, value in tree.items():
            yield from list_leaves(value, f"{key}.{name}" if key else name)
    else:
        yield key


def check(command: str, cfg: DictConfig, key: str, content: dict[str, Any]) -> None:
    """Check a config as when it is composed, and the nodes that a key of `train` is in as before a run.

    Args:
        content: the rest of the config as plain data.
    """
    group = key.split(".")[0]
    config.check_content(command, {**content, group: hydra_checks.read_child(cfg, group)})
    for node in dict.fromkeys((group, ".".join(key.split(".")[:2]))) if command == "train" else ():
        is_node = node in CHECKED or node.startswith(("callbacks.", "logger."))
        if is_node and OmegaConf.select(cfg, node) is not None:
            config.read_node(cfg, node, skip=OWN)
            if node.startswith(MADE):
                config.build(cfg, node)


@pytest.mark.parametrize("command", GIVEN)
def test_any_value_of_any_key_is_taken_or_refused_in_words(command: str) -> None:
    cfg = config.compose(command, GIVEN[command])
    keys = list(list_leaves(OmegaConf.to_container(cfg, resolve=False)))
    content = hydra_checks.read_plain(cfg)
    refused = 0
    for key in keys:
        *path, name = key.split(".")
        parent = OmegaConf.select(cfg, ".".join(path)) if path else cfg
        before = copy.deepcopy(parent._get_node(name))
        check(command, cfg, key, content)  # as it is, it is right
        for value in BAD:
            try:
                parent[name] = value
                check(command, cfg, key, content)
            except (UserError, OmegaConfBaseException) as error:
                assert str(error)
                refused += 1
            except Exception as error:
                raise AssertionError(f"{key}={value!r}: {error!r}") from error
        parent.__dict__["_content"][name] = before  # an assignment would be checked, and change the node in place
    assert refused > 3 * len(keys)
