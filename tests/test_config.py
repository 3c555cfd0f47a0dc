"""Every yaml composes, resolves and builds; wrong keys and types are refused by name."""

import importlib.util
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
from hydra.errors import ConfigCompositionException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ValidationError
from test_model import make_model

from clipmini import cli, config, launch, schemas, train, trainer
from clipmini.errors import UserError
from clipmini.export.open_clip_directory import export_open_clip
from clipmini.one_tower import text_tower

Compose = Callable[..., DictConfig]
YAMLS = sorted(config.CONFIG_DIR.rglob("*.yaml"))
COMMANDS = [path.stem for path in YAMLS if path.parent.name == "commands"]
PLACES = {"data/augmentation": "data/augmentation@data.view_augmentation"}  # where a group is not put by its name
CHOICES = [
    f"{PLACES.get(group := str(path.parent.relative_to(config.CONFIG_DIR)), group)}={path.stem}"
    for path in YAMLS
    if path.parent != config.CONFIG_DIR and path.stem not in COMMANDS
]


def test_every_group_has_choices() -> None:
    groups = "callbacks data evaluation experiment hydra hydra/launcher logger loss model optimizer paths schedule"
    expected = {*groups.split(), "trainer", *PLACES.values()}
    assert {choice.split("=")[0] for choice in CHOICES} == expected


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_yaml_opens_with_its_command(path: Path) -> None:
    lines = [line for line in path.read_text().splitlines() if not line.startswith("# @package")]
    assert lines[0].startswith("# ") and re.search(rf"clipmini ({'|'.join(cli.COMMANDS)}) ?", "".join(lines[:2]))


