"""No secret that a user gives, by the config, an address or the environment, is in what clipmini writes or prints."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from conftest import QUICK
from forked import run_forked
from omegaconf import OmegaConf
from servers import serve

from clipmini import redaction
from clipmini.redaction import (
    REDACTED,
    find_override_secrets,
    find_secrets,
    redact,
    redact_message,
    redact_text,
    remember,
)

Run = Callable[..., subprocess.CompletedProcess]
CANARIES = {
    "environment": "CANARYenvironment",
    "key": "CANARYkeyincfg",
    "file": "CANARYinafile",
    "user": "CANARYuser",
    "password": "CANARYpass%40word",
    "signature": "CANARYsignature%2Fabc",
    "default": "CANARYdefault",
}
# A callback that says what it was given, as careless code does.
CALLBACK = """
import logging, os, sys, warnings
from pytorch_lightning.callbacks import Callback

class Careless(Callback):
    def __init__(self, *, api_key, token, from_env, url, fail=False):
        self.values = [api_key, token, from_env, url]
        self.fail = fail

    def on_train_start(self, *_):
        logging.getLogger("careless").warning("logging in with %s", self.values)
        warnings.warn(f"token={self.values[1]} is old")
        print("argv", sys.argv, file=open(os.path.join(os.getcwd(), "argv.txt"), "w"))
        if self.fail:
            raise RuntimeError(f"cannot log in with {self.values}")
"""
MINE = """
careless:
  _target_: my_package.Careless
  api_key: ???
  token: CANARYinafile
  from_env: ${oc.env:MY_SERVICE_TOKEN}
  url: ${oc.env:MY_SERVICE_URL,https://CANARYuser:CANARYdefault@host/x}
"""


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a package and a config of a user's, and shards that are served."""
    (tmp_path / "work/my_package").mkdir(parents=True)
    (tmp_path / "work/my_package/__init__.py").write_text(CALLBACK)
    (tmp_path / "configs/callbacks").mkdir(parents=True)
    (tmp_path / "configs/callbacks/mine.yaml").write_text(f"defaults:\n  - default\n{MINE}")
    monkeypatch.setenv("MY_SERVICE_TOKEN", CANARIES["environment"])
    monkeypatch.setenv("CLIPMINI_CACHE", str(tmp_path / "work/cache"))
    monkeypatch.setattr(redaction, "known", set())
    monkeypatch.syspath_prepend(str(tmp_path / "work"))
    return tmp_path / "work"


def find_canaries(directory: Path, *texts: str) -> set[str]:
    """Say where canaries are: in the texts, the names or the contents of files, also inside the zip of a checkpoint."""
    found = {f"text {number}" for number, text in enumerate(texts) if "CANARY" in text}
    for path in directory.rglob("*"):
        if "my_package" in path.parts:
            continue
        if "CANARY" in str(path) or (path.is_file() and b"CANARY" in path.read_bytes()):
            found.add(str(path.relative_to(directory)))
    return found


def run(work: Path, *arguments: str) -> subprocess.CompletedProcess:
    return run_forked(arguments, work)


def test_canary_secret(work: Path, shards: Path, tiny_json: Path, classification_set: Path, run_here: Run) -> None:
    with serve(shards) as server:
        host = server.url.removeprefix("http://")
        query = f"X-Amz-Signature={CANARIES['signature']}&x=1"
        address = f"http://{CANARIES['user']}:{CANARIES['password']}@{host}/{{name}}.tar?{query}"
        common = ["--config-dir", "../configs", "allow_targets=[my_package.]", "callbacks=mine", *QUICK, "name=x"]
        common += [f"model.name={tiny_json}", f"callbacks.careless.api_key={CANARIES['key']}", "data.ledger=true"]
        tensorboard = "{_target_:pytorch_lightning.loggers.TensorBoardLogger,save_dir:outputs/x,version:tensorboard}"
        common += [f"logger.tensorboard={tensorboard}"]
        train = f'data.train=["{address.format(name="a")}","{address.format(name="b")}"]'
        server.faults["a.tar"] = ["refuse", "half"]
        result = run(work, "train", *common, train)
        assert result.returncode == 0, result.stderr
        assert "trying again" in result.stdout and f"http://{REDACTED}@{host}/a.tar?{REDACTED}" in result.stdout
        told = run_here("train", *common, train, "steps=6", cwd=work)  # goes on
        assert told.returncode == 0 and "resuming from" in told.stdout, told.stderr
        texts = [result.stdout, result.stderr, told.stdout, told.stderr]
        failed = run(work, "train", *common, train, "name=z", "+callbacks.careless.fail=true")
        assert failed.returncode == 1 and "RuntimeError: cannot log in with" in failed.stderr
        texts += [failed.stdout, failed.stderr]
        for overrides in (
            [train.replace("b.tar", "gone.tar")],
            [train, f"optimizer.lr={CANARIES['key']}"],
            [train, f"callbacks.careless.api_key={CANARIES['key']}}}"],
        ):
            failed = run_here("train", *common, "name=y", *overrides, cwd=work)
            assert failed.returncode == 2
            texts += [failed.stdout, failed.stderr]
        sets = f"datasets=[{classification_set}]"
        for arguments in (
            ["evaluate", "model=outputs/x", sets, "details=details", "clip_benchmark=cb"],
            ["export", "model=outputs/x", "output=exported"],
            ["shards", "index", train],
            ["shards", "verify", train],
            ["shards", "plan", *common[:4], *QUICK, f"callbacks.careless.api_key={CANARIES['key']}", train, "range=1"],
        ):
            result = run_here(*arguments, cwd=work)
            assert result.returncode == 0, (arguments, result.stderr)
            texts += [result.stdout, result.stderr]
    assert find_canaries(work, *texts) == set()
    config = yaml.safe_load((work / "outputs/x/config.yaml").read_text())
    careless = config["callbacks"]["careless"]
    assert careless["api_key"] == careless["token"] == REDACTED
    assert careless["from_env"] == "${oc.env:MY_SERVICE_TOKEN}"  # says where it comes from
    assert config["data"]["train"][0] == f"http://{REDACTED}@{host}/a.tar?{REDACTED}"
    log = (work / "outputs/x/train.log").read_text()
    assert "logging in with" in log and "is old" in log and log.count("CANARY") == 0
    checkpoint = max((work / "outputs/x/checkpoints").glob("step-*.ckpt"))
    content = torch.load(checkpoint / "rank-00000.pt" if checkpoint.is_dir() else checkpoint, weights_only=True)
    assert content["hyper_parameters"]["callbacks"] == config["callbacks"]


def test_sweeps_save_no_secrets(work: Path, shards: Path, tiny_json: Path, run_here: Run) -> None:
    overrides = [*QUICK, "steps=1", f"model.name={tiny_json}", f"data.train={shards}", "name=x", "seed=0,1"]
    mine = ["--config-dir", "../configs", "allow_targets=[my_package.]", "callbacks=mine"]
    mine += [f"callbacks.careless.api_key={CANARIES['key']}"]
    result = run_here("train", "--multirun", *mine, *overrides, cwd=work)
    assert result.returncode == 0, result.stderr
    assert find_canaries(work, result.stdout, result.stderr) == set()
    saved = OmegaConf.load(work / "outputs/x/multirun.yaml")
    assert f"callbacks.careless.api_key={REDACTED}" in saved.hydra.overrides.task
    assert "seed=0,1" in saved.hydra.overrides.task and (work / "outputs/x/1/config.yaml").exists()


def test_bad_samples_name_no_secrets() -> None:
    from clipmini.data.health import BadSample

    row = BadSample(1, "train", "https://u:p@h/a.tar?sig=abc", 2, "k", "missing_shard", "at https://u:p@h/a.tar").row()
    assert (
        row["shard"] == f"https://{REDACTED}@h/a.tar?{REDACTED}" and row["detail"] == f"at https://{REDACTED}@h/a.tar"
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("${oc.env:HF_TOKEN,abc}", f"${{oc.env:HF_TOKEN,{REDACTED}}}"),
        ("${oc.env:SCRATCH,/data}/x", "${oc.env:SCRATCH,/data}/x"),
        ("${oc.env:URL,https://u:p@h/x?a=b}", f"${{oc.env:URL,https://{REDACTED}@h/x?{REDACTED}}}"),
        ("https://u:p@ss@h/x#access_token=abc", f"https://{REDACTED}@h/x#{REDACTED}"),
        ("s3://bucket/part-000?.tar", "s3://bucket/part-000?.tar"),
        ("pipe:curl -H 'Authorization: Bearer abc' https://h", f"pipe:{REDACTED}"),
    ],
)
def test_texts_of_a_config(text: str, expected: str) -> None:
    assert redact_text(text) == expected == redact_text(expected)
    OmegaConf.create({"x": expected})  # still a text that can be read


