"""The training step."""

import contextlib
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from clipmini import distributed
from clipmini.cluster.sharding import Skeleton, checkpoint_contexts, shard_modules
from clipmini.curriculum import Stage, set_patch_dropout, stage_at
from clipmini.data.decode import FEATURES, TEACHER_FEATURES, VIEWS
from clipmini.ema import AVERAGE, WeightAverage, Weights
from clipmini.errors import UserError
from clipmini.guard import Guard, can_skip
from clipmini.model import Model, encode_image, encode_text, list_projection, open_clip_config, project_image
from clipmini.objective import ContrastiveLoss
from clipmini.optim import apply_shares, match_memory_format, parameter_groups

log = logging.getLogger(__name__)

CAPTIONS = {"text": "text", "text_2": "text_2", "negative": "negative_text"}  # features, by names in a batch
INPUTS = (*VIEWS, FEATURES, *CAPTIONS.values())  # of a batch, for the towers
COMPARED = ("view", "view_2")  # features of the two views that are compared with each other


def no_span(_: str) -> contextlib.AbstractContextManager[Any]:
    """Measure nothing, see `clipmini.profiling`."""
    return contextlib.nullcontext()


def rest_unused(model: Model, loss: ContrastiveLoss) -> None:
    """Freeze what no term of a loss uses: DDP would wait for its gradients."""
    if not loss.uses_scale:
        model.logit_scale.requires_grad_(False)
    if model.logit_bias is not None and not loss.uses_bias:
        model.logit_bias.requires_grad_(False)
    if loss.head is not None and not loss.compares_embeddings:
        for parameter in list_projection(model):
            parameter.requires_grad_(False)


