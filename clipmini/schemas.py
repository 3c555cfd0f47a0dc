"""The keys of each command and their types; a key that is not here, or a value of another type, is refused."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from clipmini.annotations import LONGEST, Limits


def limited(**limits: float) -> Any:
    """Make a field that must be given, whose numbers have `Limits`; where an object has some itself, none are here."""
    return field(default=MISSING, metadata={"limits": Limits(**limits)})


@dataclass
class CheckpointConfig:
    """When checkpoints are written and how many stay."""

    every_n_steps: int = MISSING
    every_n_minutes: float | None = MISSING
    every_n_samples: int | None = MISSING
    keep_last: int = MISSING
    keep_every_n_steps: int | None = MISSING
    background: bool = MISSING
    retries: int = limited(least=0)
    retry_seconds: float = limited(least=0, most=LONGEST)
    max_failures: int = MISSING
    parts_timeout: float = limited(above=0, most=LONGEST)


@dataclass
class PreemptionConfig:
    """How signals stop a run."""

    check_every_seconds: float = limited(least=0, most=LONGEST)
    requeue: bool = MISSING


@dataclass
class TimeoutsConfig:
    """How long the processes of a run wait for one another, in seconds."""

    start: float = limited(above=0, most=LONGEST)
    step: float = limited(above=0, most=LONGEST)
    stacks: float = limited(above=0, most=LONGEST)


@dataclass
class BadStepsConfig:
    """When a step changes nothing, and how many of those a run may have."""

    max_in_a_row: int = MISSING
    skip_spikes: bool = MISSING
    window: int = limited(least=2)
    sigmas: float = limited(above=0)


@dataclass
class LoraConfig:
    """Low-rank changes of a trained model's weights."""

    rank: int = MISSING
    alpha: float = MISSING
    image: list[str] | None = MISSING
    text: list[str] | None = MISSING


@dataclass
class StageConfig:
    """A stage of the curriculum."""

    until: float = MISSING
    image_size: int | None = None
    patch_dropout: float | None = None


@dataclass
class LayerDecayConfig:
    """How much slower the early layers of each tower learn."""

    image: float = MISSING
    text: float = MISSING


@dataclass
class AverageConfig:
    """The average of the weights over the steps."""

    decay: float | None = MISSING
    warmup: bool = MISSING


@dataclass
class EvaluationConfig:
    """What a model is judged by while it trains, and at the end."""

    datasets: list[Any] = field(default_factory=list)
    batch_size: int = limited(least=1)
    precision: str = MISSING
    probes: list[str] = MISSING
    probe_features: str = MISSING
    knn_k: int = limited(least=1)
    knn_temperature: float = limited(above=0)
    l2: float | None = limited(least=0)
    bootstrap_resamples: int = limited(least=0)
    at_start: bool = MISSING
    every_n_steps: int | None = limited(least=1)
    best_metric: str | None = MISSING
    weights: str = MISSING


@dataclass
class PathsConfig:
    """Where things lie; `run` is the directory of this run, `cache` one of this node."""

    sample: str = MISSING
    output: str = MISSING
    run: str = MISSING
    cache: str = MISSING


