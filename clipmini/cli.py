"""The command line: one command with subcommands; what a subcommand needs is imported when it runs."""

import argparse
import importlib
import io
import logging
import os
import select
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from clipmini import __version__, redaction
from clipmini.errors import STOPPED, ProcessLost, Stopped, UserError, did_you_mean, tell_choices

if TYPE_CHECKING:
    from omegaconf import DictConfig

COMMANDS = {
    "train": "train a model; takes Hydra overrides, and --help for all keys and choices",
    "check": "what would make a run fail or waste it, before it is queued; takes train's overrides",
    "evaluate": "judge a model on sets of pictures; takes overrides, and --help for all keys",
    "export": "write a model for open_clip, transformers or ONNX; takes overrides",
    "report": "write the page of a run: report RUN",
    "compare": "tell what differs between runs: compare A B ...",
    "embed": "pictures and texts to vectors, for search or for other programs; takes overrides",
    "search": "find what is nearest to a text or a picture: search INDEX QUERY",
    "serve": "a page on this machine to search with: serve INDEX",
    "shards": "pack, index or verify shards, find evaluation sets in them, or print the plan of a run; --help for more",
}
MODULES = {
    "check": "clipmini.check.command:run",
    "evaluate": "clipmini.evaluate:run",
    "export": "clipmini.export.run:run",
    "report": "clipmini.report.command:run",
    "compare": "clipmini.report.command:compare",
    "embed": "clipmini.search.embed:run",
    "search": "clipmini.search.command:run",
    "serve": "clipmini.search.server:run",
    "shards": "clipmini.shards.command:run",
}


