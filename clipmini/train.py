"""`clipmini train`: check everything, build, train, export, evaluate."""

import logging
import multiprocessing
import os
import shutil
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from torch import nn

from clipmini import launch
from clipmini.blocks import compile_blocks
from clipmini.checkpoints import disk, resume
from clipmini.checkpoints.saving import SaveCheckpoints
from clipmini.cluster import signals
from clipmini.cluster.hangs import record_collectives
from clipmini.config import build, check_all, read_node
from clipmini.console import set_up_logging
from clipmini.curriculum import read_curriculum, size_limits
from clipmini.data.captions import SAME
from clipmini.data.loader import ImageTextData
from clipmini.data.tokenizer import Tokenize, create_tokenizer
from clipmini.ema import WeightAverage, Weights, check_weights
from clipmini.errors import Stopped, UserError
from clipmini.evaluation.datasets import Opened, open_sets
from clipmini.evaluation.encoder import Interrupted, check_precision
from clipmini.evaluation.entries import read_entries
from clipmini.evaluation.evaluator import Evaluator
from clipmini.evaluation.results import log_results
from clipmini.evaluation.tasks import make_protocol
from clipmini.evaluation.validation import read_held_out
from clipmini.evaluation_callback import Evaluation, check_best_metric, find_callbacks
from clipmini.export.open_clip_directory import export_open_clip
from clipmini.guard import Guard
from clipmini.locked_features import keep_features
from clipmini.lora import add_lora
from clipmini.model import (
    count_parameters,
    image_size,
    open_clip_config,
    padding,
    synchronize_batch_norm,
    width_before_projection,
)
from clipmini.module import ClipModule
from clipmini.one_tower import OTHER, Model, text_tower, towers_of
from clipmini.redaction import redact
from clipmini.report.command import report_at_end
from clipmini.report.read import ENVIRONMENT, SHOWN
from clipmini.run_log import describe_data, describe_inputs, log_files, log_header, log_health, write_environment
from clipmini.sources import EXPORTED, check_tokenizer, load_start
from clipmini.teacher import Teacher, keep_teacher_features, load_teacher
from clipmini.towers import decay_learning_rates
from clipmini.trainer import build_trainer, fit

log = logging.getLogger(__name__)


def train(cfg: DictConfig) -> None:
    """Run what a composed config asks for; the same `name` again goes on where it stopped.

    Raises:
        UserError: anything in the config that cannot work; nothing but the log is written then.
    """
    run = Path(cfg.paths.run)
    processes = launch.read_launch()
    set_up_logging(run / "train.log", rank=processes.rank)
    check_all(cfg)  # before anything is done; what is missing is refused too
    launch.check_batch(processes, batch_size=cfg.batch_size, micro_batch=cfg.micro_batch)
    device = launch.train_device(cfg.trainer.accelerator, processes)
    record_collectives(str(run))
    signals.listen()
    others = multiprocessing.active_children()
    try:
        with launch.joined(processes, device, cfg.timeouts.start):
            train_together(cfg, processes, run)
        signals.stop_listening()
    except BaseException as error:
        signals.ignore() if isinstance(error, Stopped) else signals.stop_listening()
        raise
    finally:
        for worker in multiprocessing.active_children():
            if worker not in others:  # what is left leaves signals to this process, and Python would wait for it
                worker.kill()


def train_together(cfg: DictConfig, processes: launch.Launch, run: Path) -> None:
    """Do what each process of a run does, once they are together."""
    # Unresolved: what comes from the environment stays there. Checkpoints hold it too.
    config = cast(dict[str, Any], redact(OmegaConf.to_container(cfg, resolve=False)))
    newest = resume.find_checkpoint(run, config)
    datasets = cast(list[Any], OmegaConf.to_container(cfg.evaluation.datasets, resolve=True))
    key = "evaluation.datasets"
    opened = open_sets(read_entries(datasets, key), key, with_train=bool(cfg.evaluation.probes))
    data = build_data(cfg, processes)
    teacher = load_teacher(cfg.teacher, build(cfg, "loss"))
    pl.seed_everything(cfg.seed, verbose=False)
    total_steps = count_steps(cfg.steps, cfg.epochs, data.manifest.num_samples, cfg.batch_size)
    module = build_module(cfg, config, processes, total_steps, teacher)
    tokenize = create_tokenizer(module.model.architecture)
    prepare(data, module, tokenize, total_steps)
    evaluation = build_evaluation(cfg, opened, data, module, tokenize, run)
    trainer = build_trainer(cfg, processes, total_steps, evaluation)
    precision = launch.choose_precision(cfg.trainer.precision, launch.choose_accelerator(cfg.trainer.accelerator))
    options = {"device": trainer.strategy.root_device, "precision": precision, "batch_size": cfg.evaluation.batch_size}
    if newest:
        resume.check_same_model(open_clip_config(module.model), newest)
        resume.check_same_teacher(module.teacher, newest)
        resume.check_length(total_steps, newest)
    try:
        if cfg.data.cached_features:
            keep_features(module.model, data, processes, **options)
        if teacher is not None:
            keep_teacher_features(teacher, data, processes, **options)
            del teacher
    except Interrupted:
        stop_before_training(trainer, newest)

    if processes.rank == 0:
        run.mkdir(parents=True, exist_ok=True)
        disk.set_aside(run / "checkpoints", newest)
        OmegaConf.save(OmegaConf.create(config), run / "config.yaml")
        about = describe_run(cfg, trainer, module, data)
        log_header(about)
        first = 0 if newest is None else disk.checkpoint_step(newest)
        write_environment(run / ENVIRONMENT, about, cfg.batch_size, first)
    fit(trainer, module, data, newest, cfg.timeouts.step)
    log_health(run / "quarantine.jsonl", total_steps * cfg.batch_size)
    export(trainer, module, run)
    evaluate(evaluation, trainer, module)
    log_results(evaluation.rows)
    if processes.rank == 0:
        report_at_end(run)
    log_files(run, towers_of(module.model))


