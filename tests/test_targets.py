"""A config can name classes and functions of clipmini's choices only, wherever it stands and however it is written."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import QUICK, run_clipmini
from forked import run_forked
from omegaconf import OmegaConf

from clipmini import config
from clipmini.errors import UserError
from clipmini.targets import Allowed, check_targets, locate

Run = Callable[..., subprocess.CompletedProcess]
ALLOWED = Allowed(config.own_names())
# Each makes the marker if anything of the config is run; {m} is its path.
TOUCH = "'touch {m}'"
EVIL = {
    "os.system": "+callbacks.x={{_target_:os.system,command:" + TOUCH + "}}",
    "eval": "+callbacks.x={{_target_:builtins.eval,source:\"open('{m}','w')\"}}",
    "open": "+callbacks.x={{_target_:builtins.open,file:{m},mode:w}}",
    "pickle": "+callbacks.x={{_target_:pickle.loads,data:x}}",
    "runpy": "+callbacks.x={{_target_:runpy.run_path,path_name:{m}.py}}",
    "unlink": "+callbacks.x={{_target_:pathlib.Path.touch,self:{{_target_:pathlib.Path,_args_:[{m}]}}}}",
    "fsspec": "+callbacks.x={{_target_:fsspec.open,urlpath:{m},mode:w}}",
    "urllib": "+callbacks.x={{_target_:urllib.request.urlretrieve,url:'file:///dev/null',filename:{m}}}",
    "process": "+callbacks.x={{_target_:multiprocessing.Process,target:{{_target_:os.system,command:x}}}}",
    "popen": "+callbacks.x={{_target_:subprocess.Popen,args:[touch,{m}]}}",
    "in place of ours": "callbacks.monitor._target_=os.mkdir",
    "partial": "+optimizer.x={{_target_:os.mkdir,path:{m},_partial_:true}}",
    "a nested node": "+trainer.profiler={{_target_:os.mkdir,path:{m}}}",
    "a list": "evaluation.datasets=[x,[{{_target_:os.mkdir,path:{m}}}]]",
    "a logger": "+logger.x={{_target_:os.mkdir,path:{m}}}",
    "an interpolation": "+callbacks.x={{_target_:'${{name}}',path:{m}}}",
    "a made node": "+callbacks.x='${{oc.create:{{_target_:os.mkdir,path:{m}}}}}'",
    "_args_": "+callbacks.x={{_target_:torch.optim.SGD,_args_:[{m}]}}",
    "Hydra's callbacks": "+hydra.callbacks.x={{_target_:os.mkdir,path:{m}}}",
    "through our own imports": "+hydra.callbacks.x={{_target_:clipmini.config.os.mkdir,path:{m}}}",
    "Hydra's launcher": "hydra.launcher._target_=os.mkdir",
    "a command of our own": "+callbacks.x={{_target_:clipmini.data.remote.run_pipe,command:" + TOUCH + ",target:{m}}}",
    "trust_remote_code": "+model.text_cfg={{hf_model_name:x,trust_remote_code:true}}",
}
# Through what is imported in an allowed module; the end is found out when that is imported.
ESCAPES = [
    "torch.optim.adamw.torch.load",
    "torch.optim.lr_scheduler.Counter",
    "pytorch_lightning.callbacks.timer.os.system",
    "pytorch_lightning.callbacks.model_checkpoint.shutil.rmtree",
    "pytorch_lightning.loggers.csv_logs.os.system",
    "pytorch_lightning.loggers.logger.ABC",
    "pytorch_lightning.profilers.advanced.tempfile.mkdtemp",
    "pytorch_lightning.callbacks.timer.log",
    "torch.optim.AdamW.register_step_post_hook.__globals__",
]


@pytest.mark.parametrize("override", EVIL.values(), ids=EVIL)
def test_evil_config(override: str, run_here: Run, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    (tmp_path / "marker.py").write_text(f"open({str(marker)!r}, 'w')")
    name = ["name=os.mkdir"] if "${name}" in override.format(m=marker) else []
    result = run_here("train", *QUICK, "data.train=nowhere", override.format(m=marker), *name)
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("clipmini: ") and "Traceback" not in result.stderr
    assert "_target_=" in result.stderr or "._args_: " in result.stderr or "trust_remote_code=" in result.stderr
    assert sorted(os.listdir(tmp_path)) == ["marker.py"]


def test_escape_through_a_whole_run(shards: Path, tiny_json: Path, tmp_path: Path) -> None:
    node = f"{{_target_:pytorch_lightning.callbacks.timer.os.system,command:'touch {tmp_path}/marker'}}"
    overrides = [*QUICK, f"data.train={shards}", f"model.name={tiny_json}", "name=x", f"+callbacks.x={node}"]
    result = run_forked(["train", *overrides], tmp_path)
    assert result.returncode == 2 and "clipmini: callbacks.x._target_=pytorch_lightning.callbacks" in result.stderr
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["train.log"]


@pytest.mark.parametrize("target", ESCAPES)
def test_names_that_lead_elsewhere(target: str) -> None:
    with pytest.raises(UserError, match=rf"^a\.b\[1\]\._target_={target}"):
        check_targets({"a": {"b": [0, {"_target_": target, "_partial_": True}]}}, "", ALLOWED)


@pytest.mark.parametrize("target", ["", "os", "torch.optim.", "a..b", None, {"_target_": "x"}, "a.b; c", "a.__b__"])
def test_what_is_no_name(target: object) -> None:
    with pytest.raises(UserError, match=r"^x\._target_=.*: is no name of a class or function"):
        check_targets({"x": {"_target_": target}}, "", ALLOWED)


@pytest.mark.parametrize(
    "target",
    [
        "torch.optim.SGD",
        "torch.optim.lr_scheduler.StepLR",
        "pytorch_lightning.Trainer",
        "pytorch_lightning.callbacks.DeviceStatsMonitor",
        "pytorch_lightning.loggers.WandbLogger",
        "pytorch_lightning.profilers.SimpleProfiler",
        "pytorch_lightning.strategies.DDPStrategy",
        "clipmini.model.create_model",
    ],
)
def test_what_users_choose_from(target: str) -> None:
    assert callable(locate("x", target, ALLOWED))


def test_our_own_names_are_those_of_the_yaml_files() -> None:
    assert "clipmini.checkpoints.saving.SaveCheckpoints" in config.own_names() and len(config.own_names()) > 10
    assert not any(name.startswith(("os.", "builtins.")) for name in config.own_names())


@pytest.mark.parametrize("prefix", ["my_package", "", ".", "os.system(", "a..", " a."])
def test_a_prefix_is_a_package(prefix: str) -> None:
    with pytest.raises(UserError, match="^allow_targets=.*: must be the name of a package or module with a dot at"):
        config.read_allowed(OmegaConf.create({"allow_targets": [prefix]}))


CALLBACK = """
from pytorch_lightning.callbacks import Callback

