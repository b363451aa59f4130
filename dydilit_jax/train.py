"""Trains: python -m dydilit_jax.train --config=configs/digits.py --workdir=runs/digits."""

from __future__ import annotations

import sys
from pathlib import Path

from absl import flags

from dydilit_jax import cli
from dydilit_jax.config import Config
from dydilit_jax.errors import UserError
from dydilit_jax.origins import field_origins

_CONFIG = cli.define_config_flag()
_CONNECT = cli.define_process_flags()
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of checkpoints, metrics and samples.")
_DRY_RUN = flags.DEFINE_bool(
    "dry_run",
    False,
    "Print all that the config decides: fields and their origins, parameters, memory, data, files; "
    "train nothing.",
)
_COMPILE = flags.DEFINE_bool(
    "compile", False, "With --dry_run, compile the step for the compiler's own account of memory."
)
_STOPPED_STATUS = flags.DEFINE_integer(
    "stopped_status",
    0,
    "Exit status of a run that was asked to stop before its end, be it while it draws and scores "
    "after its last step, by which a launcher knows that it has to go on.",
    lower_bound=0,
    upper_bound=255,
)


def main() -> None:
    """Trains, or with --dry_run says what would be trained."""
    cli.required(cli.flag_text("config"), "config")
    config = Config.from_dict(_CONFIG.value)
    _CONNECT()
    if _DRY_RUN.value:
        dry_run(config)
        return
    if _COMPILE.value:
        raise UserError("--compile is for --dry_run: training compiles by itself")
    workdir = cli.required(_WORKDIR.value, "workdir")
    from dydilit_jax.training.loop import train

    if not train(config, Path(workdir)).finished:
        sys.exit(_STOPPED_STATUS.value)


def dry_run(config: Config) -> None:
    """Prints what the run would be.

    Raises:
      UserError: it would not start; all that can be told is printed before.
    """
    import jax

    from dydilit_jax.training.dry_run import describe

    source, overrides = cli.config_source()
    told = describe(
        config,
        origins=field_origins(config, source, overrides),
        source=source,
        workdir=Path(_WORKDIR.value) if _WORKDIR.value else None,
        compiled=_COMPILE.value,
    )
    if jax.process_index() == 0:
        print(told.text, flush=True)
    if told.problems:
        raise UserError("; ".join(told.problems))


if __name__ == "__main__":
    cli.run(main)