def describe_run(cfg: DictConfig, trainer: pl.Trainer, module: ClipModule, data: ImageTextData) -> dict[str, str]:
    """Say what is about to be trained, on what, and on which data."""
    millions = count_parameters(module.model) / 1e6
    name = cfg.model.name or cfg.model.pretrained
    experiment = HydraConfig.get().runtime.choices["experiment"] if HydraConfig.initialized() else "?"
    return {
        "run": f"{cfg.name} in {cfg.paths.run}",
        "recipe": f"experiment={experiment}, and what was overridden",
        "device": f"{trainer.world_size} x {launch.describe_device(trainer.strategy.root_device)}, {trainer.precision}",
        "model": f"{name}, {millions:.1f} M parameters, {describe_inputs(module.model)}",
        **describe_data(data, trainer.world_size),
    }


def stop_before_training(trainer: pl.Trainer, newest: Path | None) -> None:
    """End a run that was asked to stop before it trains, or goes on from a checkpoint; what has been computed stays.

    Raises:
        Stopped: always.
    """
    for saving in find_callbacks(trainer, SaveCheckpoints):
        saving.stop(0 if newest is None else disk.checkpoint_step(newest))
    raise Stopped("stopped before the first step; the same command goes on from there")


def export(trainer: pl.Trainer, module: ClipModule, run: Path) -> None:
    """Write the trained model and, if there is one, that with the average of its weights; every rank must call it."""
    if trainer.is_global_zero:
        shutil.rmtree(run / EXPORTED["average"], ignore_errors=True)
    kinds: tuple[Weights, ...] = ("trained",) if module.average is None else ("trained", "average")
    for weights in kinds:
        with module.holding(weights), module.whole_model(trainer.strategy.root_device) as model:
            if trainer.is_global_zero:
                export_open_clip(model, run / EXPORTED[weights])


def evaluate(evaluation: Evaluation, trainer: pl.Trainer, module: ClipModule) -> None:
    """Evaluate what is trained, and end the loggers again, which Lightning did before; every rank must call it.

    Raises:
        Stopped: a process is asked to stop.
    """
    status = "failed"
    try:
        evaluation.evaluate_at_end(trainer, module)
        status = "success"
    finally:
        for logger in trainer.loggers:
            logger.finalize(status)


def count_steps(steps: int | None, epochs: float | None, num_samples: int, batch_size: int) -> int:
    """Return the length of the run in optimizer steps; `steps` wins over `epochs`.

    Raises:
        UserError: neither is given, or less than one step comes out.
    """
    if steps is None and epochs is None:
        raise UserError("steps=null and epochs=null: one of them must say how long to train")
    total = int(epochs * num_samples / batch_size) if steps is None and epochs is not None else steps
    assert total is not None
    if total < 1:
        raise UserError(f"steps={steps}, epochs={epochs}: less than one step of batch_size={batch_size}")
    return total


def build_data(cfg: DictConfig, processes: launch.Launch) -> ImageTextData:
    """Find and count the shards, and make the order of samples.

    Raises:
        UserError: a value that cannot work.
    """
    known = {"batch_size": cfg.batch_size, "seed": cfg.seed, "num_cores": processes.num_cores}
    loss = build(cfg, "loss")
    return build(cfg, "data", terms=tuple(loss.terms), all_views=loss.all_views, **known)


def prepare(data: ImageTextData, module: ClipModule, tokenize: Tokenize, total_steps: int) -> None:
    """Tell the data what it must know of the model and of the length of the run.

    Raises:
        UserError: they do not go together.
    """
    check_tokenizer(module.model, tokenize)
    check_second_pass(data, module.model)
    limits = size_limits(module.curriculum, data.batch_size)
    if limits and data.cached_features:
        raise UserError(
            "curriculum: pictures of several sizes, and data.cached_features=true keeps those of one: unset one"
        )
    size = image_size(module.model)
    data.prepare(tokenize=tokenize, padding=padding(module.model), size=size, num_steps=total_steps, size_limits=limits)


