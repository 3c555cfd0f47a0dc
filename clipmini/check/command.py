"""`clipmini check`: everything that would make a run fail or waste it, all at once, before it is queued."""

import copy
import dataclasses
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import open_clip
import pytorch_lightning as pl
import torch
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from clipmini import config, launch
from clipmini.check import data_checks, machine_checks
from clipmini.check.findings import Findings
from clipmini.check.measure import estimate, has_features, stand_in_for, stand_in_for_locked
from clipmini.check.set_checks import check_set
from clipmini.checkpoints import resume
from clipmini.cli import explain
from clipmini.console import format_seconds, set_up_logging
from clipmini.data.features import TeacherFeatures
from clipmini.data.loader import ImageTextData
from clipmini.data.processes import count_cores
from clipmini.data.tokenizer import Tokenize, create_tokenizer
from clipmini.errors import UserError
from clipmini.evaluation.datasets import Opened, open_sets
from clipmini.evaluation.entries import read_entries
from clipmini.launch import Launch
from clipmini.model import image_size, open_clip_config, preprocess_cfg
from clipmini.module import ClipModule
from clipmini.optim import warmup_length
from clipmini.redaction import redact
from clipmini.teacher import load_teacher
from clipmini.train import build_data, build_evaluation, build_module, build_trainer, count_steps, prepare

EXPECTED = (UserError, HydraException, OmegaConfBaseException, YAMLError, OSError)
MAX_WAIT = 0.3  # share of a step without data
RATE = 5.0  # times that a learning rate may be above or below that of its recipe, of the same batch


@dataclass
class Parts:
    """What could be built of a run; None where that failed."""

    processes: Launch
    data: ImageTextData | None = None
    opened: list[Opened] | None = None
    module: ClipModule | None = None
    tokenize: Tokenize | None = None
    steps: int | None = None
    teacher: TeacherFeatures | None = None  # what stands in for those of its teacher


def run(arguments: Sequence[str]) -> int:
    """Check what `clipmini train` would do with the same overrides.

    Returns:
        The exit code: 2 if it would fail.

    Raises:
        UserError: nothing of the config can be read.
    """
    findings = Findings(explain=explain, expected=EXPECTED)
    said = [word for word in arguments if word.startswith("processes=")]
    processes = read_processes(said, findings)
    if processes.rank:
        return 0  # the first one of a job finds it all
    cfg, overrides = compose([word for word in arguments if word not in said], findings)
    if said:
        processes = spread(processes, cfg)
    set_up_logging(None)
    try:
        check_run(cfg, processes, overrides, findings, is_said=bool(said))
    finally:
        findings.log()
    return 2 if findings.has_failed else 0


