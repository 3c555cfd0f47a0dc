"""Trained models from a run, a checkpoint, an open_clip directory, open_clip's name with tag, or a file of weights."""

import ast
import json
import logging
import textwrap
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import open_clip
import yaml
from open_clip.hf_model import HFTextEncoder
from open_clip.transform import PreprocessCfg, merge_preprocess_dict
from safetensors import safe_open

from clipmini import distributed
from clipmini.architecture import read_architecture
from clipmini.checkpoints.disk import Damaged, find_newest_valid, load_checkpoint
from clipmini.data.tokenizer import Tokenize, create_tokenizer
from clipmini.ema import AVERAGE, check_weights
from clipmini.errors import UserError, did_you_mean, tell_choices
from clipmini.files import tell_neighbours
from clipmini.lora import merge_lora
from clipmini.model import create_from_architecture, create_from_open_clip_config, set_preprocess
from clipmini.one_tower import Model, Towers, named_towers, text_tower
from clipmini.weights import download_pretrained, load_weights

log = logging.getLogger(__name__)

LOCAL_DIRECTORY = "local-dir:"
CONFIG_FILE = "open_clip_config.json"
EXPORTED = {"trained": "model", "average": "model_average"}  # directories of a run, by the weights in them
WEIGHTS = (".pt", ".pth", ".bin", ".safetensors")


@dataclass(frozen=True)
class Source:
    """A model and where it came from.

    Attributes:
        model: on the CPU, in evaluation mode.
        name: of the run, the architecture or the directory.
        weights: which of its weights: a step (and that they are the average), a tag, a file.
        step: of the checkpoint, or None.
        run: the directory of the run, if it is in one of clipmini's.
        config: of that run, as plain data, or None.
    """

    model: Model
    name: str
    weights: str
    step: int | None = None
    run: Path | None = None
    config: dict[str, Any] | None = None

    def tokenizer(self) -> Tokenize:
        """Return the model's tokenizer.

        Raises:
            UserError: it does not go with the model.
        """
        tokenize = create_tokenizer(self.model.architecture)
        check_tokenizer(self.model, tokenize)
        return tokenize


def load_model(source: str, *, architecture: str | None = None, weights: str = "trained") -> Source:
    """Load a model.

    Args:
        source: a run directory (its newest checkpoint), a .ckpt of a run, an open_clip directory with or without
            `local-dir:`, `NAME/TAG` of open_clip, or a file of open_clip's weights (also of its trainer, from DDP).
        architecture: of a file of weights: an open_clip name or a JSON file; None looks into the params.txt of
            open_clip's trainer beside it.
        weights: of a run or a checkpoint: the `trained` ones, or their `average`.

    Raises:
        UserError: there is no such model, it has no average, or its weights do not fit.
    """
    check_weights(weights, "weights")
    path = Path(source.removeprefix(LOCAL_DIRECTORY))
    if architecture is not None and not (path.is_file() and path.suffix in WEIGHTS):
        raise UserError(f"architecture={architecture}: is for files of weights ({', '.join(WEIGHTS)}), not {source}")
    is_open_clip = source.startswith(LOCAL_DIRECTORY) or (path / CONFIG_FILE).is_file()
    if path.is_dir() and not is_open_clip:
        loaded = (load_run_checkpoint if path.suffix == ".ckpt" else load_run)(path, weights)
    elif weights != "trained":
        raise UserError(f"weights={weights}: is for runs and their checkpoints, not {source}")
    elif is_open_clip:
        loaded = load_directory(path)
    elif path.is_file():
        loaded = load_file(path, architecture)
    else:
        loaded = load_tag(source)
    loaded.model.eval()
    return loaded


def load_start(pretrained: str, name: str | None) -> Source:
    """Load what a run starts from: what `load_model` takes, or a tag or a file of weights for a model's name.

    Raises:
        UserError: there is no such model, or it cannot be loaded.
    """
    path = Path(pretrained.removeprefix(LOCAL_DIRECTORY))
    tags = open_clip.list_pretrained_tags_by_model(name) if name else []
    try:
        if path.is_file() and path.suffix in WEIGHTS:
            return load_model(pretrained, architecture=name)
        if path.exists() or pretrained.rpartition("/")[0] in open_clip.list_models():
            return load_model(pretrained)
        if pretrained in tags:
            return load_model(f"{name}/{pretrained}")
    except UserError as error:
        reason = str(error).removeprefix(f"model={pretrained}: ").replace("architecture=", "model.name=")
        raise UserError(f"model.pretrained={pretrained}: {reason}") from error
    hint = tell_neighbours(path) or did_you_mean(pretrained, tags)
    raise UserError(
        f"model.pretrained={pretrained}: neither a file nor a tag of {name}{hint}, nor a run, a checkpoint, an "
        f"open_clip directory or NAME/TAG; tags: {', '.join(tags) or 'none'}"
    )


