"""Time and memory of scoring features: 50,000 x 2,048 of them on this machine.

    python -m benchmarks.metrics                       # 12,500, 25,000 and 50,000 rows
    python -m benchmarks.metrics --counts 2000 4000 --width 256
    python -m benchmarks.metrics --check               # the statistics against numpy and scipy

Each count is a process of its own, so that its peak of memory is its own. Features are drawn batch
by batch and summed by the library's `Scorer`; then each score is computed in turn against a
reference of 10,000 rows of the same width. Rows lie in files, as an evaluation keeps them. Memory
is what the process holds itself, without the pages of those files, which the system takes back
when it needs them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jax.sharding import Mesh

from benchmarks.timing import hardware
from dydilit_jax.metrics.features import Features
from dydilit_jax.metrics.frechet import Moments, SingularCovarianceWarning, frechet_distance
from dydilit_jax.metrics.kernel_distance import kernel_distance
from dydilit_jax.metrics.moments import RunningMoments
from dydilit_jax.metrics.precision_recall import precision_recall
from dydilit_jax.metrics.scoring import Scorer
from dydilit_jax.metrics.statistics import Reference

SCORES = ("frechet", "kernel", "precision_recall")
SHIFT = 0.02  # of the samples' mean, in every direction
SAMPLED_EVERY = 0.02  # seconds between two looks at the memory


@dataclasses.dataclass
class DrawnSpace:
    """What the drawn features are of; a `FeatureSpace`."""

    width: int
    name: str = "drawn"
    description: str = "independent normal numbers"
    checksum: str = "0"
    spatial_width: int = 0
    num_classes: int = 0


class Peak:
    """The most memory of its own that this process has held since it was last asked."""

    def __init__(self) -> None:
        self._most = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._ended.wait(SAMPLED_EVERY):
            self._most = max(self._most, own_bytes())

    def take(self) -> int:
        """Bytes; the next peak begins here."""
        most, self._most = max(self._most, own_bytes()), 0
        return most

    @classmethod
    @contextmanager
    def watched(cls) -> Iterator[Peak]:
        """Watches in this scope."""
        peak = cls()
        peak._thread.start()
        try:
            yield peak
        finally:
            peak._ended.set()
            peak._thread.join()


def own_bytes() -> int:
    """Memory that this process holds now without pages of files, Linux's count."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def filled(
    width: int, count: int, batch: int, seed: int, shift: float, folder: Path, names: Sequence[str]
) -> Scorer:
    """A scorer that was given `count` rows, batch by batch."""
    scorer = Scorer(DrawnSpace(width), scores=names, folder=folder)
    for first, rows in drawn(width, count, batch, seed, shift):
        scorer.add(Features(jnp.asarray(rows)), np.arange(first, first + len(rows)))
    scorer.count()  # Takes the last batch, which the sums lag behind.
    return scorer


def drawn(
    width: int, count: int, batch: int, seed: int, shift: float = 0.0
) -> Iterator[tuple[int, np.ndarray]]:
    """Normal rows (batch, width) float32 around `shift`, with the index of each batch's first."""
    rng = np.random.default_rng(seed)
    for first in range(0, count, batch):
        size = min(batch, count - first)
        yield first, rng.standard_normal((size, width), np.float32) + np.float32(shift)


def score(name: str, scorer: Scorer, reference: Reference, mesh: Mesh) -> list[float]:
    """One of SCORES, as numbers."""
    if name == "frechet":
        return [frechet_distance(reference.pool, scorer.statistics().pool)]
    assert reference.rows is not None
    assert scorer.rows is not None
    if name == "kernel":
        return list(kernel_distance(reference.rows, scorer.rows, mesh))
    origin = reference.pool.mean
    return list(precision_recall(reference.rows, scorer.rows, mesh, origin=origin))


def measure(
    count: int, references: int, width: int, batch: int, names: Sequence[str]
) -> dict[str, Any]:
    """Seconds and bytes of scoring so many rows."""
    from dydilit_jax.config import MeshConfig
    from dydilit_jax.training.sharding import make_mesh

    mesh = make_mesh(MeshConfig())
    steps: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder, Peak.watched() as peak:
        parts = Path(folder)
        reference = filled(width, references, batch, 0, 0.0, parts / "reference", names).reference()
        before = peak.take()

        def timed(name: str, step: Callable[..., Any], *arguments: Any) -> Any:
            start = time.perf_counter()
            result = step(*arguments)
            steps[name] = {"seconds": time.perf_counter() - start, "peak_bytes": peak.take()}
            return result

        drawing = (width, count, batch, 1, SHIFT, parts / "samples", names)
        scorer = timed("sums", filled, *drawing)
        for name in names:
            steps[name]["values"] = timed(name, score, name, scorer, reference, mesh)
    return {"count": count, "peak_bytes_before": before, "steps": steps}