def compose(overrides: Sequence[str], findings: Findings) -> tuple[DictConfig, list[str]]:
    """Compose the config of all overrides that can be read, and return these too; the others are findings."""
    is_given = any(word.startswith("paths.run=") for word in overrides)
    good = [] if is_given else ["paths.run=${paths.output}/${name}"]  # as Hydra makes it
    if any(word in ("--config-dir", "-cd") for word in overrides):  # with its value one word, as what follows needs it
        raise UserError("--config-dir: give it as one word here, as in --config-dir=mine")
    try:
        config.compose("train", good)
    except EXPECTED:  # the same for every part of the overrides, if they do not mend it
        return config.compose("train", [*good, *overrides]), [*good, *overrides]
    # Choices of groups first: which keys there are depends on them.
    halves = [sorted(overrides, key=lambda word: (not word.startswith("-"), "." in word.partition("=")[0]))]
    while halves:
        tried = halves.pop()
        try:
            config.compose("train", [*good, *tried])
            good += tried
        except EXPECTED as error:
            if len(tried) == 1:
                findings.fail("config", explain(error))
            else:
                halves += [tried[len(tried) // 2 :], tried[: len(tried) // 2]]
    return config.compose("train", good), good


def read_processes(said: Sequence[str], findings: Findings) -> Launch:
    """Return the processes that the run will have: as `processes=N` says, or as they are here.

    Raises:
        UserError: N is no number from 1 on.
    """
    if said:
        text = said[-1].removeprefix("processes=")
        if not text.isdecimal() or int(text) < 1:
            raise UserError(f"{said[-1]}: must be a number from 1 on")
        return Launch("torchrun" if int(text) > 1 else "none", int(text), 1, 0)
    with findings.guard("processes"):
        return launch.read_launch()
    return Launch("none", 1, 1, 0)


def spread(processes: Launch, cfg: DictConfig) -> Launch:
    """Put processes on nodes as the config says: `trainer.devices` on each, or what `trainer.num_nodes` leaves."""
    count, devices, nodes = processes.world_size, cfg.trainer.devices, cfg.trainer.num_nodes
    local = devices if isinstance(devices, int) else count // nodes if isinstance(nodes, int) and nodes > 0 else 1
    return dataclasses.replace(processes, local_world_size=local if local > 0 and count % local == 0 else 1)


def check_run(
    cfg: DictConfig, processes: Launch, overrides: Sequence[str], findings: Findings, *, is_said: bool
) -> None:
    """Build what can be built of a run, and look at each part of it.

    Args:
        is_said: whether the processes are those of a job that is not here, on nodes of which nothing is known.
    """
    for key in sorted(OmegaConf.missing_keys(cfg)):
        findings.fail("config", f"{key} has no value: give it one, as in {key}=...")
    with findings.guard("config"):
        config.check_all(cfg) if not OmegaConf.missing_keys(cfg) else None
    parts = Parts(processes)
    check_processes(cfg, processes, findings)
    build_parts(cfg, parts, findings)
    with findings.guard("schedule"):
        check_length(cfg, parts, overrides, findings)
    with findings.guard("optimizer.lr"):
        check_rate(cfg, overrides, findings)
    with findings.guard("data"):
        check_data(cfg, parts, findings, is_said=is_said)
    for opened in parts.opened or ():
        with findings.guard(f"evaluation.{opened.dataset.name}"):
            check_set(opened, findings)
    with findings.guard("model"):
        check_model(cfg, parts, findings)
    with findings.guard("machine"):
        check_machine(cfg, parts, findings)


def check_processes(cfg: DictConfig, processes: Launch, findings: Findings) -> None:
    """See that the processes can share the batch, and that their variables agree."""
    with findings.guard("batch"):
        launch.check_batch(processes, batch_size=cfg.batch_size, micro_batch=cfg.micro_batch)
        local = cfg.batch_size // processes.world_size
        findings.ok("batch", f"{cfg.batch_size} pairs, {local} of each of {processes.world_size} processes")
    machine_checks.check_variables(os.environ, processes.has_launcher, findings)


def build_parts(cfg: DictConfig, parts: Parts, findings: Findings) -> None:
    """Build each part of a run as training does, and go on where one cannot be."""
    plain = cast(dict[str, Any], redact(OmegaConf.to_container(cfg, resolve=False)))
    here = one_process(parts.processes)
    for group in ("callbacks", "logger"):
        for name, node in cfg[group].items():
            with findings.guard(f"{group}.{name}"):
                config.read_node(cfg, f"{group}.{name}") if node is not None else None
    with findings.guard("data"):
        parts.data = build_data(cfg, parts.processes)
        pairs, shards = parts.data.manifest.num_samples, sum(len(one.shards) for one in parts.data.manifest.sources)
        findings.ok("data", f"{pairs:,} pairs in {shards:,} shards")
    if parts.data is not None:
        with findings.guard("steps"):
            parts.steps = count_steps(cfg.steps, cfg.epochs, parts.data.manifest.num_samples, cfg.batch_size)
    with findings.guard("evaluation"):
        parts.opened = open_each(cfg, findings)
    with findings.guard("model"):
        teacher = load_teacher(cfg.teacher, config.build(cfg, "loss"))
        parts.teacher = stand_in_for(teacher)
        parts.module = build_module(cfg, plain, here, parts.steps or 1, teacher)
        parts.tokenize = create_tokenizer(parts.module.model.architecture)
    if parts.data is not None and parts.module is not None and parts.tokenize is not None:
        with findings.guard("data"):
            prepare(parts.data, parts.module, parts.tokenize, parts.steps or 1)
        with findings.guard("evaluation"):
            run = Path(cfg.paths.run)
            build_evaluation(cfg, parts.opened or [], parts.data, parts.module, parts.tokenize, run)
    with findings.guard("trainer"):
        options = {name: cfg.trainer[name] for name in ("devices", "num_nodes", "strategy")}
        launch.check_processes(parts.processes, **options)
        build_trainer(alone(cfg), here, parts.steps or 1)
    with findings.guard("name"):
        newest = resume.find_checkpoint(Path(cfg.paths.run), plain)
        if newest is not None and parts.module is not None:
            resume.check_same_model(open_clip_config(parts.module.model), newest)
            resume.check_same_teacher(parts.module.teacher, newest)
        if newest is not None and parts.steps is not None:
            resume.check_length(parts.steps, newest)
        findings.ok(
            "name", f"{cfg.paths.run} is new" if newest is None else f"{cfg.paths.run} goes on from {newest.name}"
        )


def one_process(processes: Launch) -> Launch:
    """Return the launch of this process alone: the others of a job are not there."""
    return processes if processes.world_size == 1 else Launch("none", 1, 1, 0)


def alone(cfg: DictConfig) -> DictConfig:
    """Return a config for this process alone, as it can make steps without the others."""
    changed = copy.deepcopy(cfg)
    for name in ("devices", "num_nodes", "strategy"):
        changed.trainer[name] = "auto"
    return changed


def open_each(cfg: DictConfig, findings: Findings) -> list[Opened]:
    """Open the evaluation sets one by one."""
    key = "evaluation.datasets"
    datasets = cast(list[Any], OmegaConf.to_container(cfg.evaluation.datasets, resolve=True))
    opened: list[Opened] = []
    for number, entry in enumerate(datasets):
        with findings.guard(f"{key}[{number}]"):
            opened += open_sets(read_entries([entry], key), key, with_train=bool(cfg.evaluation.probes))
    return opened


def check_length(cfg: DictConfig, parts: Parts, overrides: Sequence[str], findings: Findings) -> None:
    """Compare the warm-up with the run."""
    given, is_said = cfg.schedule, any(word.startswith("schedule.warmup_steps=") for word in overrides)
    if parts.steps is None or not {"warmup_steps", "warmup_fraction"} <= set(given):
        return
    warmup = warmup_length(parts.steps, given.warmup_steps, given.warmup_fraction)
    text = f"{warmup:,} of {parts.steps:,} steps warm up"
    if warmup > 0.5 * parts.steps:
        findings.warn("schedule", f"{text}: lower schedule.warmup_fraction={given.warmup_fraction}")
    elif is_said and given.warmup_steps >= parts.steps:
        text += f"; schedule.warmup_steps={given.warmup_steps} would be all of the run, and warmup_fraction wins"
        findings.warn("schedule", text)
    else:
        findings.ok("schedule", text)


def check_rate(cfg: DictConfig, overrides: Sequence[str], findings: Findings) -> None:
    """Compare the learning rate with that of the recipe, as the square root of the batch."""
    groups = ("experiment", "optimizer", "loss", "model", "data")
    choices = [word for word in overrides if word.split("=")[0] in groups or word.startswith("-")]
    recipe = config.compose("train", [*choices, "paths.output=none", "paths.run=none"])
    rate, expected = cfg.optimizer.get("lr"), recipe.optimizer.get("lr")
    if not isinstance(rate, float | int) or not isinstance(expected, float | int) or not rate or not expected:
        return
    if cfg.batch_size < 1:
        return
    expected *= (cfg.batch_size / recipe.batch_size) ** 0.5
    text = f"{rate:g}; the recipe has {expected:.2g} for batch_size={cfg.batch_size}"
    if not 1 / RATE <= rate / expected <= RATE:
        findings.warn("optimizer.lr", f"{text}: see optimizer.lr")
    else:
        findings.ok("optimizer.lr", text)


def check_data(cfg: DictConfig, parts: Parts, findings: Findings, *, is_said: bool) -> None:
    """Look into the training data; see `check_run`."""
    data = parts.data
    if data is None:
        return
    if parts.steps is not None:
        data_checks.check_sources(data, parts.steps, findings)
    if not is_said:
        data_checks.check_workers(data, parts.processes.local_world_size, count_cores(), findings)
    machine_checks.check_cache(data, cfg.data.shuffle_streams, findings)
    if parts.tokenize is None or not data.is_prepared:
        return
    local = cfg.batch_size // parts.processes.world_size
    machine_checks.check_shared_memory(data, local, parts.processes.local_world_size, findings)
    with findings.guard("data.samples"):
        probe = data_checks.probe_data(data)
        data_checks.check_probe(probe, data, parts.tokenize, cfg.loss.duplicates, findings)
        machine_checks.check_packages(has_jpeg=probe.has_jpeg, findings=findings)


def check_model(cfg: DictConfig, parts: Parts, findings: Findings) -> None:
    """Compare the model with what its weights were trained as."""
    if parts.module is None:
        return
    name, tag = cfg.model.get("name"), cfg.model.get("pretrained")
    millions = sum(parameter.numel() for parameter in parts.module.model.parameters()) / 1e6
    told = open_clip.get_pretrained_cfg(name, tag) if name and tag else {}
    architecture, preprocess = parts.module.model.architecture, preprocess_cfg(parts.module.model)
    if told.get("quick_gelu") is not None and told["quick_gelu"] != bool(architecture.get("quick_gelu")):
        findings.warn("model", f"{tag} was trained with quick_gelu={told['quick_gelu']}: see model.name")
    elif any(told.get(key) and list(told[key]) != list(preprocess[key]) for key in ("mean", "std")):
        findings.warn("model", f"{tag} was trained with another mean or std of pictures: see model.pretrained")
    else:
        findings.ok("model", f"{name or tag}, {millions:.1f} M parameters, {image_size(parts.module.model)} px")


def check_machine(cfg: DictConfig, parts: Parts, findings: Findings) -> None:
    """Compare what the run takes with what the machine has."""
    if parts.module is None:
        return
    size = machine_checks.checkpoint_bytes(parts.module.parameters(), has_average=cfg.ema.decay is not None)
    every = cfg.checkpoint.keep_every_n_steps
    kept = (parts.steps or 0) // every if every else 0
    at_a_time = cfg.checkpoint.keep_last + 1 + (cfg.evaluation.best_metric is not None)
    machine_checks.check_disk(Path(cfg.paths.run), size, at_a_time, kept, findings)
    if parts.data is None or parts.steps is None or not parts.data.is_prepared:
        return
    if findings.failed("batch", "config", "data", "data.samples", "model", "trainer", "memory"):
        return  # no step can be made
    if cfg.data.cached_features:
        with findings.guard("data.cached_features"):
            parts.data.features = stand_in_for_locked(parts.module.model)
        if parts.data.features is None:
            return
    parts.data.teacher = parts.teacher
    with findings.guard("time"):
        measure(cfg, parts, findings)


def take_dearest_stage(module: ClipModule, data: ImageTextData) -> str:
    """Have all steps be of the stage of a curriculum that takes the most time and memory, and say so."""
    stages = module.curriculum
    if not stages:
        return ""
    dearest = max(stages, key=lambda stage: stage.image_size**2 * (1 - stage.patch_dropout))
    module.curriculum = (dataclasses.replace(dearest, end=sys.maxsize),)
    data.decoder = dataclasses.replace(data.decoder, size_limits=((sys.maxsize, dearest.image_size),))
    return f", as if all were of curriculum[{stages.index(dearest)}], the dearest stage"


def measure(cfg: DictConfig, parts: Parts, findings: Findings) -> None:
    """Make some real steps, and say what all of them will take."""
    module, data = parts.module, parts.data
    assert module is not None and data is not None and parts.steps is not None
    quiet = alone(cfg)
    with open_dict(quiet):
        quiet.callbacks, quiet.logger = {}, {}
        quiet.trainer.log_every_n_steps = 1
    of_stage = take_dearest_stage(module, data)

    def make_trainer(steps: int, watcher: pl.Callback) -> pl.Trainer:
        return build_trainer(quiet, one_process(parts.processes), steps, watcher)

    try:
        found = estimate(make_trainer, module, data, cfg.batch_size // parts.processes.world_size)
    except torch.OutOfMemoryError as error:
        findings.fail("memory", f"{' '.join(str(error).split())[:200]}: set {machine_checks.LESS_MEMORY}")
        return
    device = launch.train_device(cfg.trainer.accelerator, one_process(parts.processes))
    machine_checks.check_memory(found.memory, parts.processes.local_world_size, device, findings, found.how)
    rate = cfg.batch_size / found.seconds
    left_out = "evaluations, and the features that are computed first" if has_features(data) else "evaluations"
    text = f"{format_seconds(parts.steps * found.seconds)} for {parts.steps:,} steps{of_stage}, {rate:,.0f} samples/s"
    findings.ok("time", f"{text} on {launch.describe_device(device)}, without {left_out} ({found.how})")
    if found.wait > MAX_WAIT:
        text = f"{found.wait:.0%} of a step is waiting for data: see data.num_workers, data.draft, or smaller pictures"
        findings.warn("data.wait", text)
