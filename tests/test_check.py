"""`clipmini check` finds every planted fault by name, with the key to change, in one call, and none in a clean run."""

import io
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from conftest import QUICK, read_sample, write_tar
from omegaconf import DictConfig
from PIL import Image

from clipmini import config
from clipmini.check import command, machine_checks, measure
from clipmini.check.findings import Findings
from clipmini.console import console
from clipmini.data.loader import ImageTextData
from clipmini.errors import UserError
from clipmini.module import ClipModule

STILL = ("data.augmentation.scale=[1.0,1.0]", "data.augmentation.ratio=[1.0,1.0]", "data.augmentation.flip=0")


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """A screen on which no line is broken, and a machine of two cores that has nothing else to do."""
    monkeypatch.setattr(console, "width", 2000)
    monkeypatch.setattr(command, "count_cores", lambda: 2)
    monkeypatch.setattr(command, "MAX_WAIT", 1.0)  # how long is waited for data depends on what else the machine does


@pytest.fixture
def check(tiny_json: Path, shards: Path, tmp_path: Path, run_here: Callable) -> Callable[..., dict[str, list[str]]]:
    """Run the check with overrides of a clean run, and return what was found of each level."""

    def run(*overrides: str, expected: int = 2, makes_steps: bool = False) -> dict[str, list[str]]:
        clean = ["optimizer.lr=1.2e-4", "data.caption_key=name", "data.num_workers=1"]
        given = [*QUICK, f"model.name={tiny_json}", f"data.train={shards}", *clean, *overrides]
        with pytest.MonkeyPatch.context() as patch:
            if not makes_steps:
                patch.setattr(command, "measure", lambda *_: None)  # saves seconds where it is about other things
            result = run_here("check", *given)
        assert "Traceback" not in result.stderr and result.returncode == expected, result.stdout + result.stderr
        assert not (tmp_path / "outputs").exists()  # it writes nothing
        return read_table(result.stdout)

    return run


def read_table(text: str) -> dict[str, list[str]]:
    """Return `name: text` of each finding by level."""
    found: dict[str, list[str]] = {"fail": [], "warn": [], "ok": []}
    for line in text.splitlines():
        if line.startswith("│"):
            level, name, what = (cell.strip() for cell in line.strip("│").split("│"))
            found[level].append(f"{name}: {what}")
    return found


def write_pairs(directory: Path, count: int = 40, **members: bytes | None) -> Path:
    """Write a shard of pictures and captions, some members of all of them replaced, or left out."""
    samples = read_sample("train/noto-00000.tar", count)
    for sample in samples:
        sample.pop("json", None)
        for extension, content in members.items():
            sample.pop(extension) if content is None else sample.update({extension: content})
    write_tar(directory / "0.tar", samples)
    return directory


def test_a_clean_run_has_no_findings(check: Callable, classification_set: Path) -> None:
    found = check(f"evaluation.datasets=[{classification_set}]", expected=0, makes_steps=True)
    assert found["fail"] == [] and found["warn"] == [], found
    names = {line.partition(":")[0] for line in found["ok"]}
    expected = "batch data name schedule optimizer.lr data.mixture data.samples data.pictures data.captions model disk"
    assert any(line.startswith("disk: 3 checkpoints of about") for line in found["ok"])  # two and what is written
    assert names >= {*expected.split(), "memory", "time", f"evaluation.{classification_set.name.removeprefix('wds_')}"}


