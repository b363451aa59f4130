"""What the entry points share: flags, and errors in one line."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from dydilit_jax.config import Config, flatten
from dydilit_jax.errors import UserError, unknown_name

_DEBUG = flags.DEFINE_bool("debug", False, "Show the traceback of an error.")


def define_config_flag() -> flags.FlagHolder:
    """Defines `--config=FILE[:ARGUMENT]`, any field of which `--config.field=value` overrides."""
    return config_flags.DEFINE_config_file(
        "config", None, "Config file, for example configs/digits.py.", lock_config=True
    )


def config_source() -> tuple[str, dict[str, Any]]:
    """What --config was given, FILE or FILE:ARGUMENT, and the fields that flags gave, by name."""
    flag = flags.FLAGS["config"]
    return config_flags.get_config_filename(flag), config_flags.get_override_values(flag)


def define_process_flags() -> Callable[[], None]:
    """Defines the flags of a run in several processes; returns what connects this one to them."""
    address = flags.DEFINE_string(
        "coordinator_address",
        None,
        "host:port of process 0, of a run in several processes. Slurm, Open MPI and TPU pods are "
        "found without it.",
    )
    processes = flags.DEFINE_integer("num_processes", None, "How many processes there are.")
    process = flags.DEFINE_integer("process_id", None, "Which one this is, from 0.")
    timeout = flags.DEFINE_float(
        "distributed_timeout", 300.0, "Seconds that all processes have to come.", lower_bound=0.0
    )

    def connect() -> None:
        from dydilit_jax.training import distributed

        distributed.start(address.value, processes.value, process.value, timeout.value)

    return connect


def run(main: Callable[[], None], *, buckets: bool = False) -> None:
    """Parses flags, calls `main` and exits: 0, or 2 after one line for a user's mistake.

    Args:
      main: the program.
      buckets: whether its own flags may name a bucket (gs://...); a config's data may in any case.
    """
    # TensorFlow and Orbax tell much that is no news; what matters of it also raises.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    logging.set_verbosity(logging.INFO if _debugging() else logging.ERROR)
    app.run(lambda _: _guard(main), flags_parser=lambda argv: _guard(lambda: _parse(argv, buckets)))


def _guard(call: Callable[[], object]) -> object:
    try:
        return call()
    except (UserError, PermissionError, IsADirectoryError, NotADirectoryError) as error:
        if _debugging():
            raise
        # A mistake is told in one line, whatever lines a message beneath it had.
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)


def _debugging() -> bool:
    # Asked before flags are parsed too, so it cannot be the flag's value.
    return flag_text("debug") in ("given", "true", "1")


def _parse(argv: list[str], buckets: bool) -> list[str]:
    """absl's parser, with its errors turned into ours."""
    _check_config_file(argv)
    try:
        rest = flags.FLAGS(argv)
    except UserError:
        raise
    except flags.Error as error:
        raise _flag_error(str(error)) from error
    except Exception as error:
        # ml_collections raises these for an override of no field; all else comes from the file.
        if isinstance(error, AttributeError | KeyError) and (unknown := _unknown_field(argv)):
            raise unknown from error
        raise UserError(f"the config file fails: {type(error).__name__}: {error}") from error
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}: flags have the form --name=value")
    if not buckets:
        _refuse_buckets()
    return rest


def _refuse_buckets() -> None:
    """A path of a bucket would be taken for a local folder `gs:`, which dies with the machine."""
    for name in flags.FLAGS:
        value = flags.FLAGS[name].value
        if isinstance(value, str) and value.startswith("gs://") and not name.startswith("config."):
            bucket, _, path = value.removeprefix("gs://").partition("/")
            raise UserError(
                f"--{name}={value} is in a bucket, where this program reads data alone: mount it "
                f"(gcsfuse {bucket} /gcs/{bucket}) and give --{name}=/gcs/{bucket}/{path}; "
                "launch/tpu.sh and launch/gke.sh do both"
            )


def _check_config_file(argv: list[str]) -> None:
    for i, argument in enumerate(argv):
        if re.fullmatch(r"--?config", argument) and i + 1 < len(argv):
            path = argv[i + 1]
        elif match := re.match(r"--?config=(.*)", argument):
            path = match.group(1)
        else:
            continue
        path = path.split(":")[0]
        if not Path(path).is_file():
            raise UserError(f"config file {path!r} does not exist")


def _unknown_field(argv: list[str]) -> UserError | None:
    """The error of the first override that no field has."""
    for argument in argv:
        match = re.match(r"--?(?:no)?config\.([\w.]+)", argument)
        if match and (unknown := unknown_field(match.group(1))):
            return unknown
    return None


def unknown_field(name: str) -> UserError | None:
    """An error that names the field or section nearest to `name`; None if it is one of them."""
    known = set(flatten(dataclasses.asdict(Config())))
    sections = {""}
    for field in known:
        while field := _parent(field):
            sections.add(field)
    if name in known | sections:
        return None
    while _parent(name) not in sections:
        name = _parent(name)
    siblings = [each for each in known | sections if each and _parent(each) == _parent(name)]
    return unknown_name("config field", name, sorted(siblings))


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _flag_error(message: str) -> UserError:
    """The line that matters of an absl or ml_collections message."""
    if raised := re.findall(r"^(?:[\w.]*\.)?UserError: (.*)$", message, re.MULTILINE):
        return UserError(raised[-1])
    if "Error whilst parsing config file" in message:
        last = [line for line in message.splitlines() if line.strip()][-1]
        return UserError(f"the config file fails: {last.strip()}")
    known = flatten(dataclasses.asdict(Config()))
    match = re.match(r"flag --config\.([\w.]+)=(.*?): ", message)
    if match and match.group(1) in known:
        name, value = match.groups()
        return UserError(f"config field {name} expects {type(known[name]).__name__}, got {value!r}")
    return UserError(message.replace("\n", " "))


def required(value: str | None, name: str) -> str:
    """`value` of a flag that must be given."""
    if not value:
        raise UserError(f"--{name} is missing")
    return value


def flag_text(name: str) -> str | None:
    """What the command line gave for a flag, as text; None if it was not given."""
    return next(
        (
            argument.partition("=")[2] or "given"
            for argument in sys.argv
            if re.match(rf"--?{name}(=|$)", argument)
        ),
        None,
    )