@dataclass
class TrainConfig:
    """The keys of `clipmini train`; a group typed `dict` is checked against the signature of its `_target_`."""

    name: str = MISSING
    seed: int = limited(least=0, most=2**32 - 1)
    batch_size: int = limited(least=1)
    micro_batch: int | None = MISSING
    epochs: float | None = limited(above=0)
    steps: int | None = MISSING
    image_size: int | None = limited(least=1)
    curriculum: list[StageConfig] | None = MISSING
    teacher: str | None = MISSING
    compile: bool = MISSING
    profile: bool = MISSING
    allow_targets: list[str] = field(default_factory=list)
    data: dict[str, Any] = MISSING
    model: dict[str, Any] = MISSING
    loss: dict[str, Any] = MISSING
    optimizer: dict[str, Any] = MISSING
    schedule: dict[str, Any] = MISSING
    trainer: dict[str, Any] = MISSING
    callbacks: dict[str, Any] = MISSING
    logger: dict[str, Any] = MISSING
    layer_decay: LayerDecayConfig = field(default_factory=LayerDecayConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    bad_steps: BadStepsConfig = field(default_factory=BadStepsConfig)
    ema: AverageConfig = field(default_factory=AverageConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    preemption: PreemptionConfig = field(default_factory=PreemptionConfig)
    timeouts: TimeoutsConfig = field(default_factory=TimeoutsConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)


@dataclass
class EvaluateConfig:
    """The keys of `clipmini evaluate`."""

    model: str | None = MISSING
    architecture: str | None = MISSING
    weights: str = MISSING
    datasets: list[Any] = MISSING
    output: str = MISSING
    again: bool = MISSING
    batch_size: int = limited(least=1)
    num_workers: int | None = limited(least=0)
    precision: str = MISSING
    device: str = MISSING
    probes: list[str] = MISSING
    probe_features: str = MISSING
    knn_k: int = limited(least=1)
    knn_temperature: float = limited(above=0)
    l2: float | None = limited(least=0)
    bootstrap_resamples: int = limited(least=0)
    seed: int = limited(least=0, most=2**32 - 1)
    shuffled: bool = MISSING
    details: str | None = MISSING
    details_format: str = MISSING
    clip_benchmark: str | None = MISSING
    compare_to: str | None = MISSING
    check: bool = MISSING
    watch: bool = MISSING
    best_metric: str | None = MISSING
    poll_seconds: float = limited(above=0, most=LONGEST)
    cache: str | None = MISSING


@dataclass
class ExportConfig:
    """The keys of `clipmini export`."""

    model: str = MISSING
    architecture: str | None = MISSING
    weights: str = MISSING
    wise: float | None = MISSING
    format: str = MISSING
    output: str = MISSING
    license: str | None = MISSING


@dataclass
class CacheConfig:
    """Where remote shards are kept, and how they are reached; see `clipmini.data.cache`."""

    directory: str = MISSING
    max_bytes: int | None = MISSING
    fetch_timeout: float = MISSING
    stall_timeout: float = MISSING
    storage_options: Any = MISSING  # a mapping of mappings or null, between which OmegaConf cannot merge


@dataclass
class EmbedConfig:
    """The keys of `clipmini embed`."""

    model: str = MISSING
    architecture: str | None = MISSING
    weights: str = MISSING
    input: str = MISSING
    output: str = MISSING
    image_key: str | None = MISSING
    caption_key: str | None = MISSING
    metadata: bool = MISSING
    rows_per_partition: int = limited(least=1)
    long_texts: str = MISSING
    precision: str = MISSING
    device: str = MISSING
    num_workers: int | None = limited(least=0)
    max_member_bytes: int = limited(least=1)
    cache: CacheConfig = field(default_factory=CacheConfig)


@dataclass
class SearchConfig:
    """The keys of `clipmini search`."""

    index: str = MISSING
    query: str = MISSING
    among: str | None = MISSING
    top_k: int = limited(least=1)
    model: str | None = MISSING
    device: str = MISSING
    output: str | None = MISSING
    approximate: bool = MISSING


@dataclass
class ServeConfig:
    """The keys of `clipmini serve`."""

    index: str = MISSING
    port: int = limited(least=0, most=65535)
    among: str | None = MISSING
    top_k: int = MISSING
    model: str | None = MISSING
    device: str = MISSING
    pictures: str | None = MISSING
    max_upload: int = limited(least=1)


@dataclass
class ReportConfig:
    """The keys of `clipmini report`."""

    run: str = MISSING
    output: str | None = MISSING


@dataclass
class CompareConfig:
    """The keys of `clipmini compare`."""

    runs: list[str] = MISSING
    output: str = MISSING


@dataclass
class LeaksConfig:
    """The keys of `clipmini shards leaks`."""

    train: Any = MISSING
    eval: Any = MISSING
    output: str = MISSING
    details: str | None = MISSING
    max_shown: int = limited(least=0, most=10_000)
    max_distance: int = limited(least=0, most=31)  # of 64 bits: half of them differ by chance
    min_correlation: float = limited(least=0.5, most=1)
    model: str | None = MISSING
    architecture: str | None = MISSING
    weights: str = MISSING
    min_cosine: float = limited(least=0, most=1)
    precision: str = MISSING
    device: str = MISSING
    num_workers: int | None = limited(least=0)
    max_member_bytes: int = limited(least=1)
    max_pixels: int = limited(least=1)
    allow_pipe: bool = MISSING
    cache: CacheConfig = field(default_factory=CacheConfig)


COMMANDS = {
    "evaluate": EvaluateConfig,
    "export": ExportConfig,
    "embed": EmbedConfig,
    "search": SearchConfig,
    "serve": ServeConfig,
    "report": ReportConfig,
    "compare": CompareConfig,
    "leaks": LeaksConfig,
}
# Keys whose values may be given without their names; of one that ends in `...`, any number.
POSITIONAL = {
    "search": ("index", "query"),
    "serve": ("index",),
    "report": ("run",),
    "compare": ("runs...",),
    "leaks": ("train", "eval"),
}