def load_run(run: Path, weights: str = "trained") -> Source:
    """Load the newest checkpoint of a run or, where all are deleted, what it exported.

    Raises:
        UserError: there is none, or all that there are are damaged.
    """
    exported = EXPORTED[weights]
    has_exported = (run / exported / CONFIG_FILE).is_file()
    try:
        # The same in all processes: the run may be saving another one now.
        newest = distributed.from_first(lambda: find_newest_valid(run / "checkpoints"))
    except UserError as error:  # what it says is for who trains
        hint = f"; {run / exported} is what the run exported" if has_exported else ""
        raise UserError(f"model={run}: none of the checkpoints in {run / 'checkpoints'} is valid{hint}") from error
    if newest is not None:
        return load_run_checkpoint(newest, weights, verify=False)  # it has just been
    if has_exported:
        return load_directory(run / exported)
    raise UserError(
        f"model={run}: neither a run (checkpoints/step-*.ckpt, {exported}/) nor an open_clip directory ({CONFIG_FILE})"
    )


def load_run_checkpoint(path: Path, weights: str = "trained", *, verify: bool = True) -> Source:
    """Load a checkpoint of clipmini's, with the trained weights or their average.

    Args:
        verify: compare it with its manifest first.

    Raises:
        UserError: it cannot be read, has no average, or does not fit.
    """
    content = read_checkpoint(path, verify=verify)
    # A head of views is in it too, and no part of the model.
    prefix, state = "model.", content["state_dict"].items()
    values = {name.removeprefix(prefix): value for name, value in state if name.startswith(prefix)}
    model = create_described(content["open_clip_config"], f"model={path}", named_towers(values))
    if weights == "average":
        if AVERAGE not in content:
            raise UserError(f"model={path}: weights=average: there is none in it, the run had ema.decay=null")
        values |= content[AVERAGE]
    try:
        model.load_state_dict(merge_lora(values))
    except RuntimeError as error:
        raise UserError(f"model={path}: {textwrap.shorten(str(error), 600, placeholder=' ...')}") from error
    directory = path.resolve().parent
    run = directory.parent if directory.name == "checkpoints" else None
    config = content.get("hyper_parameters")
    step = int(content["global_step"])
    name = run.name if run else path.stem
    which = f"step {step}" if weights == "trained" else f"step {step} average"
    return Source(model, name, which, step, run, config if isinstance(config, dict) else None)


def read_checkpoint(path: Path, *, verify: bool = True) -> dict[str, Any]:
    """Read a checkpoint of clipmini's; see `load_run_checkpoint`.

    Raises:
        UserError: it is damaged, or is none.
    """
    try:
        content = load_checkpoint(path, verify=verify)
    except Damaged as error:
        raise UserError(f"model={path}: {error}") from error
    except Exception as error:  # of pickle, zipfile: damage has no common class
        raise UserError(f"model={path}: cannot be read: {tell(error)}") from error
    if not isinstance(content, dict) or not {"state_dict", "open_clip_config", "global_step"} <= content.keys():
        raise UserError(f"model={path}: is no checkpoint of clipmini")
    return content


def tell(error: Exception) -> str:
    """Say in one line why a file cannot be read, without torch's advice to run the code in it."""
    if isinstance(error, UnpicklingError) or isinstance(error.__cause__, UnpicklingError):
        return "it is damaged, or holds code, which is not run"
    return (str(error).split(" In PyTorch 2.6")[0].splitlines() or [type(error).__name__])[0]


def create_described(config: Any, at: str, towers: Towers) -> Model:
    """Make the model of an `open_clip_config.json`, with those of its towers that there are weights of.

    Raises:
        UserError: it is none.
    """
    if not isinstance(config, Mapping):
        raise UserError(f"{at}: {CONFIG_FILE} holds no mapping")
    try:
        return create_from_open_clip_config(config, towers)
    except UserError as error:
        raise UserError(f"{at}: {error}") from error


def load_directory(directory: Path) -> Source:
    """Load a directory for open_clip's `local-dir:`."""
    file = directory / CONFIG_FILE
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"model={directory}: {file} cannot be read: {error}") from error
    weights = open_clip.factory._find_checkpoint_in_dir(directory)
    towers: Towers = "both" if weights is None else named_towers(list_names(Path(weights)))
    model = create_described(config, f"model={directory}", towers)
    if weights is None:
        raise UserError(f"model={directory}: no weights in it (open_clip_model.safetensors)")
    load_weights(model, weights, f"model={directory}: {Path(weights).name} does not fit {CONFIG_FILE}")
    run = directory.resolve().parent
    name = directory.resolve().name
    if name in EXPORTED.values() and (run / "config.yaml").is_file():
        return Source(model, run.name, name, run=run, config=read_run_config(run))
    return Source(model, directory.resolve().name, Path(weights).name)


def read_run_config(run: Path) -> dict[str, Any] | None:
    """Read the config of a run as plain data."""
    path = run / "config.yaml"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error
    return content if isinstance(content, dict) else None


