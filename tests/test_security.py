"""No code from data, checkpoints or the network, where a user would meet it: through the commands.

What else there is: test_faults and test_index (members that others unpickle are not read), test_sources_refused and
test_checkpoint (files of weights and checkpoints), test_store (members over the limit are refused by their headers),
test_index (hostile headers), test_picture (bombs, scans without end), test_locate and test_end_to_end (`pipe:`),
test_targets (configs, yaml, Hydra), test_redaction (secrets).
"""

import ast
import hashlib
import json
import multiprocessing
import os
import pickle
import re
import resource
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import QUICK, make_cache, read_sample, write_tar
from forked import run_forked

import clipmini
from clipmini.data.captions import Captions
from clipmini.data.content import Content
from clipmini.data.index import Shard
from clipmini.shards.verify import Rules, verify_shard

Run = Callable[..., subprocess.CompletedProcess]
PACKAGE = Path(clipmini.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))


class Evil:
    """Makes a directory when it is unpickled by who runs code."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def test_evil_shard(tiny_json: Path, run_here: Run, tmp_path: Path) -> None:
    evil = {name: pickle.dumps(Evil(tmp_path / "evil")) for name in ("pyd", "pickle", "pkl", "pth", "npy")}
    samples = [{**sample, **evil} for sample in read_sample("train/noto-00000.tar", 32)]
    write_tar(tmp_path / "shards/a.tar", samples)
    with pytest.raises(FileExistsError):  # the marker works
        (tmp_path / "evil").mkdir()
        pickle.loads(evil["pyd"])
    (tmp_path / "evil").rmdir()
    overrides = [*QUICK, f"data.train={tmp_path}/shards", f"model.name={tiny_json}", "name=x"]
    result = run_here("train", *overrides)
    assert result.returncode == 0 and "all of 64 samples were good" in result.stdout, result.stderr
    result = run_here("shards", "index", "data.train=shards")
    assert result.returncode == 0, result.stderr
    result = run_here("shards", "verify", "data.train=shards")
    assert result.returncode == 1 and ".pyd is never read here, but unpickled by others" in result.stdout
    assert not (tmp_path / "evil").exists()


def replace_in_checkpoint(run: Path, content: Any) -> Path:
    """Put other content in a run's newest checkpoint, with a manifest, if it has one, that vouches for it."""
    path = max((run / "checkpoints").glob("step-*.ckpt"))
    file = path / "rank-00000.pt" if path.is_dir() else path
    torch.save(content, file)
    manifest = path / "manifest.json"
    if manifest.exists():
        digest, size = hashlib.sha256(file.read_bytes()).hexdigest(), file.stat().st_size
        manifest.write_text(json.dumps(vouch(json.loads(manifest.read_text()), file.name, size, digest)))
    return path


def vouch(tree: Any, name: str, size: int, digest: str) -> Any:
    """Give what a manifest says of a file its new size and hash, whatever its form."""
    if isinstance(tree, list):
        return [vouch(inner, name, size, digest) for inner in tree]
    if not isinstance(tree, dict):
        return tree
    if isinstance(tree.get(name), dict) or name in tree.values():
        about = tree[name] if name in tree else tree
        for key, value in about.items():
            if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value):
                about[key] = digest
            elif isinstance(value, int) and "step" not in key:
                about[key] = size
        return tree
    return {key: vouch(inner, name, size, digest) for key, inner in tree.items()}


