"""A card is read by the Hub, holds what is known of the model, and no secrets."""

from typing import Any

import pytest
import yaml

from clipmini.export.card import Subject, make_card
from clipmini.redaction import REDACTED, is_secret, redact, redact_command

CONFIG = {
    "name": "mine",
    "batch_size": 512,
    "steps": None,
    "epochs": 30,
    "data": {
        "train": {
            "cc3m": {"shards": "s3://bucket/cc3m/{000..331}.tar", "weight": 2},
            "web": {"shards": ["https://me:hunter2@host/a.tar?sig=abcdef&x=1", "pipe:curl -H 'X: s3cr3t' host"]},
        },
        "caption_key": "title|alt",
        "cache": {"directory": "/tmp/cache", "storage_options": {"s3": {"key": "AKIA", "secret": "wJalr"}}},
        "augmentation": {"_target_": "clipmini.data.augment.Augmentation", "flip": 0.5},
    },
    "loss": {"kind": "infonce", "init_bias": None},
    "optimizer": {"_target_": "torch.optim.AdamW", "_partial_": True, "lr": 0.001},
    "trainer": {"precision": "bf16-mixed", "devices": "auto"},
    "logger": {"wandb": {"project": "clip", "api_key": "local-0123"}},
}
ROW = {
    "key": "vtab/cifar10",
    "dataset": "cifar10",
    "task": "zeroshot_classification",
    "metrics": {"acc1": 0.41234, "acc5": None, "main_metric": 0.41234},
    "interval": {"acc1": [0.401, 0.42], "acc5": [None, None]},
    "chance": {"acc1": 0.1, "acc5": None},
    "classes": 10,
    "images": 10000,
    "step": 1000,
}
ARCHITECTURE = {
    "embed_dim": 128,
    "vision_cfg": {"timm_model_name": "convnext_tiny"},
    "text_cfg": {"layers": 3, "width": 64, "context_length": 32},
}


def write_card(**changes: Any) -> str:
    subject = Subject("mine", changes.pop("format", "open_clip"), ARCHITECTURE, 1234567, 224)
    options = {"config": CONFIG, "results": [ROW], "command": "clipmini export model=mine"}
    return make_card(subject, **{**options, "step": 1000, "license": None, **changes})


def read_front_matter(card: str) -> dict[str, Any]:
    empty, front, _ = card.split("---\n", 2)
    assert empty == ""
    return yaml.safe_load(front)


def test_front_matter() -> None:
    front = read_front_matter(write_card(license="apache-2.0"))
    assert front["library_name"] == "open_clip" and front["license"] == "apache-2.0"
    assert front["pipeline_tag"] == "zero-shot-image-classification" and "clip" in front["tags"]
    (entry,) = front["model-index"][0]["results"]
    assert entry["metrics"] == [{"type": "acc1", "value": 0.41234}]
    assert entry["dataset"]["name"] == "cifar10"
    assert "license" not in read_front_matter(write_card())
    assert "model-index" not in read_front_matter(write_card(results=[]))
    assert read_front_matter(write_card(format="hf"))["library_name"] == "transformers"


def test_sections() -> None:
    card = write_card()
    assert "| parameters | 1,234,567 |" in card and "| image tower | convnext_tiny |" in card
    assert "| text tower | 3 layers of width 64, 32 tokens |" in card
    assert "| cc3m | `s3://bucket/cc3m/{000..331}.tar` | 2 |" in card
    assert "Samples seen: 512,000 (1,000 steps of 512)." in card
    assert "| `optimizer.lr` | `0.001` |" in card and "| `data.augmentation.flip` | `0.5` |" in card
    assert "init_bias` |" not in card and "_partial_` |" not in card
    assert r"| `data.caption_key` | `title\|alt` |" in card
    row = "| cifar10 | zeroshot-classification | acc1 | 0.4123 | 0.401 to 0.42 | 0.1 | 10 | 10000 |"
    assert row in card and "acc5" not in card and "main_metric" not in card
    assert "clipmini export model=mine" in card
    assert "open_clip.create_model_and_transforms" in card
    assert "CLIPProcessor.from_pretrained" in write_card(format="hf")
    assert "onnxruntime" in write_card(format="onnx")


def test_the_config_can_be_read_back() -> None:
    block = write_card().split("```yaml\n")[1].split("```")[0]
    assert yaml.safe_load(block) == redact(CONFIG)
    assert yaml.safe_load(block)["data"]["caption_key"] == "title|alt"


def test_nothing_is_made_up() -> None:
    card = write_card(config=None, results=[])
    assert "## Data\n\nNot known." in card and "None were measured." in card and "config.yaml" not in card
    assert "The run was to last 30 epochs." in write_card(step=None)
    unresolved = {**CONFIG, "batch_size": "${oc.decode:${oc.env:BATCH}}"}
    assert "Samples seen" not in write_card(config=unresolved) and "The run was to" in write_card(config=unresolved)
    assert "The run was to see 5,120 samples" in write_card(step=None, config={**CONFIG, "steps": 10})


def test_controls_are_no_results() -> None:
    card = write_card(results=[{**ROW, "shuffled": True}])
    assert "model-index" not in read_front_matter(card)
    assert "| cifar10, pairs shuffled as a control |" in card


def test_no_secrets() -> None:
    card = write_card(command="clipmini export model=mine data.cache.storage_options={s3:{key:AKIA,secret:wJalr}}")
    for secret in ("hunter2", "abcdef", "s3cr3t", "AKIA", "wJalr", "local-0123"):
        assert secret not in card
    assert REDACTED in card and "https://REDACTED@host/a.tar?REDACTED" in card


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        *(
            (name, True)
            for name in ("token", "hf_token", "api_key", "accessKeyId", "SECRET", "password", "storage_options")
        ),
        *((name, False) for name in ("caption_key", "hf_tokenizer_name", "keep_last", "monkey", "tokens", "author")),
    ],
)
def test_names_of_secrets(name: str, expected: bool) -> None:
    assert is_secret(name) == expected


def test_redaction_keeps_the_rest() -> None:
    kept = {"a": [1, None, {"b": True}], "shards": "s3://b/000?.tar", "token": None, "lr": 1e-3}
    assert redact(kept) == kept
    assert redact({"token": {"x": 1}, "list": [{"secret": "s"}]}) == {"token": REDACTED, "list": [{"secret": REDACTED}]}


def test_commands() -> None:
    assert redact_command("clipmini export model=a 'data.train=s3://b/{0..9}.tar'") == (
        "clipmini export model=a 'data.train=s3://b/{0..9}.tar'"
    )
    assert redact_command("x logger.api_key=abc out=https://u:p@h/a") == (
        f"x logger.api_key={REDACTED} out=https://{REDACTED}@h/a"
    )
    assert "abc" not in redact_command("x 'cache={storage_options:{key: abc}}' it's")