def test_interpolations_are_no_secrets() -> None:
    tree = {"token": "${oc.env:HF_TOKEN}", "api_key": "${secrets.api}", "password": "${oc.env:P,null}", "a": "${b}"}
    assert redact(tree) == tree
    assert redact({"token": "${oc.env:HF_TOKEN,abc}"}) == {"token": REDACTED}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("login(token=abc, user=me)", f"login(token={REDACTED}, user=me)"),
        ("curl -H 'Authorization: Bearer abc.def' x", f"curl -H 'Authorization: {REDACTED}' x"),
        ("{'authorization': 'Basic dTpw'}", f"{{'authorization': '{REDACTED}'}}"),
        ("GET https://u:p@h/x?sig=a: 403", f"GET https://{REDACTED}@h/x?{REDACTED} 403"),
        ("unknown key data.api_keys; data.caption_key=name", "unknown key data.api_keys; data.caption_key=name"),
        ("step 3: loss=0.5, s3://b/000?.tar", "step 3: loss=0.5, s3://b/000?.tar"),
    ],
)
def test_messages(text: str, expected: str) -> None:
    assert redact_message(text) == expected


def test_secrets_of_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh")
    monkeypatch.setenv("SSH_AUTH_SOCK", str(tmp_path))  # a path that is there is no secret
    assert redact_message(f"no access with hf_abcdefgh in {tmp_path}, {os.getcwd()}") == (
        f"no access with {REDACTED} in {tmp_path}, {os.getcwd()}"
    )


def test_known_secrets() -> None:
    tree = {"a": [{"headers": {"Authorization": "Bearer tok3nvalue"}}], "u": "https://me:pa%40ssword@h", "key": "abc"}
    assert set(find_secrets(tree)) >= {"Bearer tok3nvalue", "tok3nvalue", "pa%40ssword", "pa@ssword"}
    assert {"wJalrXUtn", "AKIAIOSF"} <= set(find_override_secrets("x={s3:{key:AKIAIOSF,secret: wJalrXUtn}}"))
    remember(["wJalrXUtn", "abc"])
    assert redact_message("bad wJalrXUtn and abc") == f"bad {REDACTED} and abc"  # too short to be told from words