class Defect(BaseException):
    """Carries an error of a job past Hydra, which would print all overrides, with their secrets."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    Returns:
        The exit code: 0 done, 1 defects were found, 2 something that the user can fix, 130 Ctrl-C, 141 nobody reads the
        output any more; of `train` also 85 when it was asked to stop and has saved, and 1 when another process was
        lost.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that is no text must not end what prints it
    parser = argparse.ArgumentParser(
        prog="clipmini",
        description="Train CLIP-style image-text models.",
        epilog="\n".join(f"  clipmini {name:9}{text}" for name, text in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"clipmini {__version__}")
    parser.add_argument("command", metavar="COMMAND", help=" | ".join(COMMANDS))
    parser.add_argument("overrides", nargs=argparse.REMAINDER, metavar="...", help="what the subcommand takes")
    parsed = parser.parse_args(arguments)
    for word in parsed.overrides:
        redaction.remember(redaction.find_override_secrets(word))
    sys.excepthook = lambda *error: sys.stderr.write(redaction.format_traceback(*error))
    try:
        if parsed.command not in COMMANDS:
            raise UserError(f"{parsed.command}: no such command{tell_choices(parsed.command, COMMANDS)}")
        code = train_command(parsed.overrides) if parsed.command == "train" else run_command(parsed)
        if sys.stdout is not None:  # as after `>&-`
            sys.stdout.flush()  # at the end of the interpreter it would be too late to tell why that fails
        return code
    except BrokenPipeError as error:
        return leave_output(error)
    except UserError as error:
        print(f"clipmini: {redaction.redact_message(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("clipmini: interrupted", file=sys.stderr)
        return 130


def leave_output(error: BrokenPipeError) -> int:
    """Write no more to a pipe that nobody reads, as behind `| head`; return what a shell says of programs that it ends.

    Raises:
        BrokenPipeError: the error itself, if it is not about the output.
    """
    output = sys.stdout.fileno()
    poll = select.poll()
    poll.register(output, 0)  # for nothing but errors
    if not poll.poll(0):
        raise error
    os.dup2(os.open(os.devnull, os.O_WRONLY), output)  # for what is left in the buffer
    return 128 + signal.SIGPIPE


def run_command(parsed: argparse.Namespace) -> int:
    """Run a command that composes its config by itself, without a job of Hydra's.

    Raises:
        UserError: overrides that do not fit the config.
    """
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    from clipmini.config import config_file

    if parsed.command != "shards" and {"-h", "--help"} & set(parsed.overrides):
        print(config_file("train" if parsed.command == "check" else parsed.command).read_text(), end="")
        return 0
    module, _, function = MODULES[parsed.command].partition(":")
    try:
        return getattr(importlib.import_module(module), function)(parsed.overrides)
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise UserError(explain(error)) from error
    except OSError as error:
        raise UserError(tell_file(error, parsed.overrides)) from error


def train_command(overrides: list[str]) -> int:
    """Compose the config with Hydra, which also sweeps (`--multirun`) and launches jobs, and train.

    Raises:
        UserError: overrides that do not fit the config.
    """
    import hydra
    from hydra.errors import HydraException
    from omegaconf import DictConfig
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    from clipmini import config

    if any(word.startswith("--e") for word in overrides):  # Hydra takes all abbreviations
        raise UserError("--experimental-rerun: would unpickle a file, which runs code; give the overrides again")

    # Before torch is loaded: on a CPU, threads that spin while they wait take the cores from the loader's workers.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Let Hydra raise: its own report prints stack traces and always exits with 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    # Hydra's flags first: its parser takes no more overrides behind one that stands between them.
    sys.argv = ["clipmini train", *sorted(overrides, key=lambda word: "=" in word and not word.startswith("-"))]
    config.register()
    if any(word == "-m" or (len(word) > 2 and "--multirun".startswith(word)) for word in overrides):
        check_sweeper()

    @hydra.main(version_base="1.3", config_path=str(config.CONFIG_DIR), config_name="train")
    def run(cfg: DictConfig) -> None:
        config.clean_sweep()
        sys.argv[1:] = map(redaction.redact_override, overrides)  # loggers such as wandb's write it down
        config.register()  # again: a job of a sweep may be a process in which nothing was
        from clipmini.train import train  # torch and Lightning: seconds that a typo should not cost

        try:
            check_sweep(cfg)
            train(cfg)
        except (UserError, OmegaConfBaseException) as error:
            # Exit here: Hydra would put its own lines around an exception of the job.
            logging.getLogger("clipmini").error("clipmini: %s", explain(error))
            sys.exit(2)
        except OSError as error:
            if error.filename is None:
                raise Defect(error) from None
            logging.getLogger("clipmini").error("clipmini: %s", tell_file(error, overrides))
            sys.exit(2)
        except (Stopped, ProcessLost) as end:
            logging.getLogger("clipmini").error("clipmini: %s", end)
            sys.exit(STOPPED if isinstance(end, Stopped) else 1)
        except Exception as error:
            raise Defect(error) from None

    try:
        run()
    except Defect as defect:
        raise defect.error from None
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError) as error:
        raise UserError(explain(error)) from error
    except OSError as error:
        raise UserError(tell_file(error, overrides)) from error
    return 0


SWEEP = (
    "hydra/launcher=slurm submits each run of a sweep as a job of its own, with hydra.launcher.tasks_per_node processes"
)


def check_sweeper() -> None:
    """See that one process runs the sweep.

    Raises:
        UserError: a launcher has made several, each of which would run, or submit, the whole sweep.
    """
    from clipmini.launch import read_launch

    processes = read_launch()
    if processes.world_size == 1:
        return
    if processes.rank:
        sys.exit(2)  # the first one says it
    raise UserError(
        f"--multirun in {processes.world_size} processes of {processes.launcher}: each would run the whole sweep; "
        f"start it without {processes.launcher}: {SWEEP}"
    )


def check_sweep(cfg: "DictConfig") -> None:
    """See that a sweep whose runs are made in this process wants no more than one of each.

    Raises:
        UserError: it wants several.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    hydra = HydraConfig.get()
    if hydra.mode is not RunMode.MULTIRUN or not hydra.launcher._target_.endswith(".BasicLauncher"):
        return
    if cfg.trainer.devices not in ("auto", 1):
        raise UserError(f"trainer.devices={cfg.trainer.devices} in a sweep: its runs have one process here; {SWEEP}")
    check_sweeper()  # `hydra.mode=MULTIRUN` comes past the first check


def tell_file(error: OSError, overrides: Sequence[str]) -> str:
    """Tell what is wrong with a file or directory, and which override names it.

    Raises:
        OSError: the error itself, if it is not about a file: nothing that the user has given is wrong then.
    """
    if error.filename is None:
        raise error
    path = os.fspath(error.filename)
    keys = [key for key, _, value in (word.partition("=") for word in overrides) if value and path.startswith(value)]
    return ": ".join([*keys[-1:], path, os.strerror(error.errno) if error.errno else str(error)])


def explain(error: Exception) -> str:
    """Tell an error of Hydra, OmegaConf or yaml in the words of the user's own keys and files."""
    from hydra.errors import MissingConfigException, OverrideParseException
    from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException
    from yaml import MarkedYAMLError

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
        if choice.startswith("submitit_"):
            return f"{group}: {choice} needs a package that is not installed: pip install 'clipmini[slurm]'"
        choices = ", ".join(sorted(error.options))
        return f"no {choice!r} among the choices of {group}{did_you_mean(choice, error.options)}; there are: {choices}"
    if isinstance(error, OSError) and error.filename is not None:
        return tell_file(error, ())
    if isinstance(error, MarkedYAMLError):
        return f"a config file cannot be read: {error.problem}{error.problem_mark}".replace("\n", " ")
    return str(error)
