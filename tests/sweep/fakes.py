"""Where the stand-ins are, and what they left."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from dydilit_jax.config import Config
from dydilit_jax.drawing import save_png

FAKE = Path(__file__).parent / "fake_train.py"


def fake_command(workdir: Path) -> Callable[..., list[str]]:
    """The command of a fake run: its overrides' flags are not for it, its name is."""

    def command(run):
        return [sys.executable, "-S", str(FAKE), str(workdir / run.name), *run.arguments]

    return command


def starts(workdir: Path) -> list[int]:
    """Steps that a run was started at."""
    path = workdir / "starts.txt"
    return [int(line.split()[0]) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for(condition: Callable[[], object], seconds: float = 30.0) -> None:
    """Waits until the condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.02)


def finished_run(folder: Path, config: Config, seed: int = 0, points: int = 10) -> None:
    """A workdir as training leaves it: config, losses, scores, a checkpoint and a grid."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(config.to_json())
    steps = np.linspace(0, config.train.steps, points + 1).astype(int)[1:]
    floor = 0.2 + 0.3 * rng.random()
    lines = [
        {
            "step": int(step),
            "loss": floor + float(np.exp(-3 * step / config.train.steps) + 0.02 * rng.random()),
            "gradient_norm": float(rng.random()),
            "usage/query_projector": [[0.5, 0.5]],
            "time/data": 0.1,
        }
        for step in steps
    ]
    lines.append({"step": config.train.steps, "pixel_frechet": floor, "label_agreement": 0.9})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    checkpoint = folder / "checkpoints" / str(config.train.steps)
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
    (folder / "samples").mkdir()
    picture = (255 * rng.random((16, 40, 3))).astype(np.uint8)
    save_png(picture, folder / "samples" / f"step_{config.train.steps:06d}.png")