@pytest.mark.parametrize("choice", CHOICES)
def test_choice_composes_and_resolves(
    choice: str, compose: Compose, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = compose(choice, f"data.train={shards}", f"paths.run={tmp_path}")
    resolved = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    assert isinstance(resolved, dict) and resolved["name"]
    if choice.startswith("experiment="):
        assert resolved["name"] == choice.removeprefix("experiment=").replace("none", "dev")


@pytest.mark.parametrize(
    "choice", [choice for choice in CHOICES if choice.split("=")[0] not in ("hydra", "hydra/launcher", "paths")]
)
def test_choice_builds(
    choice: str, compose: Compose, shards: Path, tiny_json: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    own_model = choice.startswith(("experiment=", "model="))
    model = [] if own_model else [f"model.name={tiny_json}"]
    own_data = choice == "experiment=sample"
    data = [] if own_data else [f"data.train={shards}"]
    cfg = compose(choice, "batch_size=64", f"paths.run={tmp_path}", *model, *data)
    if cfg.model.pretrained:  # which is not here
        is_sample = choice.startswith("experiment=sample")
        export_open_clip(make_model("sample_resnet" if is_sample else str(tiny_json)), tmp_path / "start")
        cfg.model.update({"name": None, "pretrained": str(tmp_path / "start"), "text_cfg": None})
    if choice == "trainer=gpu":  # this choice must stop on a machine without a GPU
        cfg.trainer.accelerator = "cpu"

    needs_launcher = choice in ("trainer=ddp", "trainer=fsdp", "trainer=multi_node")
    processes = launch.Launch("torchrun" if needs_launcher else "none", 2 if needs_launcher else 1, 2, 0)
    if needs_launcher:
        for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
            monkeypatch.setenv(name, value)
    else:
        processes = launch.Launch("none", 1, 1, 0)

    module = train.build_module(cfg, {}, processes, total_steps=10)
    projection = getattr(text_tower(module.model), "text_projection", None)  # pictures alone need no text tower
    assert projection is None or module.model.architecture["embed_dim"] == projection.shape[1]
    assert train.build_data(cfg, processes).manifest.num_samples > 0
    kind, _, package = choice.partition("=")
    if kind == "logger" and package != "default" and importlib.util.find_spec(package) is None:
        with pytest.raises(UserError, match=rf"logger.{package} needs .*: pip install 'clipmini\[{package}\]'"):
            train.build_trainer(cfg, processes, 10)
        return
    built = train.build_trainer(cfg, processes, 10)
    assert built.max_steps == 10 and built.world_size == processes.world_size


def test_what_would_not_reach_lightnings_trainer_is_refused(compose: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    set_here: dict[str, Any] = {}

    def note(cfg: DictConfig, key: str, **runtime: Any) -> Any:
        set_here.update(runtime)
        return config.build(cfg, key, **runtime)

    cfg = compose("trainer=cpu", "paths.run=x")
    monkeypatch.setattr(trainer, "build", note)
    train.build_trainer(cfg, launch.Launch("none", 1, 1, 0), 10)
    assert len(set_here) > 5 and set_here.keys() - cfg.trainer.keys() <= trainer.INSTEAD.keys()
    for name, instead in trainer.INSTEAD.items():
        with pytest.raises(UserError, match=f"^{re.escape(f'trainer.{name}=1: {instead}')}$"):
            trainer.check_options({name: 1})


@pytest.mark.parametrize(
    ("overrides", "error"),
    [
        (["seeed=3"], ConfigCompositionException),
        (["data.num_worker=3"], ConfigCompositionException),
        (["evaluation.batch_sizes=3"], ConfigCompositionException),
        (["seed=abc"], ConfigCompositionException),
        (["batch_size=1.5"], ConfigCompositionException),
        (["checkpoint.keep_last=many"], ConfigCompositionException),
        (["evaluation.datasets=7"], ConfigCompositionException),
    ],
)
def test_own_keys_are_checked_when_composed(overrides: list[str], error: type, compose: Compose) -> None:
    with pytest.raises(error):
        compose(*overrides)


def test_own_keys_of_a_file_are_checked(compose: Compose) -> None:
    cfg = compose()
    with pytest.raises(ValidationError, match="could not be converted to Integer"):
        cfg.seed = "abc"


class Thing:
    """A target for the tests below."""

    def __init__(self, *, number: float, names: list[str], mode: Literal["a", "b"] = "a", child: Any = None) -> None:
        self.number, self.names, self.mode, self.child = number, names, mode, child


ALLOWED = {"allow_targets": [f"{__name__}."]}
THING = {"_target_": f"{__name__}.Thing", "number": 1, "names": ["x"]}


def test_build_makes_plain_objects_and_passes_runtime_objects_through() -> None:
    marker = object()
    thing = config.build(OmegaConf.create({**ALLOWED, "a": {"thing": THING}}), "a.thing", child=marker)
    assert thing.number == 1 and type(thing.names) is list
    assert thing.child is marker


def test_build_keeps_a_partial_open() -> None:
    factory = config.build(OmegaConf.create({**ALLOWED, "thing": {**THING, "_partial_": True}}), "thing", mode="b")
    assert factory(child=3).mode == "b" and factory(child=3).child == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nummber": 2}, r"unknown key thing\.nummber \(did you mean 'number'"),
        ({"number": "two"}, r"thing\.number='two' has the wrong type: expected float"),
        ({"number": True}, r"thing\.number=True has the wrong type"),
        ({"number": None}, r"thing\.number=None has the wrong type"),
        ({"names": "x"}, r"thing\.names='x' has the wrong type: expected list\[str\]"),
        ({"names": ["x", 1]}, r"thing\.names=\['x', 1\] has the wrong type"),
        ({"mode": "c"}, r"thing\.mode=c: is one of a, b$"),
        ({"mode": "A"}, r"thing\.mode=A: is one of a, b \(did you mean 'a'\?\)$"),
        ({"_target_": f"{__name__}.nothing"}, rf"thing\._target_={__name__}.nothing cannot be imported"),
        ({"child": {**THING, "number": "x"}}, r"thing\.child\.number='x' has the wrong type"),
    ],
)
def test_build_refuses_unknown_keys_and_wrong_types(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        config.build(OmegaConf.create({**ALLOWED, "thing": {**THING, **changes}}), "thing")


def test_paths_with_signs_of_overrides(tmp_path: Path) -> None:
    directory = tmp_path / 'a=1, (b) [c] "d" \\'
    (directory / "experiment").mkdir(parents=True)
    (directory / "experiment/mine.yaml").write_text("# @package _global_\nname: mine\n")
    assert config.compose("train", [f"--config-dir={directory}", "experiment=mine"]).name == "mine"
    assert config.read_options("report", ["outputs/lr=1e-3"])["run"] == "outputs/lr=1e-3"
    assert config.read_options("compare", ["outputs/lr=1", "outputs/lr=2"])["runs"] == ["outputs/lr=1", "outputs/lr=2"]
    with pytest.raises(UserError, match=r"^unknown key outptu \(did you mean 'output'"):
        config.read_options("report", ["outptu=a"])


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_composes_its_examples(command: str) -> None:
    lines = [line for line in config.config_file(command).read_text().splitlines() if line.startswith("# ")]
    examples = [line for line in lines if f" {command} " in line]
    assert examples
    for line in examples:
        words = shlex.split(re.split(" {3,}", line)[0])
        given = words[words.index(command) + 1 :]
        config.read_options(command, given) if command in schemas.COMMANDS else config.compose(command, given)