class Marker(Callback):
    def __init__(self, *, path):
        self.path = path

    def on_train_start(self, *_):
        open(self.path, "w").close()

"""


def write_package(directory: Path) -> list[str]:
    """Write a package of a user's and a directory of configs that uses it; return the overrides for that."""
    (directory / "my_package").mkdir()
    (directory / "my_package/__init__.py").write_text(CALLBACK)
    (directory / "configs/callbacks").mkdir(parents=True)
    node = f"marker:\n  _target_: my_package.Marker\n  path: {directory}/marker\n"
    (directory / "configs/callbacks/mine.yaml").write_text(f"defaults:\n  - default\n{node}")
    return ["--config-dir", str(directory / "configs"), "callbacks=mine"]


def test_a_package_of_ones_own(shards: Path, tiny_json: Path, run_here: Run, tmp_path: Path) -> None:
    mine = write_package(tmp_path)
    overrides = [*mine, *QUICK, f"data.train={shards}", f"model.name={tiny_json}", "name=x", "steps=1"]
    result = run_here("train", *overrides)
    assert result.returncode == 2 and not (tmp_path / "marker").exists()
    assert "callbacks.marker._target_=my_package.Marker: a config may name" in result.stderr
    assert "'allow_targets=[my_package.]' on the command line allows more" in result.stderr
    result = run_clipmini("train", *overrides, "allow_targets=[my_package.]", cwd=tmp_path)
    assert result.returncode == 0 and (tmp_path / "marker").exists(), result.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("allow_targets: [my_package.]", "allow_targets=['my_package.']: comes from a file"),
        ("allow_targets: ${hydra:help.template}", "allow_targets=${hydra:help.template}: comes from a file"),
        ("data:\n  allow_pipe: true", "data.allow_pipe=True: comes from a file"),
        ("hydra:\n  job:\n    env_set:\n      LD_PRELOAD: /evil.so", "comes from a file"),
        (
            "hydra:\n  callbacks:\n    x:\n      _target_: os.mkdir\n      path: marker",
            "callbacks.x._target_=os.mk",
        ),
        ("hydra:\n  callbacks: ${hydra:help}", "hydra.callbacks=${hydra:help}: cannot be resolved before"),
        (
            "hydra:\n  hydra_logging:\n    root:\n      handlers: []\n    handlers:\n      x:\n        class: os.mkdir",
            "code",
        ),
        (
            "hydra:\n  job_logging:\n    filters:\n      x:\n        (): os.mkdir\n        path: marker",
            "would run code",
        ),
        ("hydra:\n  job_logging:\n    x: ext://os.system", "only ext://sys.stdout"),
        (
            "x: !!python/object/apply:os.mkdir [marker]",
            "a config file cannot be read: could not determine a constructor",
        ),
    ],
)
def test_evil_yaml(text: str, message: str, run_here: Run, tmp_path: Path) -> None:
    (tmp_path / "configs/experiment").mkdir(parents=True)
    (tmp_path / "configs/experiment/evil.yaml").write_text(f"# @package _global_\n{text}\n")
    result = run_here("train", "--config-dir", "configs", "experiment=evil", "data.train=x")
    assert result.returncode == 2 and message in result.stderr, result.stderr
    assert "Traceback" not in result.stderr and os.listdir(tmp_path) == ["configs"]