@pytest.fixture(scope="module")
def trained(shards: Path, tiny_json: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `outputs/x`, a run whose newest checkpoint makes `evil` when it is unpickled."""
    directory = tmp_path_factory.mktemp("trained")
    overrides = [*QUICK, f"data.train={shards}", f"model.name={tiny_json}", "name=x"]
    result = run_forked(["train", *overrides], directory)
    assert result.returncode == 0, result.stderr
    path = max((directory / "outputs/x/checkpoints").glob("step-*.ckpt"))
    content = torch.load(path / "rank-00000.pt" if path.is_dir() else path, weights_only=True)
    replace_in_checkpoint(directory / "outputs/x", {**content, "evil": Evil(directory / "evil")})
    torch.save({"state_dict": Evil(directory / "evil")}, directory / "weights.pt")
    return directory


@pytest.mark.parametrize(
    "command",
    [
        "train name=new model.pretrained=weights.pt",
        "evaluate model=outputs/x datasets=[{classes}]",
        "evaluate model=weights.pt architecture={model} datasets=[{classes}]",
        "export model=outputs/x output=exported",
        "export model=weights.pt architecture={model} output=exported",
    ],
)
def test_evil_checkpoint(
    command: str, trained: Path, shards: Path, tiny_json: Path, classification_set: Path, run_here: Run
) -> None:
    name, *overrides = command.format(model=tiny_json, classes=classification_set).split()
    if name == "train":
        overrides = [*QUICK, f"data.train={shards}", f"model.name={tiny_json}", *overrides]
    result = run_here(name, *overrides, cwd=trained)
    assert not (trained / "evil").exists() and not (trained / "exported").exists()
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert re.search("cannot be read|holds code|damaged", result.stderr), result.stderr


def test_evil_checkpoint_of_a_run_that_goes_on(trained: Path, shards: Path, tiny_json: Path, run_here: Run) -> None:
    overrides = [*QUICK, f"data.train={shards}", f"model.name={tiny_json}", "steps=8", "name=x"]
    result = run_here("train", *overrides, cwd=trained)
    assert not (trained / "evil").exists()
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert re.search(
        r"clipmini: .*step-00000004.ckpt: rank-00000.pt is what its manifest.json says, but holds code, which is not "
        r"run: take .*step-00000004.ckpt away",
        result.stdout + result.stderr,
    )


def test_evil_dcp(shards: Path, tiny_json: Path, run_here: Run, tmp_path: Path) -> None:
    # What torch.distributed.checkpoint would unpickle without asking, and a part of another process's.
    overrides = [*QUICK, f"data.train={shards}", f"model.name={tiny_json}", "name=x"]
    assert run_here("train", *overrides).returncode == 0
    path = tmp_path / "outputs/x/checkpoints/step-00000004.ckpt"
    (path / ".metadata").write_bytes(pickle.dumps(Evil(tmp_path / "evil")))
    result = run_here("train", *overrides, "steps=6")
    assert result.returncode == 0 and f"resuming from {path}" in result.stdout, result.stderr
    path = path.with_name("step-00000006.ckpt")
    torch.save(Evil(tmp_path / "evil"), path / "rank-00001.pt")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["rank-00001.pt"] = {
        "bytes": (path / "rank-00001.pt").stat().st_size,
        "sha256": hashlib.sha256((path / "rank-00001.pt").read_bytes()).hexdigest(),
    }
    (path / "manifest.json").write_text(json.dumps(manifest))
    result = run_here("train", *overrides, "steps=8")
    assert (
        result.returncode == 2
        and "rank-00001.pt is what its manifest.json says, but holds code" in result.stdout + result.stderr
    )
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/x.pt", "https://127.0.0.1:9/x.ckpt", "s3://bucket/x.pt"])
def test_checkpoints_come_from_no_network(url: str, shards: Path, run_here: Run) -> None:
    train = [*QUICK, "name=x", f"data.train={shards}", "model.name=ViT-B-32"]
    for arguments, message in (
        (["export", f"model={url}", "output=y"], "neither a file nor a directory, and no NAME/TAG"),
        (["train", *train, f"+trainer.ckpt_path={url}"], "unknown key trainer.ckpt_path"),
    ):
        result = run_here(*arguments)
        assert result.returncode == 2 and message in result.stderr, result.stderr


def test_pretrained_comes_from_no_url(shards: Path, run_here: Run) -> None:
    overrides = [*QUICK, "name=x", f"data.train={shards}", "model.pretrained=http://127.0.0.1:9/x.pt"]
    result = run_here("train", *overrides)
    assert result.returncode == 2 and "neither a file nor a tag" in result.stderr, result.stderr


@pytest.mark.parametrize("command", ["train", "shards index", "shards verify"])
def test_evil_pipe(
    command: str, tiny_json: Path, run_here: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = f"pipe:touch {tmp_path}/marker; cat a.tar"
    # What webdataset would take a command from, or have its checks switched off by.
    monkeypatch.setenv("GOPEN_REWRITE", f"{tmp_path}/shards=pipe:touch {tmp_path}/marker")
    monkeypatch.setenv("WDS_REWRITE", f"{tmp_path}/shards=pipe:touch {tmp_path}/marker")
    monkeypatch.setenv("WDS_SECURE", "0")
    write_tar(tmp_path / "shards/a.tar", read_sample("train/noto-00000.tar", 32))
    train = [*QUICK, f"model.name={tiny_json}", "name=x", "steps=1"] if command == "train" else []
    result = run_here(*command.split(), *train, f'data.train="{pipe}"')
    assert result.returncode == 2 and "would run a command in a shell" in result.stderr, result.stderr
    result = run_here(*command.split(), *train, f"data.train={tmp_path}/shards")
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / "marker").exists()


def verify_and_measure(path: Path) -> None:
    """Do what a process of `shards verify` does, and write down the defects and the most memory it had, in MiB."""
    rules = Rules(Content(Captions.from_key("txt"), 1), max_member_bytes=10**7, max_pixels=10**7)
    causes = [defect.cause for defect in verify_shard(Shard(str(path), -1), rules=rules, cache=make_cache(path.parent))]
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    path.with_suffix(".json").write_text(json.dumps([causes, usage]))


def test_memory_does_not_follow_headers(tmp_path: Path) -> None:
    (sample, other) = read_sample("train/noto-00000.tar", 2)
    write_tar(tmp_path / "plain/a.tar", [sample])
    write_tar(tmp_path / "huge/a.tar", [sample])
    with tarfile.open(tmp_path / "huge/a.tar", "a") as archive:
        for name in ("big.jpg", "big.txt"):  # of which nothing is on the disk: a file with a hole
            member = tarfile.TarInfo(name)
            member.size = 1 << 28
            archive.addfile(member)
            archive.offset += member.size
            archive.fileobj.seek(archive.offset)
    found = {}
    for name in ("plain", "huge"):
        path = tmp_path / name / "a.tar"
        process = multiprocessing.get_context("forkserver").Process(target=verify_and_measure, args=(path,))
        process.start()
        process.join(timeout=200)
        found[name] = json.loads(path.with_suffix(".json").read_text())
    assert found["plain"][0] == [] and found["huge"][0] == ["too_many_bytes"] * 2
    assert found["huge"][1] < found["plain"][1] + 100


def calls() -> Iterator[tuple[str, str, ast.Call]]:
    """Yield file, dotted name and node of every call in the package."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                yield path.name, ast.unparse(node.func), node


def keywords(node: ast.Call) -> dict[str | None, str]:
    return {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}


def test_what_the_code_never_calls() -> None:
    seen = set()
    for file, name, node in calls():
        seen.add(name)
        given = keywords(node)
        if name == "torch.load" or name.endswith(".load_from_checkpoint"):
            assert given.get("weights_only") == "True", f"{file}: {ast.unparse(node)}"
        if name in ("np.load", "numpy.load", "np.lib.format.read_array"):
            assert given.get("allow_pickle", "False") == "False", f"{file}: {ast.unparse(node)}"
        assert "trust_remote_code" not in given, f"{file}: {ast.unparse(node)}"
        assert name not in ("eval", "exec", "compile", "__import__", "os.system", "yaml.load", "yaml.full_load"), file
        assert not name.startswith(("pickle.", "marshal.", "shelve.", "dill.", "joblib.")), file
        assert given.get("shell", "False") == "False" and not name.endswith("load_hparams_from_yaml"), file
        if name == "trainer.fit" and "ckpt_path" in given:
            assert given["weights_only"] == "True"
    assert {"torch.load", "np.load", "yaml.safe_load", "trainer.fit"} <= seen  # else nothing was looked at


def test_what_the_code_never_imports() -> None:
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            for name in names:
                # The name of an error is all that is needed of pickle.
                is_pickle = name.split(".")[0] in ("pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib")
                assert not is_pickle or name == "pickle.UnpicklingError", f"{path.name}: {name}"
                assert name != "hydra.utils.instantiate", path.name