@pytest.mark.parametrize(
    ("overrides", "level", "name", "text"),
    [
        (["batchsize=16"], "fail", "config", r"unknown key batchsize \(did you mean 'batch_size'"),
        (["batch_size=many"], "fail", "config", "batch_size.*many"),
        (["loss=infonc"], "fail", "config", r"no 'infonc' among the choices of loss \(did you mean 'infonce'"),
        (["optimizer.lrr=1"], "fail", "config", r"unknown key optimizer.lrr \(did you mean 'lr'"),
        (["optimizer._target_=os.system"], "fail", "config", r"optimizer._target_=os.system"),
        (["data.train=???"], "fail", "config", "data.train has no value"),
        (["steps=null", "epochs=null"], "fail", "steps", "steps=null and epochs=null"),
        (["batch_size=65"], "fail", "data", "batch_size=65 is larger than the data: data.train has 64 pairs"),
        (["processes=3"], "fail", "batch", "batch_size=16: must be a positive multiple of the 3 processes"),
        (["micro_batch=17"], "fail", "batch", "micro_batch=17: must be from 1 to the 16 pairs"),
        (["schedule.warmup_fraction=0.9"], "warn", "schedule", r"3 of 4 steps warm up: .*warmup_fraction=0.9"),
        (["schedule.warmup_steps=500"], "warn", "schedule", "warmup_steps=500 would be all of the run"),
        (["optimizer.lr=0.1"], "warn", "optimizer.lr", "0.1; the recipe has 0.00013 for batch_size=16"),
        (["trainer.accumulate_grad_batches=2"], "fail", "trainer|config", "accumulate_grad_batches"),
        (["trainer.devices=4"], "fail", "trainer", "trainer.devices=4"),
        (["data.train=/nowhere/shards"], "fail", "data", "data.train=/nowhere/shards"),
        (["data.caption_key=captions"], "fail", "data", r"no pairs|captions"),
        (["data.num_workers=4"], "warn", "data.num_workers", r"4 loader processes .* set data.num_workers=\d"),
        (["model.name=ViT-B-23"], "fail", "model", r"ViT-B-23.*did you mean 'ViT-B-32'"),
        (["model.pretrained=nothing"], "fail", "model", "model.pretrained=nothing: neither a file nor a tag"),
        (["evaluation.datasets=[/nowhere/set]"], "fail", r"evaluation.datasets\[0\]", "/nowhere/set: there is no such"),
        (["evaluation.best_metric=set/acc1"], "fail", "evaluation", "evaluation.best_metric=set/acc1"),
        (["evaluation.weights=average"], "fail", "evaluation", "there is no average with ema.decay=null"),
        (["loss.temperatures.image_image=0"], "fail", "data|model", "loss.temperatures.image_image=0"),
        (["data.train=s3://bucket/{0..3}.tar", "data.cache.fetch_timeout=0"], "fail", "data", "fetch_timeout=0"),
        (["paths.output=/proc/none"], "fail", "disk|paths.output", "/proc.*set paths.output"),
        (["paths.output=/dev/null"], "fail", "paths.output", "/dev/null is a file, not a directory: set paths.output"),
        (["name=../x"], "fail", "config", "name='../x': must be the name of a directory below paths.output"),
        (["batch_size=0"], "fail", "config", "batch_size=0: must be 1 or more"),
        (["schedule.warmup_steps=null"], "fail", "model", "warmup_steps"),
        (["processes=2", "trainer.devices=4"], "fail", "trainer", "trainer.devices=4"),
        (["seed=-1"], "fail", "config", "seed=-1: must be from 0"),
    ],
)
def test_finds_what_is_wrong_with_a_config(
    overrides: list[str], level: str, name: str, text: str, check: Callable
) -> None:
    found = check(*overrides, expected=2 if level == "fail" else 0)
    assert any(re.search(f"^({name}): .*{text}", line) for line in found[level]), found


def test_finds_several_at_once(check: Callable) -> None:
    found = check(
        "batchsize=16", "optimizer.lr=0.1", "evaluation.datasets=[/nowhere]", "model.name=ViT-B-23", "loss=none"
    )
    names = [line.partition(":")[0] for level in ("fail", "warn") for line in found[level]]
    assert sorted(names) == ["config", "config", "evaluation.datasets[0]", "model", "optimizer.lr"], found


