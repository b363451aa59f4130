"""Checkpoints: parameters, optimizer, average, step, random key and the data's position, together.

workdir/config.json                       the run's config
workdir/checkpoints/STEP/state            parameters, optimizer, step, key
workdir/checkpoints/STEP/ema              the moving average, apart, for sampling
workdir/checkpoints/STEP/data             position of the batch iterator, what recovery remembers
workdir/checkpoints/STEP/manifest.json    the record that makes it a checkpoint; see integrity.py
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
import threading
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from dydilit_jax.agreement import common_text, of_first_process
from dydilit_jax.config import Config, differing_fields
from dydilit_jax.errors import UserError
from dydilit_jax.training.integrity import (
    MANIFEST,
    Arrays,
    describe_arrays,
    differing_arrays,
    find_damage,
    is_finished,
    is_scheduled,
    recorded_arrays,
    write_atomically,
    write_manifest,
)
from dydilit_jax.training.state import TrainState
from dydilit_jax.training.storage import is_storage_failure, quiet_orbax, reason, warn

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

    With several processes every method but `latest_step` is a collective; the workdir is shared.

    Args:
      workdir: the run's directory.
      keep: newest checkpoints that are kept; None never deletes (readers).
      keep_every: checkpoints of multiples of so many steps are kept as well; 0 for none.
      only: the one step whose checkpoint is read; None for the newest (readers).
    """

    def __init__(
        self,
        workdir: Path,
        keep: int | None = None,
        keep_every: int = 0,
        *,
        only: int | None = None,
    ):
        self._workdir = workdir
        self._only = only
        self._folder = (workdir / CHECKPOINTS).resolve()
        self._keep, self._keep_every = keep, keep_every
        self._orbax = _orbax()
        self._damaged: set[int] = set()
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self.failed_step: int | None = None
        quiet_orbax()

    def latest_step(self) -> int | None:
        """Step of the newest finished checkpoint, None if there is none."""
        return max(self._finished(), default=None)

    def save(self, state: TrainState, data_state: dict[str, Any], scheduled: bool = True) -> None:
        """Starts saving a checkpoint of the state's step; a step already saved is left alone.

        A failure of the storage is told in one line, now or when it comes, and is seen in
        `failed_step`; nothing else comes of it.

        Args:
          state: what is saved; copied before this returns.
          data_state: position of the data, and what else JSON can hold.
          scheduled: whether an uninterrupted run would save it too; a rollback may return to it.
        """
        self.wait()
        step = int(state.step)
        if of_first_process(step in self._finished()):
            return
        folder = self._folder / str(step)
        fields, ema = _split_ema(state)
        arrays = {"state": describe_arrays(fields), "ema": describe_arrays(ema)}
        try:
            self.discard_unfinished()
            if jax.process_index() == 0 and folder.exists():
                shutil.rmtree(folder)  # Damaged; this one takes its place.
            self._orbax.save(
                folder,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(fields),
                    ema=ocp.args.StandardSave(ema),
                    data=ocp.args.JsonSave(data_state),
                ),
            )
        except Exception as error:
            self._failed(step, error)
            self.wait()
            return
        self._damaged.discard(step)
        self._thread = threading.Thread(
            target=self._finish, args=(step, arrays, scheduled), name="checkpoint"
        )
        self._thread.start()

    def wait(self) -> None:
        """Waits until what is being saved is on disk, or has failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def restore(self, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """As `resume`, where a checkpoint is expected: UserError if there is none."""
        restored = self.resume(abstract)
        if restored is None:
            raise self._none()
        return restored

    def resume(
        self, abstract: TrainState, scheduled: bool = False
    ) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest checkpoint without damage; names those it passes over.

        Args:
          abstract: shapes, dtypes and shardings to restore to; see state.abstract_state.
          scheduled: only one that an uninterrupted run would have written too.

        Returns:
          The state and what was saved as `data_state`; None if there is no checkpoint.

        Raises:
          UserError: all are damaged, it cannot be read, or another model wrote it.
        """
        self.wait()
        step = self._choose(("state", "ema", "data"), scheduled)
        if step is None:
            return None
        fields, ema = _split_ema(abstract)
        self._check_arrays(step, {"state": describe_arrays(fields), "ema": describe_arrays(ema)})
        restored = self._orbax.restore(
            self._folder / str(step),
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(fields),
                ema=ocp.args.StandardRestore(ema),
                data=ocp.args.JsonRestore(),
            ),
        )
        key = jax.random.wrap_key_data(restored.state.pop("key"))
        return TrainState(ema=restored.ema, key=key, **restored.state), restored.data

    def restore_ema(self, abstract: TrainState) -> tuple[int, Any]:
        """Step and moving average (optax's state) of the newest checkpoint, and nothing else.

        Raises:
          UserError: there is none, all are damaged, it cannot be read, or another model wrote it.
        """
        step = self._choose(("ema",), scheduled=False)
        if step is None:
            raise self._none()
        self._check_arrays(step, {"ema": describe_arrays(abstract.ema)})
        restored = self._orbax.restore(
            self._folder / str(step),
            args=ocp.args.Composite(ema=ocp.args.StandardRestore(abstract.ema)),
        )
        return step, restored.ema

    def discard_unfinished(self) -> None:
        """Removes what a run that was killed left of a checkpoint; for the workdir's one run."""
        if jax.process_index() == 0:
            for path in self._unfinished():
                shutil.rmtree(path, ignore_errors=True)

    def discard_after(self, step: int) -> None:
        """Removes every checkpoint of a later step, to which a run that went back never came."""
        if jax.process_index() == 0:
            for each in self._steps():
                if each > step:
                    _remove(self._folder / str(each))
        of_first_process(0)  # The others wait until they are gone.

    def close(self) -> None:
        """Waits until what is being saved is on disk."""
        try:
            self.wait()
        finally:
            self._orbax.close()

    def _entries(self) -> list[Path]:
        try:
            return sorted(self._folder.iterdir()) if self._folder.is_dir() else []
        except PermissionError as error:
            raise self._unreadable("checkpoints", error) from error

    def _steps(self) -> list[int]:
        return sorted(int(path.name) for path in self._entries() if path.name.isdigit())

    def _finished(self) -> list[int]:
        """Steps of the finished checkpoints that are not known to be damaged, oldest first."""
        return [
            step
            for step in self._steps()
            if step not in self._damaged
            and self._only in (None, step)
            and is_finished(self._folder / str(step))
        ]

    def _unfinished(self) -> list[Path]:
        return [
            path
            for path in self._entries()
            if path.is_dir() and path.name.split(".")[0].isdigit() and not is_finished(path)
        ]

    def _choose(self, items: tuple[str, ...], scheduled: bool) -> int | None:
        """Step of the newest checkpoint whose files are all as they were written."""
        share = (jax.process_index(), jax.process_count())
        damage = ""
        while True:
            candidates = [
                step
                for step in self._finished()
                if not scheduled or is_scheduled(self._folder / str(step))
            ]
            step = of_first_process(max(candidates, default=-1))
            if step < 0:
                break
            folder = self._folder / str(step)
            try:
                problem = find_damage(folder, items, share)
            except PermissionError as error:
                raise self._unreadable(f"checkpoint {step}", error) from error
            except OSError as error:
                problem = f"{error.filename}: {error.strerror}"
            damage = common_text(problem) or ""
            if not damage:
                break
            self._damaged.add(step)
            self._say(f"checkpoint {step} of {self._workdir} is damaged and skipped: {damage}")
        self._name_unfinished(step)
        if step >= 0:
            return step
        if damage and not scheduled:
            raise UserError(
                f"no checkpoint of {str(self._workdir)!r} is whole ({damage}): bring one back, or "
                f"delete {self._folder} to start anew"
            )
        return None

    def _name_unfinished(self, newest: int) -> None:
        """Names what a killed run left behind, of steps that were to follow the newest."""
        for path in self._unfinished():
            step = int(path.name.split(".")[0])
            # A reader of a living run sees what is just being written; that is no news.
            if step > newest and (self._keep is not None or path.name.isdigit()):
                self._say(f"checkpoint {step} of {self._workdir} was not finished and is skipped")

    def _check_arrays(self, step: int, expected: Arrays) -> None:
        difference = differing_arrays(recorded_arrays(self._folder / str(step)), expected)
        if difference:
            raise UserError(
                f"checkpoint {step} of {str(self._workdir)!r} was written by another model: "
                f"{difference}. Use another --workdir, or the config that wrote it"
            )

    def _finish(self, step: int, arrays: Arrays, scheduled: bool) -> None:
        """Waits for Orbax, records the files, deletes what need not be kept; in a thread."""
        try:
            self._orbax.wait_until_finished()
            if jax.process_index() == 0:
                write_manifest(self._folder / str(step), arrays, scheduled=scheduled)
                self._prune()
            self.failed_step = None
        except Exception as error:
            self._failed(step, error)

    def _failed(self, step: int, error: Exception) -> None:
        """Tells of a failure of the storage; any other error is raised by the next `wait`."""
        if not is_storage_failure(error):
            self._error = error
            return
        self.failed_step = step
        self._orbax = _orbax()  # The old one would raise what is left of this at its next save.
        if jax.process_index() == 0:
            for name in (f"{step}.orbax-checkpoint-tmp", str(step)):
                shutil.rmtree(self._folder / name, ignore_errors=True)
        good = max(self._finished(), default=None)
        kept = "there is none before it" if good is None else f"checkpoint {good} is kept"
        self._say(
            f"checkpoint {step} could not be written, training goes on; {kept}: {reason(error)}"
        )

    def _prune(self) -> None:
        """Deletes all but the newest, every n-th, and the newest that a rollback may return to."""
        if self._keep is None:
            return
        finished = self._finished()
        kept = set(finished[-self._keep :])
        if self._keep_every:
            kept |= {step for step in finished if step % self._keep_every == 0}
        kept |= set([s for s in finished if is_scheduled(self._folder / str(s))][-1:])
        for step in self._steps():
            if step not in kept and step < finished[-1]:
                _remove(self._folder / str(step))

    def _unreadable(self, what: str, error: PermissionError) -> UserError:
        return UserError(
            f"{what} of {str(self._workdir)!r} cannot be read: no permission for {error.filename}"
        )

    def _none(self) -> UserError:
        if self._only is not None:
            there = [step for step in self._steps() if is_finished(self._folder / str(step))]
            has = ", ".join(map(str, there)) or "none"
            return UserError(
                f"workdir {str(self._workdir)!r} has no checkpoint of step {self._only}; it has: "
                f"{has}"
            )
        return UserError(f"workdir {str(self._workdir)!r} has no checkpoint yet: train first")

    def _say(self, line: str) -> None:
        if jax.process_index() == 0:
            warn(line)


