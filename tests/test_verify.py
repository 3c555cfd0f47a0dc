"""`clipmini shards verify` finds every defect, with its shard and key."""

import io
import json
import pickle
import tarfile
from pathlib import Path

import pytest
from conftest import make_cache, read_sample, write_tar
from forked import run_forked
from PIL import Image
from servers import serve
from test_picture import png_header

from clipmini import cli
from clipmini.data.captions import Captions
from clipmini.data.content import Content
from clipmini.data.index import Shard
from clipmini.data.locate import local_shard
from clipmini.shards.verify import Rules, find_defects

RULES = Rules(Content(Captions.from_key("txt"), 1), max_member_bytes=50_000, max_pixels=10**7)


def find(path: Path, tmp_path: Path, rules: Rules = RULES, count: int = -1) -> list[tuple[str, str, str]]:
    """Return key, cause and detail of each defect of a shard."""
    shard = local_shard(str(path)) if path.exists() else Shard(str(path), -1)
    shard = Shard(shard.path, count, shard.size, shard.version)
    defects = list(find_defects([shard], rules, make_cache(tmp_path / "cache"), num_workers=1))
    assert all(defect.shard == str(path) for defect in defects)
    return [(defect.key, defect.cause, defect.detail) for defect in defects]


def jpeg(sample: dict) -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(sample.pop("webp"))).convert("RGB").save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def test_good_shards_have_no_defects(shards: Path, tmp_path: Path) -> None:
    for name in "abc":
        assert find(shards / f"{name}.tar", tmp_path) == []


CHANGES = {
    "corrupt jpeg": (lambda s: s.update(jpg=jpeg(s)[:250] + b"\xff" * 4000), "picture", ""),
    "truncated jpeg": (lambda s: s.update(jpg=jpeg(s)[:-400]), "picture", "truncated"),
    "cut webp": (lambda s: s.update(webp=s["webp"][:-300]), "picture", ""),
    "picture of 10,000 x 10,000": (
        lambda s: (s.pop("webp"), s.update(png=png_header(10_000, 10_000))),
        "too_many_pixels",
        "10000 x 10000, max_pixels=10000000",
    ),
    "no caption": (lambda s: s.pop("txt"), "caption", "txt is missing"),
    "no picture": (lambda s: s.pop("webp"), "picture", "missing, there is only .json, .txt"),
    "empty caption": (lambda s: s.update(txt=b""), "caption", "txt is blank"),
    "blank caption": (lambda s: s.update(txt=b" \n"), "caption", "txt is blank"),
    "caption that is not utf-8": (lambda s: s.update(txt=b"\xff"), "caption", "txt is not UTF-8"),
    "large member": (lambda s: s.update(txt=b"x" * 60_000), "too_many_bytes", ".txt has 60000, data.max_member_bytes"),
    "pickle": (lambda s: s.update(pyd=pickle.dumps(1)), "code", ".pyd is never read here, but unpickled by others"),
    "pickle with a longer name": (lambda s: s.update({"emb.pth": b"1"}), "code", ".emb.pth is never read here"),
    "two pictures": (lambda s: s.update(jpg=s["webp"]), "duplicate", "2 pictures, .jpg is read"),
}


@pytest.mark.parametrize(("change", "cause", "detail"), CHANGES.values(), ids=CHANGES)
def test_defects_of_a_sample(change, cause: str, detail: str, tmp_path: Path) -> None:
    samples = read_sample("train/noto-00000.tar", 5)
    change(samples[2])
    found = find(write_tar(tmp_path / "x.tar", samples), tmp_path)
    assert found[0][:2] == (samples[2]["__key__"], cause) and detail in found[0][2]
    assert len(found) == 1


def test_defects_of_captions_in_json(tmp_path: Path) -> None:
    samples = read_sample("train/noto-00000.tar", 4)
    samples[1]["json"] = b"{"
    samples[2]["json"] = json.dumps({"name": ["fine", " "]}).encode()
    rules = Rules(Content(Captions.from_key({"name": 0.5, "txt": 0.5}), 1), 50_000, 10**7)
    found = find(write_tar(tmp_path / "x.tar", samples), tmp_path, rules)
    assert [(key, cause) for key, cause, _ in found] == [
        (samples[1]["__key__"], "json"),
        (samples[2]["__key__"], "caption"),
    ]


