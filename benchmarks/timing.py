"""What benchmarks share: timing functions in turn within one run, and tables of the medians."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def alternating_medians(
    functions: dict[str, Callable[..., Any]],
    arguments: Sequence[Any],
    repeats: int,
    *,
    warmups: int = 2,
) -> dict[str, float]:
    """Compile each function, then time them in turn; return the median seconds of each.

    Args:
      functions: functions of `arguments`, by the name of their row.
      arguments: arrays on the device.
      repeats: timed calls of each function.
      warmups: calls of each function before, the first of which compiles it.
    """
    compiled = {name: jax.jit(function) for name, function in functions.items()}
    for function in compiled.values():
        for _ in range(warmups):
            jax.block_until_ready(function(*arguments))
    seconds: dict[str, list[float]] = {name: [] for name in compiled}
    for _ in range(repeats):
        for name, function in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(function(*arguments))
            seconds[name].append(time.perf_counter() - start)
    return {name: float(np.median(values)) for name, values in seconds.items()}


def report(title: str, columns: dict[str, dict[str, float]], unit: str) -> dict[str, Any]:
    """Print a table of milliseconds and ratios, and return the same figures for a JSON file.

    Args:
      title: what was measured.
      columns: for each pass, the median seconds by row.
      unit: the row to which ratios are taken.
    """
    device = jax.devices()[0].device_kind
    print(f"{title}; device {device}, JAX {jax.__version__}; ratios to {unit!r}")
    rows = list(dict.fromkeys(row for column in columns.values() for row in column))
    width = max(len(row) for row in rows)
    header = "".join(f"{f'{name}, ms':>24}{'ratio':>8}" for name in columns)
    print(f"{'':<{width}}{header}")
    for row in rows:
        cells = ""
        for column in columns.values():
            if row in column:
                cells += f"{1e3 * column[row]:24.3f}{column[row] / column[unit]:8.2f}"
            else:
                cells += f"{'-':>24}{'-':>8}"
        print(f"{row:<{width}}{cells}")
    return {
        "title": title,
        "device": device,
        "jax": jax.__version__,
        "unit": unit,
        "seconds": columns,
    }


def copy_bandwidth(size: int, repeats: int = 11) -> float:
    """Bytes per second of a copy on the device, reads and writes counted.

    Args:
      size: bytes of the array; beyond every cache.
      repeats: timed calls.
    """
    array = jnp.zeros(size // 4, jnp.float32)
    # An addition, so that the compiler cannot hand back the argument itself.
    seconds = alternating_medians({"copy": lambda x: x + 1.0}, (array,), repeats)["copy"]
    return 2 * array.nbytes / seconds


def hardware() -> str:
    """The device's name; for a CPU, its model and the number of cores, as Linux tells them."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return str(device.device_kind)
    import os
    import platform
    from pathlib import Path

    model = platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].partition(":")[2].strip() if lines else model
    return f"{os.cpu_count()} cores of {model}"


def file_name(device: str) -> str:
    """A device's name as part of a file's."""
    return "_".join("".join(c if c.isalnum() else " " for c in device).lower().split())