@pytest.mark.parametrize(
    "given",
    [
        "+hydra.job.env_set={OMP_NUM_THREADS:'1'}",
        "+hydra.job.env_set.OMP_NUM_THREADS='1'",
        "+hydra.job={env_set:{OMP_NUM_THREADS:'1'}}",
    ],
)
def test_a_variable_of_the_command_line_lets_no_other_in(given: str, tmp_path: Path) -> None:
    assert config.compose("train", [given]).name
    (tmp_path / "experiment").mkdir()
    text = "# @package _global_\nhydra:\n  job:\n    env_set:\n      LD_PRELOAD: /evil.so\n"
    (tmp_path / "experiment/evil.yaml").write_text(text)
    with pytest.raises(UserError, match=r"^hydra\.job\.env_set\.LD_PRELOAD=/evil\.so: comes from a file"):
        config.compose("train", [f"--config-dir={tmp_path}", "experiment=evil", given.replace("+", "++")])


def test_sweeps_are_checked_too(run_here: Run, tmp_path: Path) -> None:
    node = "+callbacks.x={_target_:os.mkdir,path:marker}"
    result = run_here("train", "--multirun", "data.train=x", "seed=0,1", node)
    assert result.returncode == 2 and "callbacks.x._target_=os.mkdir" in result.stderr
    assert not os.listdir(tmp_path)


def test_no_pickle_of_a_job_is_read(run_here: Run) -> None:
    result = run_here("train", "--experimental-r", "config.pickle")
    assert result.returncode == 2 and "--experimental-rerun: would unpickle a file" in result.stderr


def test_other_commands_are_checked_too(run_here: Run, tmp_path: Path) -> None:
    for arguments in (
        ["shards", "index", "data.cache._target_=os.mkdir", "data.train=x"],
        ["export", "+hydra.callbacks.x={_target_:os.mkdir,path:marker}", "model=x", "output=y"],
    ):
        result = run_here(*arguments)
        assert result.returncode == 2 and "._target_=os.mkdir: a config may name" in result.stderr, result.stderr
    assert not os.listdir(tmp_path)


def test_values_that_a_nested_class_refuses() -> None:
    content = {"allow_targets": [f"{__name__}."], "a": {"_target_": f"{__name__}.Holder", "part": {}}}
    content["a"]["part"] = {"_target_": f"{__name__}.Holder"}  # type: ignore[index]
    with pytest.raises(UserError, match=r"^a\.part: .*missing 1 required"):
        config.build(OmegaConf.create(content), "a")


class Holder:
    """A target for the test above."""

    def __init__(self, *, part: object) -> None:
        self.part = part
