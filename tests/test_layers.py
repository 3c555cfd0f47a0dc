"""Imports go down only, and each foreign framework stays where it belongs."""

import ast
from pathlib import Path

import clipmini

PACKAGE = Path(clipmini.__file__).parent
LAYERS = [
    {"", "errors"},
    {"redaction"},
    {"annotations", "distributed", "console", "files", "lengths", "blocks", "one_tower", "towers", "schemas"},
    {"architecture"},
    {"targets"},
    {"hydra_checks"},
    {"config"},
    {"data", "model", "weights", "lora", "tiles", "optim", "guard", "ema", "head"},
    {"losses", "nt_xent", "distillation", "curriculum"},
    {"objective"},
    {"cluster", "checkpoints"},
    {"launch", "module", "loggers"},
    {"sources", "callbacks", "training_health", "profiling", "evaluation"},
    {"evaluation_callback", "watch", "export", "kept_features", "locked_features", "teacher", "run_log", "report"},
    {"trainer"},
    {"train"},
    {"evaluate", "shards", "search"},
    {"cli"},
    {"check"},
    {"__main__"},
]
HYDRA = {
    *("config", "schemas", "hydra_checks", "cli", "train", "trainer"),
    *("evaluate", "export.run", "shards.command", "check.command"),
}
LIGHTNING = {
    *("data.loader", "module", "loggers", "callbacks", "profiling", "evaluation_callback", "launch", "train"),
    "trainer",
    *("checkpoints.writer", "checkpoints.saving", "cluster.hangs", "cluster.fsdp", "training_health"),
    *("check.command", "check.measure"),
}


def imports() -> dict[str, set[str]]:
    """Map each module of the package, as `data.plan`, to the modules that it imports."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").strip(".")
        names = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: relative import"
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
        found[name] = names
    return found


def layer(name: str) -> int:
    top = name.split(".")[0]
    return next(number for number, names in enumerate(LAYERS) if top in names)


def test_imports_go_down_only() -> None:
    for name, imported in imports().items():
        for other in imported:
            if other.split(".")[0] == "clipmini":
                target = other.removeprefix("clipmini").strip(".")
                target = target if target.split(".")[0] in set().union(*LAYERS) else ""
                assert layer(target) <= layer(name), f"{name} imports {other}"


def test_frameworks_stay_where_they_belong() -> None:
    for name, imported in imports().items():
        tops = {other.split(".")[0] for other in imported}
        assert name in HYDRA or not tops & {"hydra", "omegaconf"}, name
        assert name in LIGHTNING or "pytorch_lightning" not in tops, name
        is_data = name.startswith("data")
        assert not is_data or not any(
            "torch.distributed" in other or "clipmini.distributed" in other for other in imported
        )