def load_tag(source: str) -> Source:
    """Load a name of open_clip with one of its tags, from open_clip's own cache or the network."""
    name, _, tag = source.rpartition("/")
    if name not in open_clip.list_models():
        known = [f"{name}/{tag}" for name, tag in open_clip.list_pretrained()]
        raise UserError(
            f"model={source}: neither a file nor a directory, and no NAME/TAG of open_clip"
            f"{tell_neighbours(source) or did_you_mean(source, known)}"
        )
    tags = open_clip.list_pretrained_tags_by_model(name)
    if tag not in tags:
        raise UserError(f"model={source}: {name} has no tag {tag!r}{tell_choices(tag, tags)}")
    details = open_clip.get_pretrained_cfg(name, tag)
    architecture = read_architecture(name=name)
    quick_gelu = details.get("quick_gelu")
    if quick_gelu is not None and quick_gelu != bool(architecture.get("quick_gelu")):
        # As trained: with the other activation the same weights lose some points, without a word.
        architecture["quick_gelu"] = quick_gelu
        log.info("%s: with quick_gelu=%s, as its weights were trained", source, quick_gelu)
    path = download_pretrained(details, f"model={source}")
    model = create_with_weights(architecture, Path(path), merge_preprocess_dict(asdict(PreprocessCfg()), details))
    return Source(model, name, tag)


def load_file(path: Path, architecture: str | None) -> Source:
    """Load a file of weights of open_clip's."""
    if path.suffix not in WEIGHTS:
        raise UserError(f"model={path}: neither a .ckpt of a run nor a file of weights ({', '.join(WEIGHTS)})")
    settings = read_params(path.resolve().parent.parent / "params.txt")
    name = architecture or settings.get("model")
    if name is None:
        raise UserError(
            f"model={path}: weights alone do not say of what model they are: set architecture=, as in ViT-B-32"
        )
    try:
        described = read_architecture(name=name)
    except ValueError as error:  # also of JSON
        reason = str(error).removeprefix(f"model.name={name}: ")
        raise UserError(f"model={path}: architecture={name}: {reason}") from error
    preprocess = merge_preprocess_dict(asdict(PreprocessCfg()), follow_params(described, settings))
    return Source(create_with_weights(described, path, preprocess), Path(name).stem, path.name)


def read_params(path: Path) -> dict[str, Any]:
    """Read what was said to open_clip's trainer: a line `name: value` for each argument in its params.txt."""
    if not path.is_file():
        return {}
    lines = (line.partition(": ") for line in path.read_text(encoding="utf-8", errors="replace").splitlines())
    return {name: read_literal(value) for name, colon, value in lines if colon and value != "None"}


def read_literal(text: str) -> Any:
    """Read a number, a list or the like as Python prints it; any other text stays as it is."""
    try:
        return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError):
        return text


def follow_params(architecture: dict[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Change a model's JSON as open_clip's trainer was told to, and return what it was told of pictures."""
    if settings.get("force_quick_gelu"):
        architecture["quick_gelu"] = True
    if settings.get("force_custom_text"):
        architecture["custom_text"] = True
    for name, part, key in (
        ("image_size", "vision_cfg", "image_size"),
        ("context_length", "text_cfg", "context_length"),
    ):
        if (value := settings.get(f"force_{name}")) is not None:
            architecture[part][key] = value
    told = {name: settings.get(f"image_{name}") for name in ("mean", "std", "interpolation", "resize_mode")}
    if told["interpolation"] == "random":  # in training only
        del told["interpolation"]
    return told


def create_with_weights(architecture: dict[str, Any], path: Path, preprocess: Mapping[str, Any]) -> Model:
    """Make a model and load a file of weights; one that has a bias of the logits makes a model with one."""
    if "logit_bias" in {name.removeprefix("module.") for name in list_names(path)}:
        architecture.setdefault("init_logit_bias", 0.0)
    model = create_from_architecture(architecture)
    set_preprocess(model, preprocess)
    load_weights(model, path, f"model={path} does not fit this model")
    return model


def list_names(path: Path) -> list[str]:
    """List the names of the weights in a file.

    Raises:
        UserError: it cannot be read.
    """
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return list(file.keys())
        return list(open_clip.factory.load_state_dict(str(path)))
    except (AttributeError, StopIteration) as error:
        raise UserError(f"model={path}: holds no weights by their names") from error
    except Exception as error:  # of pickle, zipfile, safetensors: damage has no common class
        raise UserError(f"model={path}: cannot be read as weights: {tell(error)}") from error


def check_tokenizer(model: Model, tokenize: Tokenize) -> None:
    """See that a model with a text tower knows every token of its tokenizer, and takes as many at a time.

    Raises:
        UserError: it does not.
    """
    tower = text_tower(model)
    if tower is None:
        return
    text = tokenize(["a photo of a cat"])
    if isinstance(tower, HFTextEncoder):
        known, length = tower.config.vocab_size, text.shape[1]
    else:
        known, length = tower.token_embedding.num_embeddings, len(tower.positional_embedding)
    largest = max(int(text.max()), getattr(tokenize, "end_token", 0))
    if largest >= known:
        raise UserError(
            f"the tokenizer has token {largest} and the model only {known}: text_cfg.vocab_size or "
            "text_cfg.hf_tokenizer_name of the model is not that of these weights"
        )
    if text.shape[1] > length:
        raise UserError(
            f"the tokenizer gives {text.shape[1]} tokens and the model takes {length}: text_cfg.context_length"
        )