def check(width: int, counts: Sequence[int]) -> list[dict[str, float]]:
    """The statistics of two sets of so many rows each against numpy's and scipy's, float64.

    The distance is compared with scipy's square root of a matrix, and with the sum of the singular
    values of A B^T, which is the trace of that root where the covariances are A^T A and B^T B.
    """
    print(f"{'rows':>8}{'mean':>10}{'covariance':>12}{'sqrtm':>10}{'A B^T':>10}  warned")
    results = []
    for count in counts:
        mixing = np.random.default_rng(2).standard_normal((width, width)) / np.sqrt(width)
        sets = [
            np.concatenate([rows for _, rows in drawn(width, count, 500, seed, seed * SHIFT)])
            for seed in (0, 1)
        ]
        sets = [np.maximum(rows @ mixing.astype(np.float32), 0.0) for rows in sets]
        ours = [_streamed(rows) for rows in sets]
        exact = [rows.astype(np.float64) for rows in sets]
        theirs = [Moments(x.mean(axis=0), np.cov(x, rowvar=False)) for x in exact]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", SingularCovarianceWarning)
            distance = frechet_distance(*ours)
        first, second = theirs
        shift = first.mean - second.mean
        without = shift @ shift + np.trace(first.covariance + second.covariance)
        root = scipy.linalg.sqrtm(first.covariance @ second.covariance)
        a, b = ((x - x.mean(axis=0)) / np.sqrt(count - 1) for x in exact)
        nuclear = np.linalg.svd(a @ b.T, compute_uv=False).sum()
        row = {
            "rows": count,
            "mean": max(
                _apart(our.mean, their.mean) for our, their in zip(ours, theirs, strict=True)
            ),
            "covariance": max(
                _apart(our.covariance, their.covariance)
                for our, their in zip(ours, theirs, strict=True)
            ),
            "distance": distance,
            "distance_sqrtm": _apart(distance, without - 2.0 * np.trace(np.real(root))),
            "distance_singular_values": _apart(distance, without - 2.0 * nuclear),
            "warnings": len(caught),
        }
        results.append(row)
        print(
            f"{count:8d}{row['mean']:10.1e}{row['covariance']:12.1e}{row['distance_sqrtm']:10.1e}"
            f"{row['distance_singular_values']:10.1e}  {row['warnings']}",
            flush=True,
        )
    return results


def _streamed(rows: np.ndarray, batch: int = 500) -> Moments:
    moments = RunningMoments(rows.shape[1])
    for start in range(0, len(rows), batch):
        moments.add(rows[start : start + batch])
    return moments.reduced()


def _apart(ours: Any, theirs: Any) -> float:
    """Largest difference over the largest number."""
    return float(np.max(np.abs(ours - theirs)) / np.max(np.abs(theirs)))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """In markdown: seconds and MiB of every step, a line for each count."""
    steps = list(rows[0]["steps"])
    lines = [
        "| rows | " + " | ".join(f"{step.replace('_', ' ')}, s | MiB" for step in steps) + " |",
        "|--:" * (1 + 2 * len(steps)) + "|",
    ]
    for row in rows:
        cells = [f"{row['count']:,}"]
        for step in steps:
            found = row["steps"][step]
            cells += [f"{found['seconds']:.1f}", f"{found['peak_bytes'] / 2**20:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def in_a_process(options: argparse.Namespace, count: int) -> dict[str, Any]:
    """`measure` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.metrics", f"--child={count}"]
    command += [f"--{name}={getattr(options, name)}" for name in ("references", "width", "batch")]
    command += ["--scores", *options.scores]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measures each count in a process of its own, prints a table, writes a JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--counts", type=int, nargs="+", default=[12_500, 25_000, 50_000])
    parser.add_argument("--references", type=int, default=10_000, help="rows of the reference")
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=500)
    parser.add_argument("--scores", nargs="+", choices=SCORES, default=list(SCORES))
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/metrics.json"))
    parser.add_argument("--check", action="store_true", help="compare with numpy and scipy instead")
    parser.add_argument("--check_counts", type=int, nargs="+", default=[1_000, 4_000])
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        result = measure(
            options.child, options.references, options.width, options.batch, options.scores
        )
        print(json.dumps(result))
        return
    print(f"{hardware()}, JAX {jax.__version__}; rows of {options.width}", flush=True)
    if options.check:
        check(options.width, options.check_counts)
        return
    rows = []
    for count in options.counts:
        rows.append(in_a_process(options, count))
        print(table(rows[-1:]), flush=True)
    record = {
        "hardware": hardware(),
        "jax": jax.__version__,
        **{name: getattr(options, name) for name in ("width", "batch", "scores", "references")},
        "rows": rows,
    }
    options.json.write_text(json.dumps(record, indent=2) + "\n")
    print(f"{table(rows)}\nwrote {options.json}")


if __name__ == "__main__":
    main()
