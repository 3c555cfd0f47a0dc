"""The command line: one command with subcommands; what a subcommand needs is imported when it runs."""

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Sequence

from clipmini import __version__
from clipmini.errors import Interrupted, UserError, did_you_mean

COMMANDS = {
    "train": "train a model; takes Hydra overrides, and --help for all keys and choices",
    "evaluate": "judge a model on sets of pictures; takes overrides, and --help for all keys",
    "export": "write a model for open_clip, transformers or ONNX; takes overrides",
    "shards": "pack, index or verify shards, or print the plan of a run; --help for more",
}
MODULES = {"evaluate": "clipmini.evaluate", "export": "clipmini.export.run", "shards": "clipmini.shards.command"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    Returns:
        The exit code: 0 done, 1 defects were found, 2 something that the user can fix, 130 Ctrl-C.
    """
    parser = argparse.ArgumentParser(
        prog="clipmini",
        description="Train CLIP-style image-text models.",
        epilog="\n".join(f"  clipmini {name:9}{text}" for name, text in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"clipmini {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=" | ".join(COMMANDS))
    parser.add_argument("overrides", nargs=argparse.REMAINDER, metavar="...", help="what the subcommand takes")
    parsed = parser.parse_args(arguments)
    try:
        return train_command(parsed.overrides) if parsed.command == "train" else run_command(parsed)
    except UserError as error:
        print(f"clipmini: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("clipmini: interrupted", file=sys.stderr)
        return 130


def run_command(parsed: argparse.Namespace) -> int:
    """Run a command that composes its config by itself, without a job of Hydra's.

    Raises:
        UserError: overrides that do not fit the config.
    """
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from clipmini.config import config_file

    if parsed.command != "shards" and {"-h", "--help"} & set(parsed.overrides):
        print(config_file(parsed.command).read_text(), end="")
        return 0
    module = importlib.import_module(MODULES[parsed.command])
    try:
        return module.run(parsed.overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(explain(error)) from error


def train_command(overrides: list[str]) -> int:
    """Compose the config with Hydra, which also sweeps (`--multirun`) and launches jobs, and train.

    Raises:
        UserError: overrides that do not fit the config.
    """
    import hydra
    from hydra.errors import HydraException
    from omegaconf import DictConfig
    from omegaconf.errors import OmegaConfBaseException

    from clipmini import config

    # Before torch is loaded: on a CPU, threads that spin while they wait take the cores from the loader's workers.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Let Hydra raise: its own report prints stack traces and always exits with 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    sys.argv = ["clipmini train", *overrides]
    config.register()

    composed = False

    @hydra.main(version_base="1.3", config_path=str(config.CONFIG_DIR), config_name="train")
    def run(cfg: DictConfig) -> None:
        nonlocal composed
        composed = True
        from clipmini.train import train  # torch and Lightning: seconds that a typo should not cost

        try:
            train(cfg)
        except (UserError, OmegaConfBaseException) as error:
            # Exit here: Hydra would put its own lines around an exception of the job.
            logging.getLogger("clipmini").error("clipmini: %s", explain(error))
            sys.exit(2)
        except Interrupted as stop:
            logging.getLogger("clipmini").error("clipmini: %s", stop)
            sys.exit(130)

    try:
        run()
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        if composed and not isinstance(error, HydraException | OmegaConfBaseException):
            raise  # ours, not an override that Hydra cannot read
        raise UserError(explain(error)) from error
    return 0


def explain(error: Exception) -> str:
    """Tell an error of Hydra or OmegaConf in the words of the user's own keys."""
    from hydra.errors import MissingConfigException, OverrideParseException
    from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

    cause = error if isinstance(error, OmegaConfBaseException) else error.__cause__
    if isinstance(cause, ConfigKeyError | ConfigAttributeError) and cause.parent_node is not None:
        return f"unknown key {cause.full_key}{did_you_mean(str(cause.key), map(str, cause.parent_node))}"
    if isinstance(cause, MissingMandatoryValue):
        return f"{cause.full_key} has no value: give it one, as in {cause.full_key}=..."
    if isinstance(cause, OmegaConfBaseException):
        reason = str(cause.msg or cause).splitlines()[0]
        return f"{cause.full_key}: {reason}" if cause.full_key and cause.full_key not in reason else reason
    if isinstance(error, OverrideParseException):
        lines = str(error).splitlines()
        reason = "; ".join(line for line in lines if not line.startswith(("See ", "Error parsing override")))
        return (
            f"cannot read the override {error.override}: {reason}; values with braces and the like need quotes inside "
            "the shell's, as in 'data.train=\"/data/{0..9}.tar\"'"
        )
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options is not None:
        group, _, choice = str(error.missing_cfg_file).rpartition("/")
        choices = ", ".join(sorted(error.options))
        return f"no {choice!r} among the choices of {group}{did_you_mean(choice, error.options)}; there are: {choices}"
    return str(error)
