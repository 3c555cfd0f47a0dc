"""The README.md of an export: a model card as the Hugging Face Hub reads it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from clipmini.annotations import flatten
from clipmini.checkpoints.resume import IDENTITY
from clipmini.redaction import redact, redact_command

TASK = "zero-shot-image-classification"
LIBRARIES = {"open_clip": "open_clip", "hf": "transformers", "onnx": "onnx"}
# What of a config decides the result, in the order of the card; a name stands for all below it.
RECIPE = ("steps", "epochs", *IDENTITY, "schedule", "trainer.precision")
LOADING = {
    "open_clip": """import open_clip

model, _, preprocess = open_clip.create_model_and_transforms("local-dir:path/to/this/directory")
tokenizer = open_clip.get_tokenizer("local-dir:path/to/this/directory")
""",
    "hf": """from transformers import CLIPModel, CLIPProcessor

model = CLIPModel.from_pretrained("path/to/this/directory")
processor = CLIPProcessor.from_pretrained("path/to/this/directory")
inputs = processor(text=captions, images=pictures, padding=True, truncation=True, return_tensors="pt")
""",
    "onnx": """import onnxruntime

# `clipmini_onnx.json` says how pictures and captions become `image` and `text`.
image_tower = onnxruntime.InferenceSession("image.onnx")
(image_features,) = image_tower.run(None, {"image": image})  # float32 [batch, 3, size, size]
text_tower = onnxruntime.InferenceSession("text.onnx")
(text_features,) = text_tower.run(None, {"text": text})  # int64 [batch, context]
similarity = logit_scale * image_features @ text_features.T + (logit_bias or 0)
""",
}
REMARKS = {
    "hf": "transformers does not repair text as open_clip does (ftfy, `html.unescape`): captions with typographic "
    "quotes, ligatures or HTML entities get other tokens. Its default image processor resizes tensors, not Pillow "
    "images: pixels may differ by a level or two of 255.",
}


@dataclass(frozen=True)
class Subject:
    """What a card is about.

    Attributes:
        name: of the model.
        format: of the export: open_clip, hf or onnx.
        architecture: open_clip's model JSON.
        image_size: pixels.
    """

    name: str
    format: str
    architecture: Mapping[str, Any]
    num_parameters: int
    image_size: int


def make_card(
    subject: Subject,
    *,
    config: Mapping[str, Any] | None,
    results: Sequence[Mapping[str, Any]],
    command: str,
    step: int | None,
    license: str | None,
) -> str:
    """Return the text of a card, without anything that looks like a secret.

    Args:
        config: of the run that trained the model, as plain data; None if that is not known.
        results: rows of results.jsonl.
        command: that makes the export.
        step: of the weights; None if that is not known.
        license: an identifier of the Hub's; None says nothing.
    """
    config = None if config is None else redact(config)
    parts = [
        f"---\n{to_yaml(front_matter(subject, results, license))}---\n",
        f"# {subject.name}\n",
        describe_model(subject),
        f"## How to load it\n\n```python\n{LOADING[subject.format]}```\n",
        f"{REMARKS[subject.format]}\n" if subject.format in REMARKS else "",
        describe_data(config, step),
        describe_recipe(config),
        describe_metrics(results),
        describe_command(config, command),
    ]
    return "\n".join(part for part in parts if part)


def to_yaml(content: Any) -> str:
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=1000)


def front_matter(subject: Subject, results: Sequence[Mapping[str, Any]], license: str | None) -> dict[str, Any]:
    """Return what the Hub reads; controls with shuffled pairs are no results of the model."""
    content: dict[str, Any] = {
        "library_name": LIBRARIES[subject.format],
        "pipeline_tag": TASK,
        "tags": ["clip", TASK, "clipmini"],
    }
    if license:
        content["license"] = license
    entries = [
        {
            "task": {"type": row_task(row)},
            "dataset": {"name": row_name(row), "type": row_name(row)},
            "metrics": [{"type": name, "value": value} for name, value in metrics_of(row)],
        }
        for row in results
        if not row.get("shuffled") and any(metrics_of(row))
    ]
    if entries:
        content["model-index"] = [{"name": subject.name, "results": entries}]
    return content


def row_name(row: Mapping[str, Any]) -> str:
    return str(row.get("dataset") or row.get("key"))


def row_task(row: Mapping[str, Any]) -> str:
    return str(row.get("task", TASK)).replace("_", "-")


def metrics_of(row: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield names and values of a row's metrics; main_metric only repeats one of them."""
    for name, value in row.get("metrics", {}).items():
        if name != "main_metric" and isinstance(value, int | float):
            yield name, value