def _orbax() -> ocp.AsyncCheckpointer:
    return ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())


def _remove(folder: Path) -> None:
    """Deletes a checkpoint, which from the first moment on is none any more."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def open_workdir(workdir: Path, config: Config) -> None:
    """Makes the workdir, or checks that it belongs to this config; writes config.json.

    Raises:
      UserError: it cannot be written, or holds checkpoints of another config (names the fields).
    """
    saved = workdir / CONFIG_FILE
    try:
        if saved.is_file() and has_checkpoint(workdir):
            fields = differing_fields(load_config(workdir), config)
            if fields:
                raise UserError(
                    f"workdir {str(workdir)!r} holds checkpoints of another config; differing "
                    f"fields: {'; '.join(fields)}. Use another --workdir, or the old config"
                )
        folder = workdir / CHECKPOINTS
        folder.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            with tempfile.TemporaryFile(dir=folder):
                pass  # It can be written: better known now than at the first checkpoint.
            write_atomically(saved, config.to_json())
    except OSError as error:
        what = error.strerror or str(error)
        if isinstance(error, PermissionError) and error.filename:
            what += f" in {Path(error.filename).parent}"
        raise UserError(f"cannot write workdir {str(workdir)!r}: {what}") from error


def has_checkpoint(workdir: Path) -> bool:
    """Whether the workdir holds a finished checkpoint, damaged or not."""
    folder = workdir / CHECKPOINTS
    return folder.is_dir() and any(
        entry.name.isdigit() and is_finished(entry) for entry in folder.iterdir()
    )


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
