"""The command as a user meets it: quick help, one clear message for what is wrong, nothing written."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import QUICK, run_clipmini, write_tar
from forked import run_forked

from clipmini import cli


def test_import_and_help_do_without_torch() -> None:
    code = (
        "import sys, clipmini, clipmini.cli\n"
        "try: clipmini.cli.main(['--help'])\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "assert not {'torch', 'pytorch_lightning', 'hydra', 'numpy'} & set(sys.modules), 'heavy import'\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "clipmini train" in result.stdout


def test_a_typo_is_told_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys, clipmini.cli\n"
        "assert clipmini.cli.main(['train', 'data.num_worker=1']) == 2\n"
        "assert 'torch' not in sys.modules, 'heavy import'\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert result.stderr == "clipmini: unknown key data.num_worker (did you mean 'num_workers'?)\n"
    assert not os.listdir(tmp_path)


def main(*arguments: str) -> int:
    """Run the command in this process and return its exit code."""
    try:
        return cli.main(arguments)
    except SystemExit as stop:
        return int(stop.code or 0)


WRONG_OVERRIDES = [
    ("nme=x", "unknown key nme (did you mean 'name'"),
    ("trainer.max_epoch=3", "unknown key trainer.max_epoch"),
    ("seed=abc", "seed: Value 'abc' of type 'str' could not be converted to Integer"),
    ("checkpoint.keep_last=x", "checkpoint.keep_last: Value 'x'"),
    ("model=vit_tny", "no 'vit_tny' among the choices of model (did you mean 'vit_tiny'?); there are: "),
    ("model=null", "Config group override must be a string or a list"),
    ("seed", "cannot read the override seed: missing EQUAL at '<EOF>'; values with braces"),
    ("modle.name=x", "unknown key modle (did you mean 'model'"),
    ("++sed=1", "unknown key sed (did you mean 'seed'"),
    ("epochs=inf", "epochs=inf: must be a finite number"),
    ("optimizer.betas=[0.9,nan]", "optimizer.betas[1]=nan: must be a finite number"),
    ("data.caption_key=", "data.caption_key is empty: give it a value"),
    ("batch_size=0", "batch_size=0: must be 1 or more"),
    ("seed=-1", "seed=-1: must be from 0 to 4294967295"),
    ("epochs=-1", "epochs=-1.0: must be above 0, or null"),
    ("timeouts.step=1e30", "timeouts.step=1e+30: must be above 0, up to 1000000"),
    ("name=../x", "name='../x': must be the name of a directory below paths.output"),
    ("name=a/", "name='a/': must be the name of a directory"),
    ('name="a\nb"', "name='a\\nb': must be the name of a directory"),
    ("bad_steps.window=1", "bad_steps.window=1: must be 2 or more"),
    ("hydra.run.dir=", "hydra.run.dir is empty: must be a directory"),
    ("hydra.verbose=7", "hydra.verbose=7: must be true, false, or names of loggers"),
    ("data.train={0..9}.tar", "cannot read the override data.train={0..9}.tar: "),
]


@pytest.mark.parametrize(("override", "message"), WRONG_OVERRIDES)
def test_wrong_overrides(
    override: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main("train", override) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"clipmini: {message}"), error
    assert "Traceback" not in error and not os.listdir(tmp_path)


WRONG_VALUES = [
    (["data.train=nowhere"], "data.train=nowhere: no shards found"),
    (["data.train={no_pairs}"], "no picture-caption pairs in 1 shards, the first is "),
    (["batch_size=65"], "batch_size=65 is larger than the data: data.train has 64 pairs"),
    (["model.name=ViT-B32"], "model.name=ViT-B32: no such model (did you mean 'ViT-B-32'"),
    (["model.pretrained=opnai"], "model.pretrained=opnai: neither a file nor a tag of "),
    (["optimizer.lr=fast"], "optimizer.lr='fast' has the wrong type: expected float"),
    (["loss.kind=siglpi"], "loss.kind=siglpi: is one of infonce, siglip (did you mean 'siglip'?)"),
    (["loss.temperatures.image_image=abc"], "loss.temperatures.image_image='abc' has the wrong type: expected float"),
    (["~loss.kind"], "loss: missing a required argument: 'kind'"),
    (["optimizer._target_=torch.optim.AdamWW"], "there is no AdamWW in torch.optim (did you mean 'AdamW'"),
    (["optimizer.lr=-1"], "optimizer or schedule: Invalid learning rate: -1"),
    (["+optimizer.momentum=1"], "unknown key optimizer.momentum"),
    (["data.augmentation.flip=2"], "data.augmentation.flip=2: must be from 0 to 1"),
    (
        ["data/augmentation@data.view_augmentation=simclr", "data.view_augmentation.flip=2"],
        "data.view_augmentation.flip=2: must be from 0 to 1",
    ),
    (["loss.init_scale=1000"], "loss.init_scale=1000: must be from 1 to loss.max_scale=100"),
    (["schedule.final_fraction=-1"], "schedule.final_fraction=-1: must be from 0 to 1"),
    (["trainer.log_every_n_steps=0"], "trainer.log_every_n_steps=0: must be 1 or more"),
    (["trainer.gradient_clip_val=-1"], "trainer.gradient_clip_val=-1: must be 0 or more, or null"),
    (["callbacks.training_health.window=0"], "callbacks.training_health.window=0: must be 2 or more"),
    (["model.pretrained=5"], "model.pretrained=5 has the wrong type: expected str | None"),
    (["model.patch_dropout=-1"], "model.patch_dropout=-1: must be from 0 to below 1, or null"),
    (["image_size=8"], "image_size=8: must be at least 16, the size of the model's patches"),
    (["model.text_cfg={vocab_size:10}"], "the tokenizer has token 49407 and the model only 10"),
    (["data.cache.storage_options={s33:{}}"], "data.cache.storage_options.s33: no such protocol (did you mean 's3'"),
    (["model.text_cfg={context_length:1}"], "model.text_cfg.context_length=1: must be 2 or more"),
    (["seed=${nope}"], "seed: Interpolation key 'nope' not found"),
    (["trainer=gpu"], "trainer.accelerator=gpu: torch sees no GPU here; trainer=cpu trains without one"),
    (["trainer=ddp"], "trainer.strategy=ddp: several devices need a launcher, as in `torchrun"),
    (["trainer.devices=2"], "trainer.devices=2: there are 1 processes a node; several devices need a launcher"),
    (["trainer.precision=7"], "trainer: Precision 7 is invalid"),
    (["+trainer.accumulate_grad_batches=2"], "trainer.accumulate_grad_batches=2 would shrink the negatives"),
    (["+trainer.max_steps=5"], "trainer.max_steps=5: is taken from steps or epochs: set one of them"),
    (["+trainer.gradient_clip_algorithm=value"], "trainer.gradient_clip_algorithm=value: is one of null, norm"),
    (["evaluation.datasets=[nowhere]"], "datasets=nowhere: there is no such file or directory"),
    (["steps=null", "epochs=null"], "steps=null and epochs=null: one of them must say how long to train"),
    (["steps=0"], "steps=0, epochs=30.0: less than one step"),
    (["steps=null", "epochs=0.01"], "steps=None, epochs=0.01: less than one step of batch_size=16"),
    (["micro_batch=0"], "micro_batch=0: must be from 1 to the 16 pairs of a process"),
    (["data.second_caption_key=same", "loss.terms.text_text=1"], "data.second_caption_key=same: the text tower has no"),
    (["data.train=???"], "data.train has no value: give it one, as in data.train=..."),
]


@pytest.mark.parametrize(("overrides", "message"), WRONG_VALUES, ids=lambda value: "".join(value)[:40])
def test_wrong_values(
    overrides: list[str],
    message: str,
    shards: Path,
    tiny_json: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    write_tar(tmp_path / "tars/x.tar", [{"__key__": "a", "mp3": b"x", "txt": b"x"}])
    overrides = [override.replace("{no_pairs}", str(tmp_path / "tars")) for override in overrides]
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    assert main("train", *QUICK, f"model.name={tiny_json}", f"data.train={shards}", "name=x", *overrides) == 2
    error = capsys.readouterr().err
    assert error.startswith("clipmini: ") and message in error
    assert error.count("\n") == 1 and "Traceback" not in error
    written = [path for path in (tmp_path / "work").rglob("*") if path.is_file()]
    assert [path.name for path in written] == ["train.log"]


def test_bad_input_in_a_process_of_its_own(tmp_path: Path) -> None:
    result = run_clipmini("train", "model.name=ViT-B32", cwd=tmp_path)
    assert result.returncode == 2
    assert "model.name=ViT-B32: no such model" in result.stderr and "Traceback" not in result.stdout + result.stderr


def test_unknown_command(capsys: pytest.CaptureFixture) -> None:
    assert main("trian") == 2
    assert capsys.readouterr().err.startswith("clipmini: trian: no such command (did you mean 'train'?); there are: ")


CONFIGS = [
    (b"# \xff\nseed: 1\n", "a config file is not UTF-8: "),
    (b"defaults: none\n", "Invalid defaults list in 'experiment/mine'"),
    (b"# @package _global_\nsed: 1\n", "In 'experiment/mine': ConfigKeyError raised while composing config:"),
    (b"seed: [1,\n", "a config file cannot be read: expected the node content"),
]


@pytest.mark.parametrize(("content", "message"), CONFIGS)
@pytest.mark.parametrize("command", [["train"], ["shards", "plan", "range=1"]], ids=["train", "plan"])
def test_wrong_config_files(
    command: list[str], content: bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/mine.yaml").write_bytes(content)
    # An override before a flag is taken, too.
    assert main(*command, "seed=1", f"--config-dir={tmp_path}", "experiment=mine") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"clipmini: {message}") and "Traceback" not in error


FILES = [
    (["paths.output={file}"], "clipmini: paths.output: {file}/x: Not a directory"),
    (["paths.run={file}"], "clipmini: paths.run: {file}: File exists"),
    (["hydra.run.dir=/proc/nowhere"], "clipmini: hydra.run.dir: /proc/nowhere: No such file or directory"),
]


@pytest.mark.parametrize(("overrides", "message"), FILES)
def test_outputs_that_cannot_be_written(
    overrides: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "file"
    file.write_text("x")
    given = [word.format(file=file) for word in overrides]
    assert main("train", *QUICK, "data.train=x", "name=x", *given) == 2
    error = capsys.readouterr().err
    assert error == message.format(file=file) + "\n" and file.read_text() == "x"


def test_an_error_that_is_not_of_a_file_is_no_users() -> None:
    with pytest.raises(OSError, match="no route"):
        cli.tell_file(OSError("no route"), ["a=b"])


def test_defects_of_our_own_keep_their_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(cfg: object) -> None:
        raise ValueError("a bug")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("clipmini.train.train", fail)
    with pytest.raises(ValueError, match="a bug"):
        main("train")


SWEEPS = [
    (["--multirun", "trainer.devices=2", "seed=0,1"], "trainer.devices=2 in a sweep: its runs have one process here; "),
    (["hydra.mode=MULTIRUN", "trainer.devices=2"], "trainer.devices=2 in a sweep"),
]


@pytest.mark.parametrize(("overrides", "message"), SWEEPS)
def test_a_sweep_over_several_devices_is_refused(overrides: list[str], message: str, tmp_path: Path) -> None:
    result = run_forked(["train", *overrides, *QUICK, "data.train=x"], tmp_path)
    assert result.returncode == 2 and "Traceback" not in result.stdout + result.stderr
    assert message in result.stderr and result.stderr.count("\n") == 1
    assert "hydra/launcher=slurm submits each run" in result.stderr


@pytest.mark.parametrize("launcher", [[], ["hydra/launcher=slurm"]], ids=["here", "slurm"])
def test_a_sweep_in_several_processes_is_refused(launcher: list[str], tmp_path: Path) -> None:
    sweep = ["train", "--multirun", *launcher, *QUICK, "data.train=x", "seed=0,1"]
    result = run_forked(sweep, tmp_path, processes=2)
    assert result.returncode == 2
    assert result.stderr.startswith("clipmini: --multirun in 2 processes of torchrun: ")
    assert result.stderr.count("\n") == 1
    assert not os.listdir(tmp_path)
