"""A trained model is loaded from wherever it lies with the same features to the last bit, or not at all."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import transformers
from conftest import QUICK, TINY, save_checkpoint
from omegaconf import DictConfig
from safetensors.torch import save_file
from test_model import write_json
from torch import Tensor

from clipmini import sources
from clipmini.checkpoints import disk
from clipmini.data.tokenizer import ClipTokenizer
from clipmini.errors import UserError
from clipmini.export.open_clip_directory import export_open_clip
from clipmini.model import Model, create_model, encode_image, encode_text, open_clip_config
from clipmini.sources import check_tokenizer, load_model
from clipmini.train import train

HALF = [0.5, 0.5, 0.5]


def make(name: Path | str, *, seed: int = 1, **options: Any) -> Model:
    torch.manual_seed(seed)
    return create_model(name=str(name), **{"init_scale": 14.0, "init_bias": None, **options}).eval()


@pytest.fixture(scope="module")
def model(tiny_json: Path) -> Model:
    return make(tiny_json)


@torch.no_grad()
def check_same(found: Model, expected: Model) -> None:
    """See that a model is ready to be judged and has the features of another, to the last bit."""
    assert not any(module.training for module in found.modules())
    size, length = expected.visual.image_size[0], expected.architecture["text_cfg"]["context_length"]
    random = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, 3, size, size), dtype=torch.uint8, generator=random)
    text = torch.zeros(2, length, dtype=torch.long)
    text[0, :4], text[1, :7] = torch.tensor([49406, 320, 1929, 49407]), torch.tensor([49406, *range(5), 49407])
    assert torch.equal(encode_image(found, image), encode_image(expected, image))
    assert torch.equal(encode_text(found, text), encode_text(expected, text))
    assert torch.equal(found.logit_scale, expected.logit_scale)


def save(model: Model, path: Path, step: int = 3, **changes: Any) -> Path:
    """Write a checkpoint as a run does."""
    content = {
        "state_dict": {f"model.{name}": value for name, value in model.state_dict().items()},
        "open_clip_config": open_clip_config(model),
        "global_step": step,
        "hyper_parameters": {"seed": 7},
        **changes,
    }
    return save_checkpoint(content, path)


def save_weights(weights: Mapping[str, Tensor], path: Path) -> Path:
    """Write weights in the format of the file's extension."""
    if path.suffix == ".safetensors":
        save_file({name: value.contiguous() for name, value in weights.items()}, path)
    else:
        torch.save(dict(weights), path)
    return path


def write_trained(path: Path, model: Model, *lines: str) -> Path:
    """Write weights as open_clip's trainer does after an epoch, from DDP, and what it was told."""
    (path / "checkpoints").mkdir(parents=True)
    (path / "params.txt").write_text("\n".join(["accum_freq: 1", *lines, "train_data: {00..10}.tar"]))
    weights = {f"module.{name}": value for name, value in model.state_dict().items()}
    file = path / "checkpoints/epoch_1.pt"
    torch.save({"epoch": 1, "name": path.name, "state_dict": weights, "optimizer": {"state": {}}}, file)
    return file


# Runs of clipmini


def test_a_run_is_its_newest_checkpoint(model: Model, tiny_json: Path, tmp_path: Path) -> None:
    save(make(tiny_json, seed=2), tmp_path / "run/checkpoints/step-00000009.ckpt", step=9)
    newest = save(model, tmp_path / "run/checkpoints/step-00000012.ckpt", step=12)
    save(make(tiny_json, seed=3), tmp_path / "run/checkpoints/best.ckpt", step=9)
    export_open_clip(make(tiny_json, seed=4), tmp_path / "run/model")
    for path in (tmp_path / "run", newest):
        found = load_model(str(path))
        check_same(found.model, model)
        assert (found.name, found.weights, found.step, found.run) == ("run", "step 12", 12, tmp_path / "run")
        assert found.config == {"seed": 7}
    assert load_model(str(tmp_path / "run/checkpoints/best.ckpt")).step == 9