@torch.no_grad()
def spreads(features: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the variance [] of the unit vectors [b, D] of each tower: 0 if all are the same, 1 if they go all ways.

    It is that of this process's pairs, without bias, so that the mean over processes tends to the same for any number.
    """
    of_towers = {"image": features.get("image", features.get("view")), "text": features.get("text")}
    found = {f"{tower}_spread": rows for tower, rows in of_towers.items() if rows is not None and len(rows) > 1}
    # On a CPU a tenth of the time of `rows.var(0).sum()`.
    return {name: (rows - rows.mean(0)).float().square().sum() / (len(rows) - 1) for name, rows in found.items()}


class ClipModule(pl.LightningModule):
    """Trains an open_clip model with a contrastive loss under Lightning's automatic optimization.

    Args:
        model: from `create_model`.
        loss: what is minimised.
        optimizer: takes parameter groups.
        schedule: takes the optimizer and `total_steps`.
        total_steps: of the whole run.
        micro_batch: pictures encoded at a time; None encodes the local batch at once.
        guard: against steps that are not finite.
        average: of the weights, or None.
        shares: of the learning rate, for parameters of the model that learn slower, by name.
        curriculum: stages of the run, if it has some.
        teacher: what tells it from others, kept in checkpoints; None without one.

    Raises:
        UserError: micro-batches that would not be exact.
    """

    def __init__(
        self,
        model: Model,
        loss: ContrastiveLoss,
        *,
        optimizer: Callable[[list[dict]], Optimizer],
        schedule: Callable[..., Any],
        total_steps: int,
        micro_batch: int | None,
        guard: Guard,
        average: WeightAverage | None,
        shares: Mapping[str, float] | None = None,
        curriculum: Sequence[Stage] = (),
        teacher: Any = None,
    ) -> None:
        super().__init__()
        layers = itertools.chain(model.modules(), loss.modules())
        batch_norms = [layer for layer in layers if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm)]
        # Those of locked layers are none, but for model.lock_image_freeze_bn_stats=false: they look at no batch.
        self.has_local_batch_norm = not all(isinstance(layer, torch.nn.SyncBatchNorm) for layer in batch_norms)
        if micro_batch is not None and batch_norms:
            raise UserError(
                f"micro_batch={micro_batch}: this model has BatchNorm, which would normalise over each micro-batch: "
                "set micro_batch=null or take a model without it"
            )
        rest_unused(model, loss)
        self.batch_norms = batch_norms
        self.model = model
        self.loss = loss
        self.optimizer = optimizer
        self.schedule = schedule
        self.total_steps = total_steps
        self.micro_batch = micro_batch
        self.guard = guard
        self.average = average
        self.shares = shares
        self.curriculum = curriculum
        self.stage: Stage | None = None
        self.teacher = teacher
        self.scaler: Any = None  # of gradients, with precision 16-mixed
        self.skeleton: Skeleton | None = None  # of a model whose weights are in shards
        self.span: Callable[[str], contextlib.AbstractContextManager[Any]] = no_span  # of the parts of a step
        self.updating = contextlib.ExitStack()
        self.last: dict[str, Tensor] = {}  # what the step measured, for whoever logs; on the device, not read here

    def configure_model(self) -> None:
        """Cut the weights into shards if the strategy is for that; Lightning may call it again."""
        if self.device_mesh is not None and self.skeleton is None:
            self.skeleton = Skeleton(self.model)
            shard_modules(self, self.device_mesh, forward="encode")

    @contextlib.contextmanager
    def whole_model(self, device: torch.device) -> Iterator[Model]:
        """Give the model with whole weights, to use on this process alone; every rank must call it."""
        yield self.model.to(device) if self.skeleton is None else self.skeleton.fill(self.model, device)

    def on_train_start(self) -> None:
        self.scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if self.average is not None:
            self.average.start(self.model)
        if self.has_local_batch_norm and self.trainer.world_size > 1:
            log.warning(
                "this model has BatchNorm, which normalises over the batch of a process where there is no GPU: the run "
                "depends on the number of processes"
            )
        loader, step = self.trainer.train_dataloader, self.trainer.global_step
        assert loader is not None
        # Several things in Lightning can lose the loader's place on a resume, each without a word.
        assert loader.samples == step * loader.batch_size, (
            f"the loader is at sample {loader.samples}, and step {step} of {loader.batch_size} samples each is done"
        )
        if len(set(distributed.all_gather_objects(loader.state_dict()["plan"]))) > 1:
            raise UserError(
                "data.train: not all processes have the same shards and counts; what differs may be the files, or "
                "counts kept in paths.cache of a node (`clipmini shards index` counts again)"
            )

    def on_train_batch_start(self, *_: Any) -> None:
        """Begin a stage of the curriculum where its first step is; the data knows it by the position of samples."""
        step = self.trainer.global_step
        stage = stage_at(self.curriculum, step)
        if stage is not self.stage:
            assert stage is not None
            set_patch_dropout(self.model, stage.patch_dropout)
            text = "step %d: pictures of %d px and patch dropout %g, to step %d"
            log.info(text, step, stage.image_size, stage.patch_dropout, stage.end)
            self.stage = stage

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        statistics = (buffer for layer in self.batch_norms for buffer in layer.buffers())
        self.guard.protect([self.model.logit_scale, *statistics])
        features = self.embed(batch)
        scale = self.model.logit_scale.exp()
        with self.span("loss"):
            ids = {name: batch[f"{key}_id"] for name, key in CAPTIONS.items() if key in batch}
            compared = features | {name: batch[name] for name in TEACHER_FEATURES if name in batch}
            result = self.loss(compared, scale=scale, bias=self.model.logit_bias, ids=ids)
        measured = {**result, "scale": scale, **spreads(features)}
        self.last = {name: value.detach() for name, value in measured.items()}
        return self.guard.mark(result["loss"], features.values())

    def embed(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Encode a batch: unit vectors [b, D] by name, see `ContrastiveLoss.forward`.

        With micro-batches the activations of one at a time exist: they are recomputed when the one backward pass of
        the one loss comes to them, with the same random numbers. That is gradient caching
        (https://arxiv.org/abs/2101.06983) by `torch.utils.checkpoint`.
        """
        names = [name for name in INPUTS if name in batch]
        # In shards, each process must run its blocks as often as the others, whatever its captions.
        lengths = [f"{name}_length" for name in names] if self.skeleton is None else []
        inputs = {name: batch[name] for name in (*names, *lengths) if name in batch}
        count = len(batch[names[0]])
        size = self.micro_batch or count
        if size >= count:
            return self.encode(inputs)
        parts = [
            checkpoint(
                self.encode,
                {name: rows[start : start + size] for name, rows in inputs.items()},
                use_reentrant=False,
                context_fn=checkpoint_contexts,
            )
            for start in range(0, count, size)
        ]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def encode(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Encode some of a batch."""
        with self.span("encode image"):
            features = self.encode_views({name: inputs[name] for name in VIEWS if name in inputs})
            if FEATURES in inputs:
                learns = any(parameter.requires_grad for parameter in list_projection(self.model))
                features["image"] = project_image(self.model, inputs[FEATURES]) if learns else inputs[FEATURES]
        with self.span("encode text"):
            for name, of_batch in CAPTIONS.items():
                if of_batch in inputs:
                    features[name] = encode_text(self.model, inputs[of_batch], inputs.get(f"{of_batch}_length"))
        return features | self.loss.project(features)

    def encode_views(self, views: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Encode views of pictures, and those that are compared with each other through the head, if there is one.

        The head takes what goes into the last projection of the tower, as in SLIP.
        """
        compared = list(views)[-2:] if "image_image" in self.loss.terms else []
        features = {}
        for name, image in views.items():
            if self.loss.head is None or name not in compared:
                features[name] = encode_image(self.model, image)
                continue
            before = encode_image(self.model, image, before_projection=True)
            features[COMPARED[compared.index(name)]] = self.loss.head(before)
            if self.loss.compares_embeddings:
                features[name] = project_image(self.model, before)
        if compared and self.loss.head is None:
            features |= dict(zip(COMPARED, (features[name] for name in compared), strict=True))
        return features

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        with self.span("host to device"):
            return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def backward(self, loss: Tensor, *arguments: Any, **options: Any) -> None:
        with self.span("backward"):
            super().backward(loss, *arguments, **options)

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip by the norm, keep the norm for the log, and have a bad step change nothing."""
        self.updating.enter_context(self.span("optimizer"))
        if self.scaler is not None and can_skip(optimizer):
            self.scaler.unscale_(optimizer)  # Lightning leaves that to fused optimizers: too late for the norm
        parameters = [parameter for parameter in self.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(parameter.grad for parameter in parameters if parameter.grad is not None)
        self.last["grad_norm"] = norm = distributed.full(norm)
        self.guard.judge(norm)
        if gradient_clip_val:
            torch.nn.utils.clip_grads_with_norm_(parameters, gradient_clip_val, norm)
        self.guard.hold(optimizer, has_scaler=self.scaler is not None)

    def optimizer_step(self, *arguments: Any, **options: Any) -> None:
        """Step, and clamp the scale at once, so that a checkpoint never holds it unclamped."""
        super().optimizer_step(*arguments, **options)
        self.updating.close()
        self.loss.clamp_(self.model.logit_scale)
        self.guard.finish(self.trainer.optimizers[0])
        if self.average is not None:
            self.average.update(self.model, self.guard.bad)

    def on_train_batch_end(self, *_: Any) -> None:
        """Stop after too many bad steps in a row; what they were has been read already where the run is logged."""
        # Lightning does so after the next forward pass: with what is kept for the gradient, that is the most memory.
        self.trainer.optimizers[0].zero_grad()
        step = self.trainer.global_step
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if step % every == 0 or step == self.trainer.max_steps:
            self.guard.read(step)
            self.guard.check(step)

    def holding(self, weights: Weights) -> contextlib.AbstractContextManager[None]:
        """Have the model hold the trained weights, or their average, for a while."""
        if weights == "trained":
            return contextlib.nullcontext()
        assert self.average is not None
        return self.average.applied(self.model)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say how the model is made, so that a checkpoint alone is enough to use it; every rank must call it."""
        checkpoint["open_clip_config"] = open_clip_config(self.model)
        self.guard.read(self.trainer.global_step)
        checkpoint["bad_steps"] = self.guard.state_dict()
        checkpoint["teacher"] = self.teacher
        if self.average is not None:
            checkpoint |= self.average.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the counts of bad steps and the average of weights."""
        self.guard.load_state_dict(checkpoint["bad_steps"])
        if self.average is not None:
            self.average.load_state_dict(checkpoint)
        if (self.average is not None) != (AVERAGE in checkpoint):
            lost = "begins at this checkpoint, which has none" if self.average else "of this checkpoint is given up"
            log.warning("ema.decay: the average of weights %s", lost)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = self.optimizer(parameter_groups([self.model, self.loss], self.shares))
        apply_shares(optimizer)
        optimizer.register_load_state_dict_post_hook(match_memory_format)
        scheduler = self.schedule(optimizer, total_steps=self.total_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