def test_a_base_that_cannot_be_composed_is_one_message(
    check: Callable, run_here: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = iter(range(10))

    def compose(name: str, overrides: Sequence[str]) -> DictConfig:
        next(turns)  # ends the test where the search for what is wrong does not end
        return composed(name, overrides)

    composed = config.compose
    monkeypatch.setattr(config, "compose", compose)
    monkeypatch.setenv("CLIPMINI_OUTPUT", "")
    for overrides in ([], ["seed=1", "epochs=2"]):
        result = run_here("check", *overrides)
        message = "clipmini: paths.output is empty: give it a value\n"
        assert (result.returncode, result.stdout, result.stderr) == (2, "", message)
    assert check("paths.output=mine", expected=0)["fail"] == []


def test_finds_what_is_wrong_with_data(check: Callable, tmp_path: Path) -> None:
    def found(directory: Path, level: str, *overrides: str) -> str:
        lines = check(
            f"data.train={directory}", "data.caption_key=txt", *overrides, expected=2 if level == "fail" else 0
        )[level]
        return "\n".join(lines)

    broken = write_pairs(tmp_path / "broken", webp=b"RIFF....WEBPno picture")
    assert re.search(
        r"data.samples: 40 samples were decoded, and 100.0% cannot be used: 40 picture", found(broken, "fail")
    )
    blank = write_pairs(tmp_path / "blank", txt=b"  ")
    assert re.search(r"data.samples: .* 40 caption, as .*/0.tar, .*: txt is blank", found(blank, "fail"))
    same = write_pairs(tmp_path / "same", txt=b"a picture")
    assert re.search(r"data.equal_captions: 15.00 other pairs .*loss.duplicates=mask", found(same, "warn"))
    assert "data.equal_captions" not in found(same, "warn", "loss.duplicates=mask")
    whole = found(write_pairs(tmp_path / "whole", 16), "ok", "data.second_caption_key=txt", "loss.terms.text_text=1")
    assert "data.equal_captions: 0.00 other pairs" in whole, whole  # a caption of a pair is no other pair
    long = write_pairs(tmp_path / "long", txt=b"word " * 40)
    assert re.search(r"data.captions: 42 tokens \(median\), 100% more than the 24 of the model", found(long, "warn"))
    wrong = write_pairs(tmp_path / "wrong", json=b'{"others": ["no picture"]}')
    none = found(wrong, "warn", "data.hard_negatives=other")
    assert "data.hard_negatives: 0 of 40 samples have other in their .json, so that there are no hard" in none
    assert "data.hard_negatives: 40 of 40 samples" in found(wrong, "ok", "data.hard_negatives=others")
    assert "data.equal_captions" not in none  # what is absent is not equal
    content = io.BytesIO()
    Image.new("RGB", (20, 20), "red").save(content, "PNG")
    small = write_pairs(tmp_path / "small", webp=None, png=content.getvalue())
    lines = found(small, "warn")
    assert re.search(r"data.pictures: shorter side of 20 px \(median\), 100% less than the 32 px", lines)
    assert re.search(r"data.duplicates: 98% of 40 pictures are there once more", lines)
    twice = f"[{tmp_path}/same/0.tar,{tmp_path}/same/0.tar]"
    assert "data.shards: data.train names 1 shards twice" in found(twice, "warn")  # type: ignore[arg-type]
    good = write_pairs(tmp_path / "good", 64)
    mixture = f"{{a:{{shards:{good},weight:1}},b:{{shards:{write_pairs(tmp_path / 'few', 16)},weight:99}}}}"
    lines = found(mixture, "warn", "steps=400")  # type: ignore[arg-type]
    assert re.search(r"data.mixture: seen: a 1 times, b 4e\+02 times: see data.train.b.weight", lines)
    few_bad = read_sample("train/noto-00000.tar", 64)
    few_bad[3]["webp"] = b"no picture"
    write_tar(tmp_path / "few_bad/0.tar", few_bad)
    assert "1.6% cannot be used" in found(tmp_path / "few_bad", "warn", "data.max_bad_fraction=0.05")


def test_finds_what_is_wrong_with_sets(check: Callable, classification_set: Path, tmp_path: Path) -> None:
    def found(root: Path, level: str) -> str:
        lines = check(f"evaluation.datasets=[{root}]", expected=2 if level == "fail" else 0)[level]
        return "\n".join(lines)

    def copy(name: str) -> Path:
        shutil.copytree(classification_set, tmp_path / name)
        return tmp_path / name

    fewer = copy("wds_fewer")
    (fewer / "classnames.txt").write_text("thing 0\nthing 1\n")
    assert re.search(r"evaluation.datasets\[0\]: .*label", found(fewer, "fail"))
    more = copy("wds_more")
    (more / "classnames.txt").write_text("".join(f"thing {number}\n" for number in range(40)))
    assert "evaluation.more: only 7 of 40 classes have pictures" in found(more, "warn")
    same = copy("wds_same")
    (same / "classnames.txt").write_text("thing\n" * 7)
    assert "evaluation.same: 1 classes have the same sentences" in found(same, "warn")
    plain = copy("wds_plain")
    (plain / "zeroshot_classification_templates.txt").write_text("a photo\n")
    assert re.search(r"evaluation.datasets\[0\]: .*a photo", found(plain, "fail"))
    unreadable = copy("wds_unreadable")
    samples = read_sample("wds_twemoji/test/0.tar", 13)
    for number, sample in enumerate(samples):
        sample["cls"] = str(number % 7).encode()
    samples[5]["webp"] = b"no picture"
    write_tar(unreadable / "test/0.tar", samples)
    assert re.search(
        r"evaluation.unreadable: 21 pictures, 21 of them decoded, and 1 cannot be", found(unreadable, "fail")
    )


def test_finds_a_run_of_another_config(tiny_json: Path, shards: Path, tmp_path: Path, run_here: Callable) -> None:
    given = [*QUICK, f"model.name={tiny_json}", f"data.train={shards}", "name=mine"]
    assert run_here("train", *given).returncode == 0
    assert "goes on from step-" in run_here("check", *given).stdout
    for override, message in (("loss.init_scale=10", "holds a run of another config"), ("steps=3", "is of step 4, ")):
        result = run_here("check", *given, override)
        assert result.returncode == 2 and re.search(f"name: .*{message}", read_table(result.stdout)["fail"][0])


def test_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    findings = Findings()
    machine_checks.check_disk(tmp_path / "new/run", 2**50, 3, 0, findings)
    machine_checks.check_memory(2**50, 1, torch.device("cpu"), findings, "how")
    have = machine_checks.main_memory()
    machine_checks.check_memory(have // 2, 1, torch.device("cpu"), findings, "how")
    machine_checks.check_memory(have // 2, 3, torch.device("cpu"), findings, "how")
    machine_checks.check_variables({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8"}, False, findings)
    machine_checks.check_variables({"WORLD_SIZE": "8"}, False, findings)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    machine_checks.check_packages(has_jpeg=True, findings=findings)
    texts = [f"{one.level} {one.name}: {one.text}" for one in findings.found]
    for found, expected in zip(
        texts,
        (
            "fail disk: 3 checkpoints of about 1048576.0 GiB need",
            "fail memory: about 1048576.0 GiB of each process, of ",
            f"ok memory: about {machine_checks.tell(have // 2)} of each process, of {machine_checks.tell(have)} (how)",
            f"fail memory: about {machine_checks.tell(have // 2)} of each process, "
            f"{machine_checks.tell(3 * (have // 2))} of the 3 of a node, of {machine_checks.tell(have)} (how): "
            "set micro_batch, model.grad_checkpointing=true or a smaller batch_size, or fewer processes on a node",
            "warn processes: SLURM_NTASKS=8, and this is one process",
            "fail processes: WORLD_SIZE=8 without the other variables of torchrun",
            "warn packages: JPEGs are decoded faster with simplejpeg: pip install 'clipmini[fast]'",
        ),
        strict=True,
    ):
        assert found.startswith(expected), found
    assert machine_checks.check_variables({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8"}, True, findings) is None
    assert len(findings.found) == 7


def test_checkpoints_that_are_there_need_no_room_of_their_own(small_disk: Path) -> None:
    checkpoint = small_disk / "run/checkpoints/step-00000001.ckpt"
    checkpoint.mkdir(parents=True)
    (checkpoint / "rank-00000.pt").write_bytes(bytes(200_000))
    findings = Findings()
    for size in (100_000, 300_000):
        machine_checks.check_disk(small_disk / "run", size, 3, 0, findings)
    levels = [one.level for one in findings.found]
    assert levels == ["ok", "fail"] and findings.found[0].text.endswith(" beside those of the run, 0 MiB")


def test_checkpoint_bytes() -> None:
    layer = torch.nn.Linear(10, 10)
    layer.bias.requires_grad_(False)
    assert machine_checks.checkpoint_bytes(layer.parameters(), has_average=False) == 4 * (3 * 100 + 10)
    assert machine_checks.checkpoint_bytes(layer.parameters(), has_average=True) == 4 * (4 * 100 + 2 * 10)


def test_peak_memory_is_of_what_came_after() -> None:
    before = torch.ones(100_000_000)
    del before
    measure.reset_memory(torch.device("cpu"))
    base = measure.peak_memory(torch.device("cpu"))
    block = torch.ones(50_000_000)
    del block
    assert 180e6 < measure.peak_memory(torch.device("cpu")) - base < 230e6


def test_a_finding_is_told_once() -> None:
    findings = Findings()
    for name in ("data", "model"):
        with findings.guard(name):
            raise UserError("loss.kind=x: is wrong")
    assert [one.name for one in findings.found] == ["data"]


@pytest.mark.parametrize("overrides", [["trainer=ddp"], ["trainer=fsdp"], ["trainer.devices=4", "trainer.num_nodes=2"]])
def test_a_job_of_several_processes(overrides: list[str], check: Callable) -> None:
    found = check("processes=8", *overrides, "trainer.accelerator=cpu", expected=0, makes_steps=True)
    assert "batch: 16 pairs, 2 of each of 8 processes" in found["ok"] and found["warn"] == []
    assert any(line.startswith("memory: ") and "steps of 2 pairs were made" in line for line in found["ok"])


@pytest.mark.parametrize(
    "experiment", ["sample", "sample_views", "sample_unlabelled", "sample_paraphrase", "sample_curriculum"]
)
def test_the_recipes_of_the_sample_have_no_faults(experiment: str, run_here: Callable) -> None:
    result = run_here("check", f"experiment={experiment}", "trainer=cpu", "data.num_workers=1", "processes=32")
    assert result.returncode == 0 and read_table(result.stdout)["fail"] == [], result.stdout


@pytest.mark.parametrize(
    "overrides",
    [
        ["loss.terms.image_text_teacher=1", "teacher=TEACHER", "data.num_workers=0"],
        ["data.cached_features=true", "model.lock_image=true", *STILL],
    ],
)
def test_features_that_are_computed_first_are_stood_in_for(
    overrides: list[str], tiny_export: Path, check: Callable, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    given = [word.replace("TEACHER", str(tiny_export)) for word in overrides]
    found = check(*given, f"paths.cache={cache}", expected=0, makes_steps=True)
    (line,) = (line for line in found["ok"] if line.startswith("time: "))
    assert "without evaluations, and the features that are computed first (steps of 16 pairs were made)" in line
    assert any(line.startswith("memory: about ") for line in found["ok"]) and not (cache / "features").exists()


def test_finds_a_tower_whose_features_cannot_be_kept(check: Callable) -> None:
    found = check("data.cached_features=true", *STILL, makes_steps=True)
    assert any(re.search("^data.cached_features: .*the image tower learns", line) for line in found["fail"]), found


def test_of_a_curriculum_the_dearest_stage_is_measured(check: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = measure.measure_steps

    def look(make_trainer: Callable, module: ClipModule, data: ImageTextData, *rest: int) -> measure.Measured:
        seen.append((data.decoder.size_at(10**9), [(one.image_size, one.patch_dropout) for one in module.curriculum]))
        return real(make_trainer, module, data, *rest)

    monkeypatch.setattr(measure, "measure_steps", look)
    stages = "[{until:0.25,image_size:16},{until:0.5,image_size:32},{until:1.0,patch_dropout:0.5}]"
    found = check(f"curriculum={stages}", expected=0, makes_steps=True)
    assert seen[-1] == (32, [(32, 0.0)])
    assert any("4 steps, as if all were of curriculum[1], the dearest stage, " in line for line in found["ok"]), found


def test_what_nobody_thought_of_hides_nothing(check: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(command, "estimate", fail)
    found = check(makes_steps=True)
    assert found["fail"] == ["memory: no room: set micro_batch, model.grad_checkpointing=true or a smaller batch_size"]
    monkeypatch.setattr(command, "check_set", fail)
    monkeypatch.setattr(command, "check_length", lambda *_: 1 / 0)
    assert any("schedule: could not be checked: ZeroDivisionError" in line for line in check(expected=0)["warn"])


def test_extrapolates_along_a_line() -> None:
    one, two = measure.Measured(8, 1.0, 100, 0.0), measure.Measured(32, 2.5, 400, 0.1)
    found = measure.extrapolate([one, two], 104)
    assert (found.seconds, found.memory, found.wait) == (
        7.0,
        1300,
        0.1,
    ) and "8 and 32 pairs were made, for 104" in found.how
    assert measure.extrapolate([one, two], 32).seconds == 2.5


def test_finds_that_steps_wait_for_data(check: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    for wait, expected in ((0.29, 0), (0.31, 1)):
        monkeypatch.setattr(command, "MAX_WAIT", 0.3)
        monkeypatch.setattr(command, "estimate", lambda *_, wait=wait: measure.Estimate(0.5, 2**30, wait, "as said"))
        found = check(expected=0, makes_steps=True)
        assert sum(line.startswith("data.wait: 31% of a step") for line in found["warn"]) == expected
        assert any(re.search(r"^time: 0:00:02 for 4 steps, 32 samples/s .*\(as said\)", line) for line in found["ok"])


def test_words_of_the_data_are_no_markup(check: Callable, tmp_path: Path) -> None:
    same = write_pairs(tmp_path / "same", txt=b"[/b] [removed] a picture")
    lines = check(f"data.train={same}", "data.caption_key=txt", expected=0)["warn"]
    assert any("'[/b] [removed] a picture'" in line for line in lines)


def test_processes_are_a_number(run_here: Callable) -> None:
    result = run_here("check", "processes=many")
    assert result.returncode == 2 and "processes=many: must be a number from 1 on" in result.stderr
