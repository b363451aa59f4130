"""Trains: python -m dydilit_jax.train --config=configs/digits.py --workdir=runs/digits."""

from __future__ import annotations

import sys
from pathlib import Path

from absl import flags

from dydilit_jax import cli
from dydilit_jax.config import Config

_CONFIG = cli.define_config_flag()
_CONNECT = cli.define_process_flags()
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of checkpoints, metrics and samples.")
_DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "Print config, parameters, mesh and a batch's shapes; train nothing."
)
_STOPPED_STATUS = flags.DEFINE_integer(
    "stopped_status",
    0,
    "Exit status of a run that was asked to stop before its last step, by which a launcher knows "
    "that it has to go on.",
    lower_bound=0,
    upper_bound=255,
)


def main() -> None:
    """Trains, or with --dry_run says what would be trained."""
    cli.required(cli.flag_text("config"), "config")
    config = Config.from_dict(_CONFIG.value)
    _CONNECT()
    if _DRY_RUN.value:
        from dydilit_jax.training.dry_run import describe

        print(describe(config))
        return
    workdir = cli.required(_WORKDIR.value, "workdir")
    from dydilit_jax.training.loop import train

    state = train(config, Path(workdir))
    if int(state.step) < config.train.steps:
        sys.exit(_STOPPED_STATUS.value)


if __name__ == "__main__":
    cli.run(main)
