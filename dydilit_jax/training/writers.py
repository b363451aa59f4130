"""Metric writers: TensorBoard through clu, and lines of JSON. TensorFlow is imported here alone."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dydilit_jax.training.integrity import write_atomically

METRICS_FILE = "metrics.jsonl"


class JsonLines:
    """Appends one JSON object a step to workdir/metrics.jsonl."""

    def __init__(self, workdir: Path):
        self._path = workdir / METRICS_FILE

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes `{"step": step, **values}`; numbers that are not finite become null."""
        record = {"step": step} | {name: _plain(value) for name, value in values.items()}
        size = self._path.stat().st_size if self._path.exists() else 0
        try:
            with self._path.open("a") as file:
                file.write(json.dumps(record) + "\n")
        except OSError:
            # The next line is not to follow on half of this one.
            with contextlib.suppress(OSError):
                os.truncate(self._path, size)
            raise


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return np.round(value, 6).tolist()
    return value if math.isfinite(value) else None


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """The lines of workdir/metrics.jsonl, oldest first; a last line cut short is left out."""
    path = workdir / METRICS_FILE
    if not path.is_file():
        return []
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def truncate_metrics(workdir: Path, step: int) -> None:
    """Drops lines of steps beyond `step`, which a resumed run writes again, and one cut short."""
    path = workdir / METRICS_FILE
    if not path.is_file():
        return
    kept = [record for record in read_metrics(workdir) if record["step"] <= step]
    text = "".join(json.dumps(record) + "\n" for record in kept)
    if text != path.read_text():
        write_atomically(path, text)


class Writers:
    """Writes to TensorBoard and metrics.jsonl from the first process; elsewhere does nothing."""

    def __init__(self, workdir: Path):
        self._json: JsonLines | None = None
        self._tensorboard: Any = None
        if jax.process_index() != 0:
            return
        import tensorflow as tf

        tf.config.set_visible_devices([], "GPU")
        from clu import metric_writers

        self._json = JsonLines(workdir)
        self._tensorboard = metric_writers.SummaryWriter(str(workdir / "tensorboard"))

    def scalars(
        self,
        step: int,
        scalars: Mapping[str, float],
        usages: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """Writes scalars, and routers' usage (layers, choices), which TensorBoard shows by choice.

        In TensorBoard a choice's scalar is its mean share over the layers.
        """
        if self._json is None:
            return
        usages = usages or {}
        self._json.write(step, {**scalars, **usages})
        by_choice = {
            f"{name}/{choice}": float(share)
            for name, usage in usages.items()
            for choice, share in enumerate(usage.mean(axis=0))
        }
        self._tensorboard.write_scalars(step, {**scalars, **by_choice})

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Writes a picture (H, W, 3) uint8 to TensorBoard."""
        if self._tensorboard is not None:
            self._tensorboard.write_images(step, {name: image[None]})

    def close(self) -> None:
        """Writes what is still in memory."""
        if self._tensorboard is not None:
            self._tensorboard.flush()
            self._tensorboard.close()
