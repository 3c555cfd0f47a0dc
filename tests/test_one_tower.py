"""Runs of pictures alone and of captions alone: one tower, its weights, what can be judged, what is refused."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import QUICK, read_sample, write_tar
from forked import run_forked
from omegaconf import DictConfig
from test_model import make_model, write_json

from clipmini.data.tokenizer import ClipTokenizer
from clipmini.errors import UserError
from clipmini.model import Model, encode_image, encode_text, open_clip_config, padding
from clipmini.one_tower import named_towers, towers_of
from clipmini.sources import load_model
from clipmini.towers import decay_learning_rates
from clipmini.train import train

PICTURES = ("loss.terms.image_text=null", "loss.terms.image_image=1.0")
CAPTIONS = ("loss.terms.image_text=null", "loss.terms.text_text=1.0", "data.second_caption_key=name")
IMAGE = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
TEXT = ClipTokenizer(24)(["a dog", "a much longer caption about a cat on a mat", "!"])


def encode(model: Model, tower: str) -> torch.Tensor:
    return encode_image(model, IMAGE) if tower == "image" else encode_text(model, TEXT)


@torch.no_grad()
@pytest.mark.parametrize("custom_text", [False, True])
@pytest.mark.parametrize("tower", ["image", "text"])
def test_weights_go_from_two_towers_to_one_and_back(tower: str, custom_text: bool, tmp_path: Path) -> None:
    path = Path(write_json(tmp_path / "m.json"))
    path.write_text(json.dumps({**json.loads(path.read_text()), "custom_text": custom_text}))
    whole = make_model(str(path))
    torch.nn.init.normal_(whole.text_projection if not custom_text else whole.text.text_projection)
    one = make_model(str(path), start=whole, towers=tower)
    assert towers_of(one) == named_towers(one.state_dict()) == tower and towers_of(whole) == "both"
    assert named_towers(whole.state_dict()) == "both"
    assert (one.visual is None, one.text is None) == (tower == "text", tower == "image")
    assert padding(one) == (0 if tower == "text" else None)
    torch.testing.assert_close(encode(one, tower), encode(whole, tower), rtol=0, atol=0)
    other = make_model(str(path))
    with torch.no_grad():
        for value in other.parameters():
            value.add_(torch.randn_like(value))
    before = {name: value.clone() for name, value in make_model(str(path)).state_dict().items()}
    again = make_model(str(path), start=one)
    torch.testing.assert_close(encode(again, tower), encode(whole, tower), rtol=0, atol=0)
    others = [name for name in again.state_dict() if name.startswith("visual.") is (tower == "text")]
    kept = [name for name in others if not name.startswith("logit_")]
    assert kept and all(again.state_dict()[name].equal(before[name]) for name in kept)


def read_losses(run: Path) -> list[float]:
    with open(run / "metrics.csv", newline="") as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Two shards of pictures without captions, whose .json says of which of two kinds they are."""
    samples = read_sample("train/noto-00000.tar", 48)
    samples = [
        {"__key__": sample["__key__"], "webp": sample["webp"], "json": json.dumps({"kind": f"k{n % 2}"}).encode()}
        for n, sample in enumerate(samples)
    ]
    write_tar(tmp_path / "pictures/a.tar", samples[:32])
    write_tar(tmp_path / "pictures/b.tar", samples[32:])
    return tmp_path / "pictures"


def test_pictures_alone(pictures: Path, tiny_json: Path, tmp_path: Path) -> None:
    judge = f"evaluation.datasets=[{{path:{pictures}/b.tar,train:{pictures}/a.tar,label_key:kind,name:kinds}}]"
    options = [*QUICK, *PICTURES, "name=run", f"model.name={tiny_json}", f"data.train={pictures}", judge]
    options += ["evaluation.probes=[knn]", "evaluation.knn_k=5", "evaluation.at_start=true", "steps=3"]
    options += ["loss.head.layers=2", "loss.head.hidden_width=16", "loss.head.width=8"]
    losses = []
    for processes in (1, 2):
        (tmp_path / str(processes)).mkdir()
        result = run_forked(["train", *options], tmp_path / str(processes), processes=processes)
        assert result.returncode == 0, result.stderr
        assert "pictures only" in result.stdout and "Nearest neighbours" in result.stdout
        assert "Zero-shot" not in result.stdout
        losses.append(read_losses(tmp_path / f"{processes}/outputs/run"))
    assert losses[0] == pytest.approx(losses[1], abs=1e-5) and len(losses[0]) == 3
    run = tmp_path / "1/outputs/run"
    rows = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
    assert [(row["key"], row["step"]) for row in rows] == [("kinds/knn", 0), ("kinds/knn", 3)]
    for source in (run, run / "model", run / "checkpoints/step-00000003.ckpt"):
        model = load_model(str(source)).model
        assert towers_of(model) == "image" and not any(name.startswith(("text", "loss")) for name in model.state_dict())
    # It goes on, is judged again, and is what a run with both towers begins with.
    again = run_forked(["train", *options, "steps=4"], tmp_path / "1")
    assert again.returncode == 0 and "resuming from" in again.stdout, again.stderr
    sets = f"datasets=[{{path:{pictures}/b.tar,train:{pictures}/a.tar,label_key:kind,name:kinds}}]"
    judged = run_forked(["evaluate", f"model={run}", sets, "probes=[knn]", "knn_k=5", "cache=null"], tmp_path)
    assert judged.returncode == 0 and "Nearest neighbours" in judged.stdout, judged.stderr