def build_module(
    cfg: DictConfig, config: dict[str, Any], processes: launch.Launch, total_steps: int, teacher: Teacher | None = None
) -> ClipModule:
    """Build model, loss and optimizer, and try the optimizer once, so that a wrong value stops here."""
    loss = build(cfg, "loss")
    read_node(cfg, "model")  # before what it names is loaded
    start = load_start(cfg.model.pretrained, cfg.model.name).model if cfg.model.pretrained else None
    given = {"image_size": cfg.image_size, "init_scale": loss.init_scale, "init_bias": loss.init_bias}
    model = build(cfg, "model", start=start, towers=loss.towers, **given)
    check_start(cfg, start)
    del start
    add_lora(model, **cfg.lora)
    if loss.needs_head:
        loss.add_head(width_before_projection(model))
    if teacher is not None:
        loss.add_teacher(model.architecture["embed_dim"], teacher.width, teacher.scale)
    accelerator = launch.choose_accelerator(cfg.trainer.accelerator)
    if launch.can_synchronize_batch_norm(processes, accelerator):
        model, loss = synchronize_batch_norm(model), synchronize_batch_norm(loss)
    curriculum = read_curriculum(cfg.curriculum, model, total_steps)  # it runs the image tower: before that is compiled
    if cfg.compile:
        launch.check_compiler(accelerator)
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(cfg.paths.cache, "compiled"))
        compile_blocks(model)
    module = ClipModule(
        model,
        loss,
        optimizer=build(cfg, "optimizer"),
        schedule=build(cfg, "schedule"),
        total_steps=total_steps,
        micro_batch=cfg.micro_batch,
        guard=Guard(batch_size=cfg.batch_size, **cfg.bad_steps),
        average=None if cfg.ema.decay is None else WeightAverage(**cfg.ema),
        shares=decay_learning_rates(model, cfg.layer_decay),
        curriculum=curriculum,
        teacher=None if teacher is None else teacher.fingerprint,
    )
    launch.check_sharding(
        cfg.trainer.strategy,
        launch.choose_precision(cfg.trainer.precision, accelerator),
        has_local_batch_norm=module.has_local_batch_norm,
    )
    module.save_hyperparameters(config, logger=False)
    try:
        module.configure_optimizers()
    except (TypeError, ValueError) as error:
        raise UserError(f"optimizer or schedule: {error}") from error
    return module


def check_start(cfg: DictConfig, start: Model | None) -> None:
    """See that what goes on from trained weights has some.

    Raises:
        UserError: it has none.
    """
    towers = cfg.model.pretrained_towers
    if start is None and towers != "both":
        raise UserError(f"model.pretrained_towers={towers}: set model.pretrained, which is null")
    if start is None and cfg.lora.rank:
        raise UserError(f"lora.rank={cfg.lora.rank}: changes weights that stay as they are: set model.pretrained")
    if cfg.lora.rank and towers != "both" and cfg.lora[OTHER[towers]] != []:
        key = f"lora.{OTHER[towers]}"
        raise UserError(f"{key}: this tower begins as it is made, by model.pretrained_towers={towers}: set {key}=[]")


def build_evaluation(
    cfg: DictConfig, opened: list[Opened], data: ImageTextData, module: ClipModule, tokenize: Tokenize, run: Path
) -> Evaluation:
    """Make what evaluates the run while it trains, and at its end.

    Raises:
        UserError: values that cannot work, or held-out pairs that cannot be read.
    """
    options = cfg.evaluation
    check_weights(options.weights, "evaluation.weights")
    if options.weights == "average" and cfg.ema.decay is None:
        raise UserError("evaluation.weights=average: there is no average with ema.decay=null; set it, as in 0.9999")
    check_precision(options.precision, "evaluation.precision")
    protocol = make_protocol({**options, "seed": cfg.seed, "shuffled": False}, under="evaluation.")
    evaluator = Evaluator(opened, protocol, options.batch_size, data.num_workers, options.precision, "evaluation.")
    evaluator.check_model(module.model)
    held_out = None
    if data.held_out is not None:
        module.loss.check_judged()
        known = {"seed": cfg.seed, "group_size": cfg.batch_size, "max_bad_fraction": data.max_bad_fraction}
        held_out = read_held_out(data.held_out, data.store, data.content, **known)
    check_best_metric(options.best_metric, evaluator, module.model, held_out)
    return Evaluation(
        evaluator,
        held_out,
        tokenize,
        output=run / "results.jsonl",
        shown=run / SHOWN,
        at_start=options.at_start,
        every_n_steps=options.every_n_steps,
        best_metric=options.best_metric,
        best=run / "checkpoints" / disk.BEST,
        weights=options.weights,
    )


def check_second_pass(data: ImageTextData, model: Model) -> None:
    """See that two passes of one caption differ.

    Raises:
        UserError: the text tower has no dropout.
    """
    if data.content.captions.second_key != SAME:
        return
    tower = text_tower(model)
    layers = () if tower is None else tower.transformer.modules()
    if not any(layer.p > 0 for layer in layers if isinstance(layer, nn.Dropout)):
        raise UserError(
            f"data.second_caption_key={SAME}: the text tower has no dropout, so that two passes of a caption are the "
            "same: take one that has (model.text_cfg.hf_model_name), or another caption"
        )
