"""Checkpoints: parameters, optimizer, average, step, random key and the data's position, together.

workdir/config.json              the run's config
workdir/checkpoints/STEP/state   parameters, optimizer, step, key
workdir/checkpoints/STEP/ema     the moving average, apart, for sampling
workdir/checkpoints/STEP/data    position of the batch iterator
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from dydilit_jax.config import Config, differing_fields
from dydilit_jax.errors import UserError
from dydilit_jax.training.state import TrainState

CONFIG_FILE = "config.json"
CHECKPOINTS = "checkpoints"


def _split_ema(state: TrainState) -> tuple[dict[str, Any], Any]:
    """The two saved trees; a key is saved as its data."""
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    ema = fields.pop("ema")
    if isinstance(fields["key"], jax.Array):
        fields["key"] = jax.random.key_data(fields["key"])
    else:
        shape = jax.eval_shape(jax.random.key_data, fields["key"])
        fields["key"] = jax.ShapeDtypeStruct(
            shape.shape, shape.dtype, sharding=fields["key"].sharding
        )
    return fields, ema


class Checkpointer:
    """Reads and writes a workdir's checkpoints; saving goes on in the background.

    Args:
      workdir: the run's directory.
      keep: newest checkpoints that are kept; None never deletes (readers).
    """

    def __init__(self, workdir: Path, keep: int | None = None):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=False)
        self._manager = ocp.CheckpointManager((workdir / CHECKPOINTS).resolve(), options=options)

    def latest_step(self) -> int | None:
        """Step of the newest finished checkpoint, None if there is none."""
        return self._manager.latest_step()

    def save(self, state: TrainState, data_state: dict[str, Any]) -> None:
        """Starts saving a checkpoint of the state's step; a step already saved is left alone."""
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        fields, ema = _split_ema(state)
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(fields),
                ema=ocp.args.StandardSave(ema),
                data=ocp.args.JsonSave(data_state),
            ),
        )

    def restore(self, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The newest checkpoint.

        Args:
          abstract: shapes, dtypes and shardings to restore to; see state.abstract_state.

        Returns:
          The state, and the position of the batch iterator.
        """
        fields, ema = _split_ema(abstract)
        restored = self._manager.restore(
            self._manager.latest_step(),
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(fields),
                ema=ocp.args.StandardRestore(ema),
                data=ocp.args.JsonRestore(),
            ),
        )
        key = jax.random.wrap_key_data(restored.state.pop("key"))
        return TrainState(ema=restored.ema, key=key, **restored.state), restored.data

    def restore_ema(self, abstract: TrainState) -> tuple[int, Any]:
        """Step and moving average (optax's state) of the newest checkpoint, and nothing else."""
        step = self._manager.latest_step()
        restored = self._manager.restore(
            step, args=ocp.args.Composite(ema=ocp.args.StandardRestore(abstract.ema))
        )
        assert step is not None
        return step, restored.ema

    def close(self) -> None:
        """Waits until what is being saved is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()


def open_workdir(workdir: Path, config: Config) -> None:
    """Makes the workdir, or checks that it belongs to this config; writes config.json.

    Raises:
      UserError: it cannot be written, or holds checkpoints of another config (names the fields).
    """
    saved = workdir / CONFIG_FILE
    if saved.is_file() and has_checkpoint(workdir):
        fields = differing_fields(load_config(workdir), config)
        if fields:
            raise UserError(
                f"workdir {str(workdir)!r} holds checkpoints of another config; differing fields: "
                f"{'; '.join(fields)}. Use another --workdir, or the old config"
            )
    try:
        (workdir / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            _write_atomically(saved, config.to_json())
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"cannot write workdir {str(workdir)!r}: {reason}") from error


def _write_atomically(path: Path, text: str) -> None:
    """Replaces a file in one step, so that it is never seen half written."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
    Path(name).chmod(0o644)
    Path(name).replace(path)


def has_checkpoint(workdir: Path) -> bool:
    """Whether the workdir holds a finished checkpoint (Orbax names unfinished ones apart)."""
    folder = workdir / CHECKPOINTS
    return folder.is_dir() and any(entry.name.isdigit() for entry in folder.iterdir())


def load_config(workdir: Path) -> Config:
    """The config that a workdir was trained with.

    Raises:
      UserError: no such workdir, or a config.json that is not one of ours.
    """
    path = workdir / CONFIG_FILE
    if not path.is_file():
        raise UserError(f"{str(workdir)!r} is not a workdir: it has no {CONFIG_FILE}")
    try:
        return Config.from_json(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{str(path)!r} is not valid JSON: {error}") from error