def test_a_run_with_both_towers_begins_with_one(
    pictures: Path, shards: Path, compose: Callable[..., DictConfig], tmp_path: Path, tiny_json: Path
) -> None:
    first = [*QUICK, *PICTURES, f"model.name={tiny_json}", f"data.train={pictures}", f"paths.run={tmp_path / 'one'}"]
    train(compose(*first, "steps=2"))
    second = [*QUICK, "model.name=null", f"model.pretrained={tmp_path / 'one'}", f"data.train={shards}", "steps=1"]
    train(compose(*second, f"paths.run={tmp_path / 'two'}", "model.lock_image=true"))
    one, two = (load_model(str(tmp_path / name)).model for name in ("one", "two"))
    assert towers_of(two) == "both"
    assert all(value.equal(two.state_dict()[name]) for name, value in one.visual.state_dict(prefix="visual.").items())


def test_captions_alone(shards: Path, tiny_json: Path, tmp_path: Path) -> None:
    samples = read_sample("train/fluent-00000.tar", 20)
    held_out = write_tar(
        tmp_path / "v.tar", [{name: sample[name] for name in ("__key__", "txt", "json")} for sample in samples]
    )
    options = [*QUICK, *CAPTIONS, "name=run", f"model.name={tiny_json}", f"data.train={shards}", f"data.val={held_out}"]
    losses = []
    for processes in (1, 2):
        (tmp_path / str(processes)).mkdir()
        given = ["train", *options, "evaluation.at_start=true"]
        result = run_forked(given, tmp_path / str(processes), processes=processes)
        assert result.returncode == 0, result.stderr
        assert "captions only" in result.stdout and result.stdout.count("val/loss") == 2
        losses.append(read_losses(tmp_path / f"{processes}/outputs/run"))
    assert losses[0] == pytest.approx(losses[1], abs=1e-5) and losses[0][-1] < losses[0][0]
    model = load_model(str(tmp_path / "1/outputs/run")).model
    assert towers_of(model) == "text" and model.visual is None
    assert "mean" in open_clip_config(model)["preprocess_cfg"]


def write_bert(directory: Path, dropout: float) -> str:
    """Write the config of a small BERT; return what makes it the text tower."""
    config = transformers.BertConfig(
        vocab_size=49408,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=0.0,
    )
    config.save_pretrained(directory)
    return f"model.text_cfg={{hf_model_name:{directory},hf_pooler_type:mean_pooler}}"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            [*PICTURES, "model.lock_text=true"],
            "model.lock_text=true needs the text tower, and the model has",
        ),
        ([*PICTURES, "model.lock_image=true"], "model.lock_image=true leave nothing to train but the scale"),
        ([*PICTURES, "layer_decay.text=0.5"], "layer_decay.text=0.5 needs the text tower"),
        (
            [*PICTURES, "data.train=SHARDS/a.tar", "data.val=SHARDS/b.tar"],
            "data.val: no term of loss.terms makes captions like",
        ),
        ([*PICTURES, "evaluation.datasets=[CLASSES]"], "the set seven.*, without probes=.knn. .*needs the text tower"),
        ([*CAPTIONS, "evaluation.datasets=[CLASSES]"], "the set .* needs the image tower, and the model has only"),
        ([*CAPTIONS, "data.second_caption_key=same"], "data.second_caption_key=same: the text tower has no dropout"),
        (
            [*CAPTIONS, "data.second_caption_key=same", "DRY_BERT"],
            "data.second_caption_key=same: the text tower has no",
        ),
    ],
)
def test_what_a_run_cannot_have_is_told(
    overrides: list[str],
    message: str,
    compose: Callable[..., DictConfig],
    classification_set: Path,
    shards: Path,
    tiny_json: Path,
    tmp_path: Path,
) -> None:
    places = {"SHARDS": shards, "CLASSES": classification_set, "DRY_BERT": write_bert(tmp_path / "bert", 0.0)}
    given = [f"model.name={tiny_json}", f"data.train={shards}", f"paths.run={tmp_path / 'run'}", *overrides]
    for name, place in places.items():
        given = [override.replace(name, str(place)) for override in given]
    with pytest.raises(UserError, match=message):
        train(compose(*QUICK, *given))


def test_two_passes_of_a_caption_differ_by_dropout(
    compose: Callable[..., DictConfig], shards: Path, tiny_json: Path, tmp_path: Path
) -> None:
    given = [*QUICK, *CAPTIONS, "data.second_caption_key=same", write_bert(tmp_path / "bert", 0.3), "steps=2"]
    train(compose(*given, f"model.name={tiny_json}", f"data.train={shards}", f"paths.run={tmp_path / 'run'}"))
    losses = read_losses(tmp_path / "run")
    assert len(losses) == 2 and all(0.01 < loss for loss in losses)  # equal ones would be found at once


def test_layers_learn_slower_in_one_tower(tiny_json: Path) -> None:
    model = make_model(str(tiny_json), towers="text")
    shares: dict[str, Any] = decay_learning_rates(model, {"image": 1.0, "text": 0.5})
    assert shares and all(name.startswith("text.") for name in shares)
