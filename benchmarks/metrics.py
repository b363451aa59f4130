"""Time and memory of scoring features: 50,000 x 2,048 of them on this machine.

    python -m benchmarks.metrics                       # 12,500, 25,000 and 50,000 rows
    python -m benchmarks.metrics --counts 2000 4000 --width 256

Each count is a process of its own, so that its peak of memory is its own. Features are drawn batch
by batch and scored with the library's `Scorer`: Frechet distance, kernel distance, and precision
and recall against a reference of the same width. Rows lie in files, as an evaluation keeps them.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import hardware
from dydilit_jax.metrics.features import Features
from dydilit_jax.metrics.scoring import Scorer
from dydilit_jax.metrics.statistics import Reference

SCORES = ("frechet", "kernel", "precision_recall")


class Drawn:
    """An extractor in name only: its features are drawn, not computed."""

    name, description, checksum = "drawn", "normal features", "0"
    spatial_width = num_classes = 0
    parameters: Any = None

    def __init__(self, width: int):
        self.width = width

    def apply(self, parameters: Any, images: jax.Array) -> Features:
        """Nothing is extracted here."""
        raise NotImplementedError


def peak_bytes() -> int:
    """The most memory that this process has held, Linux's count."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def filled(
    width: int, count: int, batch: int, seed: int, shift: float, folder: Path, names: Sequence[str]
) -> Scorer:
    """A scorer that was given `count` rows, batch by batch."""
    scorer = Scorer(Drawn(width), scores=names, folder=folder)
    rng = np.random.default_rng(seed)
    for first in range(0, count, batch):
        size = min(batch, count - first)
        rows = rng.standard_normal((size, width), np.float32) + np.float32(shift)
        scorer.add(Features(jnp.asarray(rows)), np.arange(first, first + size))
    scorer.statistics()
    return scorer


def measure(
    count: int, references: int, width: int, batch: int, names: Sequence[str]
) -> dict[str, Any]:
    """Seconds and bytes of scoring so many rows."""
    from dydilit_jax.config import MeshConfig
    from dydilit_jax.training.sharding import make_mesh

    with tempfile.TemporaryDirectory() as folder:
        reference: Reference = filled(
            width, references, batch, 0, 0.0, Path(folder) / "reference", names
        ).reference()
        before = peak_bytes()
        start = time.perf_counter()
        scorer = filled(width, count, batch, 1, 0.02, Path(folder) / "samples", names)
        summed = time.perf_counter() - start
        after_sums = peak_bytes()
        scores = scorer.scores(reference, make_mesh(MeshConfig()))
        total = time.perf_counter() - start
    return {
        "count": count,
        "seconds_sums": summed,
        "seconds_scores": total - summed,
        "peak_bytes_before": before,
        "peak_bytes_after_sums": after_sums,
        "peak_bytes": peak_bytes(),
        "scores": scores,
    }


def main() -> None:
    """Measures each count in a process of its own, prints a table, writes a JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--counts", type=int, nargs="+", default=[12_500, 25_000, 50_000])
    parser.add_argument("--references", type=int, default=10_000, help="rows of the reference")
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=500)
    parser.add_argument("--scores", nargs="+", choices=SCORES, default=list(SCORES))
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/metrics.json"))
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        result = measure(
            options.child, options.references, options.width, options.batch, options.scores
        )
        print(json.dumps(result))
        return
    print(f"{hardware()}, JAX {jax.__version__}; rows of {options.width}, batches {options.batch}")
    print(f"{'rows':>8}{'sums, s':>10}{'scores, s':>11}{'MiB, sums':>11}{'MiB, peak':>11}")
    rows = []
    for count in options.counts:
        command = [sys.executable, "-m", "benchmarks.metrics", f"--child={count}"]
        command += [
            f"--{name}={getattr(options, name)}" for name in ("references", "width", "batch")
        ]
        command += ["--scores", *options.scores]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        row = json.loads(done.stdout.splitlines()[-1])
        rows.append(row)
        print(
            f"{count:8d}{row['seconds_sums']:10.1f}{row['seconds_scores']:11.1f}"
            f"{row['peak_bytes_after_sums'] / 2**20:11.0f}{row['peak_bytes'] / 2**20:11.0f}",
            flush=True,
        )
    record = {
        "hardware": hardware(),
        "jax": jax.__version__,
        "width": options.width,
        "batch": options.batch,
        "scores": options.scores,
        "references": options.references,
        "rows": rows,
    }
    options.json.write_text(json.dumps(record, indent=2) + "\n")
    print(f"wrote {options.json}")


if __name__ == "__main__":
    main()