def test_order_and_names(tmp_path: Path) -> None:
    (sample,) = read_sample("train/noto-00000.tar", 1)
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name in ("a.webp", "b.webp", "a.txt", "b.txt", "b.txt"):
            info = tarfile.TarInfo(name)
            content = sample[name.split(".")[1]]
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    assert find(tmp_path / "x.tar", tmp_path) == [
        ("a", "unsorted", ".txt stands apart from the rest of the sample"),
        ("b", "unsorted", ".txt stands apart from the rest of the sample"),
        ("b", "duplicate", "2 members .txt, the last one is read"),
    ]


def test_damaged_tars(shards: Path, tmp_path: Path) -> None:
    data = (shards / "a.tar").read_bytes()
    with tarfile.open(shards / "a.tar") as archive:
        border = [member.offset for member in archive][3 * 20]
    for cut, message in ((520, "ends inside"), (0, "ends without the two empty blocks"), (200, "ends inside a header")):
        (tmp_path / "x.tar").write_bytes(data[: border + cut])
        found = find(tmp_path / "x.tar", tmp_path, count=30)
        assert found[0][:2] == ("", "damaged_shard") and message in found[0][2]
        assert found[1] == ("", "count", "holds 20 pairs, 30 were counted")
    (tmp_path / "x.tar").write_bytes(data + (shards / "b.tar").read_bytes())
    assert [found[1:] for found in find(tmp_path / "x.tar", tmp_path)] == [
        ("damaged_shard", f"has data after its end, at byte {data.rstrip(bytes(1)).__len__() // 512 * 512 + 1024}")
    ]
    (tmp_path / "x.tar").write_bytes(b"")
    assert find(tmp_path / "x.tar", tmp_path)[0][1] == "damaged_shard"
    with tarfile.open(tmp_path / "x.tar", "w"):
        pass
    assert find(tmp_path / "x.tar", tmp_path) == [("", "damaged_shard", "is empty")]
    assert find(tmp_path / "x.tar", tmp_path, count=0) == []  # as `pack` tells where no sample could be used
    with tarfile.open(tmp_path / "x.tar", "w:gz") as archive:
        archive.add(shards / "a.tar", "a.jpg")
    assert "compressed by gzip" in find(tmp_path / "x.tar", tmp_path)[0][2]
    assert find(tmp_path / "y.tar", tmp_path) == [("", "missing_shard", "No such file or directory")]


def test_shards_of_a_server(shards: Path, tmp_path: Path) -> None:
    with serve(shards) as server:
        server.faults["b.tar"] = ["html"] * 9
        remote = [Shard(f"{server.url}/{name}.tar", -1) for name in "abx"]
        found = list(find_defects(remote, RULES, make_cache(tmp_path), num_workers=1))
    assert [(defect.shard[-5:], defect.cause) for defect in found] == [
        ("b.tar", "missing_shard"),
        ("x.tar", "missing_shard"),
    ]
    assert "this is no tar, it begins with b'<html>" in found[0].detail


def test_command_prints_defects_and_exits_with_1(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    samples = read_sample("train/noto-00000.tar", 5)
    samples[2]["txt"] = b""
    write_tar(tmp_path / "shards/x.tar", samples)
    (tmp_path / "shards/sizes.json").write_text(json.dumps({"x.tar": 6}))
    pattern = f"data.train='{tmp_path}/shards/{{x,y}}.tar'"
    result = run_forked(["shards", "verify", pattern, f"paths.cache={tmp_path}/cache"], tmp_path)
    assert result.returncode == 1, result.stderr
    rows = [line.split("\t") for line in result.stdout.splitlines()]
    assert rows == [
        [f"{tmp_path}/shards/x.tar", samples[2]["__key__"], "caption", "txt is blank"],
        [f"{tmp_path}/shards/x.tar", "-", "count", "holds 5 pairs, 6 were counted"],
        [f"{tmp_path}/shards/y.tar", "-", "missing_shard", "No such file or directory"],
    ]
    assert result.stderr == "3 defects in 2 shards: 1 caption, 1 count, 1 missing_shard\n"
    assert cli.main(["shards", "verify", f"data.train={shards}", f"paths.cache={tmp_path}/cache"]) == 0
    assert capsys.readouterr() == ("", "0 defects in 3 shards\n")