def test_a_checkpoint_of_a_run_is_read_for_its_hash_once(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(model, tmp_path / "run/checkpoints/step-00000003.ckpt")
    hashed, hash_file = [], disk.hash_file

    def count(file: Path) -> str:
        hashed.append(file)
        return hash_file(file)

    monkeypatch.setattr(disk, "hash_file", count)
    load_model(str(tmp_path / "run"))
    assert hashed == [path / "rank-00000.pt"]
    load_model(str(path))
    assert hashed == [path / "rank-00000.pt"] * 2


def test_a_checkpoint_outside_a_run_has_no_run(model: Model, tmp_path: Path) -> None:
    found = load_model(str(save(model, tmp_path / "mine.ckpt", hyper_parameters=None)))
    check_same(found.model, model)
    assert (found.name, found.step, found.run, found.config) == ("mine", 3, None, None)


def test_preprocessing_comes_with_a_checkpoint(model: Model, tmp_path: Path) -> None:
    config = open_clip_config(model)
    config["preprocess_cfg"] = {**config["preprocess_cfg"], "mean": HALF, "resize_mode": "squash"}
    found = load_model(str(save(model, tmp_path / "mine.ckpt", open_clip_config=config))).model
    assert found.visual.preprocess_cfg["resize_mode"] == "squash" and found.visual.preprocess_cfg["mean"] == HALF
    assert found.visual.pixel_mean.ravel().tolist() == [127.5] * 3


def test_a_real_run(compose: Callable[..., DictConfig], tiny_json: Path, shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "mine"
    train(compose(*QUICK, "steps=2", f"model.name={tiny_json}", f"data.train={shards}", f"paths.run={run}"))
    found = load_model(str(run))
    assert (found.name, found.weights, found.step, found.run) == ("mine", "step 2", 2, run)
    assert found.config is not None and found.config["model"]["name"] == str(tiny_json)
    exported = load_model(f"{run}/model")
    check_same(found.model, exported.model)
    assert (exported.name, exported.weights, exported.step, exported.run) == ("mine", "model", None, run)
    assert exported.config is not None and exported.config["batch_size"] == 16
    shutil.rmtree(run / "checkpoints")
    check_same(load_model(str(run)).model, exported.model)
    assert found.tokenizer()(["a dog"]).shape == (1, 24)


# open_clip's directories, tags and files


@pytest.mark.parametrize("prefix", ["", "local-dir:"])
def test_an_open_clip_directory(prefix: str, model: Model, tmp_path: Path) -> None:
    export_open_clip(model, tmp_path / "published")
    found = load_model(f"{prefix}{tmp_path / 'published'}")
    check_same(found.model, model)
    assert (found.name, found.weights) == ("published", "open_clip_model.safetensors")
    assert (found.step, found.run, found.config) == (None, None, None)


def test_an_open_clip_directory_of_another_hand(model: Model, tmp_path: Path) -> None:
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": TINY, "preprocess_cfg": {"std": HALF}}))
    torch.save(model.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    found = load_model(str(tmp_path)).model
    assert found.visual.preprocess_cfg["std"] == HALF and found.visual.preprocess_cfg["interpolation"] == "bicubic"
    assert torch.equal(found.text_projection, model.text_projection)


@pytest.mark.parametrize(
    ("of_model", "of_tag", "expected"),
    [
        (None, True, True),
        (True, True, True),
        (None, None, None),
        (True, None, True),  # as open_clip has roberta-ViT-B-32/laion2b_s12b_b32k
        (True, False, False),
    ],
)
def test_quick_gelu_and_preprocessing_follow_the_tag(
    of_model: bool | None,
    of_tag: bool | None,
    expected: bool | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def write(quick_gelu: bool | None) -> dict[str, Any]:
        return TINY if quick_gelu is None else {**TINY, "quick_gelu": quick_gelu}

    (tmp_path / "expected.json").write_text(json.dumps(write(expected)))
    model = make(tmp_path / "expected.json")
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    details = {"url": "nowhere", "mean": (0.5, 0.5, 0.5), "interpolation": "bilinear", "quick_gelu": of_tag}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-1", write(of_model))
    monkeypatch.setitem(
        open_clip.pretrained._PRETRAINED,
        "tiny-1",
        {"best": {name: value for name, value in details.items() if value is not None}},
    )
    monkeypatch.setattr(sources, "download_pretrained", lambda tag, at: str(tmp_path / "weights.pt"))
    with caplog.at_level("INFO", "clipmini"):
        found = load_model("tiny-1/best")
    assert ("as its weights were trained" in caplog.text) == (bool(of_model) != bool(expected))
    assert (found.name, found.weights) == ("tiny-1", "best")
    assert found.model.visual.preprocess_cfg["interpolation"] == "bilinear"
    assert found.model.visual.pixel_mean.ravel().tolist() == [127.5] * 3
    model.visual.pixel_mean.copy_(found.model.visual.pixel_mean)
    check_same(found.model, model)


@pytest.mark.parametrize("extension", ["pt", "pth", "bin", "safetensors"])
def test_a_file_of_weights(extension: str, model: Model, tiny_json: Path, tmp_path: Path) -> None:
    path = save_weights(model.state_dict(), tmp_path / f"weights.{extension}")
    found = load_model(str(path), architecture=str(tiny_json))
    check_same(found.model, model)
    assert (found.name, found.weights, found.run) == ("tiny", f"weights.{extension}", None)


def test_an_architecture_by_name(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-1", TINY)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    found = load_model(str(tmp_path / "weights.pt"), architecture="tiny-1")
    check_same(found.model, model)
    assert found.name == "tiny-1"


@pytest.mark.parametrize("extension", ["pt", "safetensors"])
def test_weights_with_a_bias_make_a_model_with_one(extension: str, tiny_json: Path, tmp_path: Path) -> None:
    model = make(tiny_json, init_bias=-10.0)
    weights = {f"module.{name}": value for name, value in model.state_dict().items()}
    path = save_weights(weights, tmp_path / f"siglip.{extension}")
    found = load_model(str(path), architecture=str(tiny_json)).model
    check_same(found, model)
    assert found.logit_bias.item() == -10.0


def test_a_file_of_open_clips_trainer(model: Model, tiny_json: Path, tmp_path: Path) -> None:
    path = write_trained(tmp_path / "logs/mine", model, f"model: {tiny_json}", "force_image_size: None")
    found = load_model(str(path))
    check_same(found.model, model)
    assert (found.name, found.weights) == ("tiny", "epoch_1.pt")


def test_what_open_clips_trainer_was_told_is_followed(tiny_json: Path, tmp_path: Path) -> None:
    config = {**TINY, "quick_gelu": True, "custom_text": True, "text_cfg": {**TINY["text_cfg"], "context_length": 16}}
    (tmp_path / "told.json").write_text(json.dumps(config))
    model = make(tmp_path / "told.json", image_size=48)
    path = write_trained(
        tmp_path / "logs/mine",
        model,
        f"model: {tiny_json}",
        "force_quick_gelu: True",
        "force_custom_text: True",
        "force_image_size: 48",
        "force_context_length: 16",
        "image_mean: [0.5, 0.5, 0.5]",
        "image_std: None",
        "image_interpolation: random",
        "image_resize_mode: squash",
    )
    found = load_model(str(path)).model
    preprocess = found.visual.preprocess_cfg
    assert preprocess["mean"] == HALF and preprocess["std"] == model.visual.preprocess_cfg["std"]
    assert preprocess["resize_mode"] == "squash" and preprocess["interpolation"] == "bicubic"
    model.visual.pixel_mean.copy_(found.visual.pixel_mean)
    check_same(found, model)


def test_the_architecture_that_is_said_wins_over_params(model: Model, tiny_json: Path, tmp_path: Path) -> None:
    path = write_trained(tmp_path / "logs/mine", model, "model: ViT-B-32")
    check_same(load_model(str(path), architecture=str(tiny_json)).model, model)


# Tokenizers


def test_the_tokenizer_is_the_models(model: Model, tmp_path: Path) -> None:
    export_open_clip(model, tmp_path / "published")
    assert load_model(str(tmp_path / "published")).tokenizer()(["a dog"]).tolist()[0][:4] == [49406, 320, 1929, 49407]


def test_a_vocabulary_that_is_too_small_is_refused(tmp_path: Path) -> None:
    export_open_clip(make(write_json(tmp_path / "m.json", text_cfg={"vocab_size": 49407})), tmp_path / "published")
    source = load_model(str(tmp_path / "published"))
    with pytest.raises(UserError, match="the tokenizer has token 49407 and the model only 49407: text_cfg.vocab_size"):
        source.tokenizer()


def test_a_context_that_is_too_long_is_refused(model: Model) -> None:
    check_tokenizer(model, ClipTokenizer(24))
    with pytest.raises(
        UserError, match="the tokenizer gives 25 tokens and the model takes 24: text_cfg.context_length"
    ):
        check_tokenizer(model, ClipTokenizer(25))


@pytest.mark.parametrize("vocab_size", [7, 8])
def test_a_vocabulary_of_hugging_faces_that_is_too_small_is_refused(
    vocab_size: int, tiny_json: Path, tmp_path: Path
) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    transformers.BertConfig(vocab_size=vocab_size, **sizes).save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "photo", "cat"]))
    transformers.BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    text_cfg = {"hf_model_name": str(tmp_path), "hf_tokenizer_name": str(tmp_path), "hf_pooler_type": "mean_pooler"}
    export_open_clip(make(tiny_json, text_cfg=text_cfg), tmp_path / "published")
    source = load_model(str(tmp_path / "published"))
    if vocab_size == 8:
        assert int(source.tokenizer()(["a cat"]).max()) == 7
        return
    with pytest.raises(UserError, match="the tokenizer has token 7 and the model only 7: .*text_cfg.hf_tokenizer_name"):
        source.tokenizer()