def describe_model(subject: Subject) -> str:
    """Say what it is."""
    vision, text = subject.architecture["vision_cfg"], subject.architecture["text_cfg"]
    image = vision.get("timm_model_name") or f"{vision.get('layers', 12)} layers of width {vision.get('width', 768)}"
    words = text.get("hf_model_name") or f"{text.get('layers', 12)} layers of width {text.get('width', 512)}"
    rows = [
        ("parameters", f"{subject.num_parameters:,}"),
        ("pictures", f"{subject.image_size} x {subject.image_size} pixels"),
        ("image tower", str(image)),
        ("text tower", f"{words}, {text.get('context_length', 77)} tokens"),
        ("embedding width", str(subject.architecture["embed_dim"])),
    ]
    intro = "A CLIP-style image-text model: pictures and captions that belong together get similar vectors.\n"
    return f"{intro}\n{to_table(('', ''), rows)}"


def describe_data(config: Mapping[str, Any] | None, step: int | None) -> str:
    """Say what it was trained on, and how much of that it has seen."""
    if config is None:
        return "## Data\n\nNot known.\n"
    train = (config.get("data") or {}).get("train")
    sources = train if isinstance(train, Mapping) else {"train": {"shards": train}}
    rows = []
    for name, source in sources.items():
        entry = source if isinstance(source, Mapping) else {"shards": source}
        shards = entry.get("shards")
        weight = entry.get("weight")
        texts = shards if isinstance(shards, list) else [shards]
        rows.append((str(name), ", ".join(f"`{text}`" for text in texts), "by its size" if weight is None else weight))
    return f"## Data\n\n{to_table(('source', 'shards', 'weight'), rows)}\n{samples_seen(config, step)}\n"


def samples_seen(config: Mapping[str, Any], step: int | None) -> str:
    """Say how much data was seen: by the step of the weights, else by what the run was to do."""
    numbers = (config.get("batch_size"), config.get("steps"))
    batch, planned = (value if isinstance(value, int) else None for value in numbers)  # or the name of a variable
    if batch and step is not None:
        return f"Samples seen: {step * batch:,} ({step:,} steps of {batch:,})."
    if batch and planned:
        return f"The run was to see {planned * batch:,} samples ({planned:,} steps of {batch:,})."
    return f"The run was to last {config.get('epochs')} epochs."


def describe_recipe(config: Mapping[str, Any] | None) -> str:
    """List the hyper-parameters that decide the result."""
    if config is None:
        return ""
    flat = flatten(config)
    rows = [
        (f"`{key}`", f"`{value}`")
        for name in RECIPE
        for key, value in flat.items()
        if value is not None and f"{key}.".startswith(f"{name}.") and not key.endswith("._partial_")
    ]
    return f"## Recipe\n\n{to_table(('key', 'value'), rows)}"


def describe_metrics(results: Sequence[Mapping[str, Any]]) -> str:
    """List every metric of every row."""
    rows = []
    for row in results:
        name = f"{row_name(row)}{', pairs shuffled as a control' if row.get('shuffled') else ''}"
        size = (row.get("classes", "-"), row.get("images", "-"))
        for metric, value in metrics_of(row):
            low, high = (row.get("interval") or {}).get(metric) or (None, None)
            interval = "-" if low is None or high is None else f"{low:.4g} to {high:.4g}"
            chance = (row.get("chance") or {}).get(metric)
            figures = (f"{value:.4g}", interval, "-" if chance is None else f"{chance:.4g}")
            rows.append((name, row_task(row), metric, *figures, *size))
    if not rows:
        return "## Metrics\n\nNone were measured.\n"
    columns = ("data set", "task", "metric", "value", "95 % interval", "chance", "classes", "pictures")
    return f"## Metrics\n\n{to_table(columns, rows)}"


def describe_command(config: Mapping[str, Any] | None, command: str) -> str:
    """Give the command of the export, and the whole config of the run: its own command is not kept anywhere."""
    text = f"## Command\n\nThis directory was written by\n\n```bash\n{redact_command(command)}\n```\n"
    if config is None:
        return text
    return (
        f"{text}\nThe model was trained by `clipmini train` with this config; what may be a secret is left out.\n\n"
        f"<details><summary>config.yaml</summary>\n\n```yaml\n{to_yaml(config)}```\n\n</details>\n"
    )


def to_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)
