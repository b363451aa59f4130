"""Chaos: a run that is killed again and again ends bit for bit as one that never was.

    python -m benchmarks.chaos            # 20 kills; also: make chaos

Trains a small DyDi-LiT on digits twice with the same command. The one run is left alone. The other
gets SIGKILL at random moments (seeded): while it starts, between steps, while a checkpoint is
written, and between a checkpoint's last byte and the record that makes it one; and after some of
the kills the newest checkpoint is damaged (a file cut short, deleted, or with one bit turned).
Then parameters, optimizer, average, key, position of the data, logged losses and sample grids are
compared, byte by byte. Exit status 1 if anything differs. The report goes to
benchmarks/results/chaos.json.

Each run is a process of its own, forked from a server that has imported the libraries.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import platform
import random
import runpy
import sys
import tempfile
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

PRELOADED = [
    "sklearn.datasets",
    "tensorflow",
    "clu.metric_writers",
    "ml_collections.config_flags",
    "dydilit_jax.training.loop",
]
CLOCK = ("steps_per_second", "images_per_second", "time/", "throughput/", "memory/")
FIELDS = {
    "model.depth": 2,
    "model.width": 32,
    "model.attention.heads": 2,
    "data.batch_size": 32,
    "train.checkpoint_every": 4,
    "train.log_every": 2,
    "train.sample_every": 40,
    "train.keep_checkpoints": 3,
    "sampling.steps": 2,
    "sampling.grid_rows": 1,
    "evaluation.num": 0,
}
MODES = ("starting", "between steps", "while saving", "before the record")
DAMAGES = ("cut short", "deleted", "one bit turned")


@dataclasses.dataclass
class Kill:
    """One SIGKILL.

    Attributes:
      mode: what the run was to be doing.
      target: checkpoint that was waited for.
      seconds: after the process started.
      checkpoint: newest finished one at the kill, 0 for none.
      logged: newest step in metrics.jsonl at the kill.
      unfinished: a checkpoint was being written at the kill.
      damaged: what was done to the newest checkpoint afterwards.
      told: lines of the next start on what it skipped and where it went on.
    """

    mode: str
    target: int
    seconds: float = 0.0
    checkpoint: int = 0
    logged: int = 0
    unfinished: bool = False
    damaged: str = ""
    told: list[str] = dataclasses.field(default_factory=list)


def without_clock(record: dict[str, Any]) -> dict[str, Any]:
    """A record of metrics.jsonl without what the clock and the machine decide."""
    return {name: value for name, value in record.items() if not name.startswith(CLOCK)}


def run_command(arguments: list[str], log: str, compiled: str) -> None:
    """In the child: `python -m dydilit_jax.train ARGUMENTS`, output to a file.

    Args:
      arguments: of the command.
      log: file for its output.
      compiled: folder of compiled programs, so that no start compiles what another did.
    """
    import jax

    jax.config.update("jax_compilation_cache_dir", compiled)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = ["dydilit_jax.train", *arguments]
    runpy.run_module("dydilit_jax.train", run_name="__main__", alter_sys=True)


class Chaos:
    """Runs one command many times.

    Args:
      root: folder of the workdirs.
      arguments: of the command, without --workdir.
      seed: of everything that is random here.
    """

    def __init__(self, root: Path, arguments: list[str], seed: int):
        self.root, self.arguments = root, arguments
        self.random = random.Random(seed)
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOADED)

    def start(self, workdir: Path) -> BaseProcess:
        """Starts the command in a process of its own."""
        log = workdir.with_suffix(".log")
        process = self.context.Process(
            target=run_command,
            args=(
                [*self.arguments, f"--workdir={workdir}"],
                str(log),
                str(self.root / "compiled"),
            ),
        )
        process.start()
        return process

    def finish(self, workdir: Path) -> tuple[float, float]:
        """Runs the command to its end; seconds until its first logged step, and in all.

        Raises:
          RuntimeError: it fails.
        """
        started = time.perf_counter()
        first = 0.0
        process = self.start(workdir)
        while process.is_alive():
            process.join(0.05)
            if not first and (workdir / "metrics.jsonl").exists():
                first = time.perf_counter() - started
        if process.exitcode != 0:
            log = workdir.with_suffix(".log").read_text()
            raise RuntimeError(f"the run ended with status {process.exitcode}:\n{log[-4000:]}")
        return first, time.perf_counter() - started

    def kill(self, workdir: Path, kill: Kill, start_seconds: float) -> None:
        """Starts the command, waits for the moment, and kills it."""
        started = time.perf_counter()
        process = self.start(workdir)
        if kill.mode == "starting":
            time.sleep(self.random.uniform(0.0, start_seconds))
        else:
            while process.is_alive() and not self._moment(workdir, kill):
                time.sleep(0.0005)
            pause = {"between steps": 0.2, "while saving": 0.03}.get(kill.mode, 0.0)
            time.sleep(self.random.uniform(0.0, pause))
        process.kill()
        process.join()
        if process.exitcode != -9:
            raise RuntimeError(f"{kill}: the run ended with {process.exitcode} before the kill")
        kill.seconds = round(time.perf_counter() - started, 3)
        kill.checkpoint = max(finished(workdir), default=0)
        kill.logged = last_logged(workdir)
        kill.unfinished = bool(unfinished(workdir))

    def _moment(self, workdir: Path, kill: Kill) -> bool:
        if max(finished(workdir), default=0) < kill.target:
            return False
        if kill.mode == "while saving":
            return any("tmp" in name for name in unfinished(workdir))
        if kill.mode == "before the record":
            return any("tmp" not in name for name in unfinished(workdir))
        return True

    def damage(self, workdir: Path) -> str:
        """Damages one file of the newest checkpoint if there is one before it; says what it did."""
        steps = finished(workdir)
        if len(steps) < 2:
            return ""
        folder = workdir / "checkpoints" / str(max(steps))
        files = sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size)
        path = self.random.choice(files)
        how = self.random.choice(DAMAGES)
        content = bytearray(path.read_bytes())
        if how == "cut short":
            os.truncate(path, self.random.randrange(len(content)))
        elif how == "deleted":
            path.unlink()
        else:
            content[self.random.randrange(len(content))] ^= 1 << self.random.randrange(8)
            path.write_bytes(content)
        return f"{path.relative_to(folder.parent)} {how}"


def finished(workdir: Path) -> list[int]:
    """Steps of the checkpoints that have their record."""
    return [int(name) for name in names(workdir) if name.isdigit() and has_record(workdir, name)]


def unfinished(workdir: Path) -> list[str]:
    """Names of what is no checkpoint yet."""
    return [name for name in names(workdir) if name[0].isdigit() and not has_record(workdir, name)]


def names(workdir: Path) -> list[str]:
    """Names in the folder of checkpoints."""
    try:
        return os.listdir(workdir / "checkpoints")  # noqa: PTH208 (asked thousands of times)
    except FileNotFoundError:
        return []


def has_record(workdir: Path, name: str) -> bool:
    """Whether a checkpoint's manifest is there."""
    return (workdir / "checkpoints" / name / "manifest.json").exists()


def last_logged(workdir: Path) -> int:
    """Newest whole line's step in metrics.jsonl."""
    from dydilit_jax.training.writers import read_metrics

    return max((record["step"] for record in read_metrics(workdir)), default=0)


def final_state(workdir: Path) -> dict[str, bytes]:
    """All that the newest checkpoint holds, by name, as bytes."""
    import jax
    import numpy as np

    from dydilit_jax.training.checkpoint import Checkpointer, load_config
    from dydilit_jax.training.sharding import make_mesh, path_of
    from dydilit_jax.training.state import Network, abstract_state

    config = load_config(workdir)
    abstract = abstract_state(Network.create(config), make_mesh(config.mesh))
    checkpointer = Checkpointer(workdir)
    state, data = checkpointer.restore(abstract)
    checkpointer.close()
    plain = dataclasses.replace(state, key=jax.random.key_data(state.key))
    leaves = jax.tree_util.tree_flatten_with_path(plain)[0]
    arrays = {path_of(path): np.asarray(leaf).tobytes() for path, leaf in leaves}
    return arrays | {"data": json.dumps(data, sort_keys=True).encode()}


def compare(one: Path, other: Path) -> dict[str, list[str]]:
    """What differs between two finished runs: arrays, logged records, sample grids."""
    from dydilit_jax.training.writers import read_metrics

    states = final_state(one), final_state(other)
    records: list[list[dict[str, Any]]] = [
        [without_clock(record) for record in read_metrics(workdir)] for workdir in (one, other)
    ]
    grids = [{p.name: p.read_bytes() for p in (w / "samples").glob("*")} for w in (one, other)]

    def differing(a: dict[Any, Any], b: dict[Any, Any]) -> list[str]:
        return sorted(str(name) for name in a.keys() | b.keys() if a.get(name) != b.get(name))

    return {
        "arrays": differing(*states),
        "records": differing(*(dict(enumerate(r)) for r in records)),
        "grids": differing(*grids),
    }


def plan(kills: int, steps: int, every: int, damages: int) -> tuple[list[Kill], set[int]]:
    """Kills, all modes in turn, spread over the run; the numbers of those followed by damage."""
    planned = []
    for i in range(kills):
        target = (i + 1) * steps // (kills + 2) // every * every
        planned.append(Kill(MODES[(i + 1) % len(MODES)], target))
    spread = {round((i + 1) * kills / (damages + 1)) for i in range(damages)}
    return planned, spread


def chaos(
    root: Path,
    arguments: list[str],
    *,
    kills: int,
    steps: int,
    every: int,
    damages: int,
    seed: int,
    warm_up: bool = True,
) -> dict[str, Any]:
    """The two runs and their comparison.

    Args:
      root: an empty folder.
      arguments: of the training command, without --workdir.
      kills: SIGKILLs.
      steps: of the run.
      every: steps between its checkpoints.
      damages: kills after which the newest checkpoint is damaged.
      seed: of times and damages.
      warm_up: let another run compile first, so that the time a start takes is known.

    Returns:
      The report, as JSON holds it; `equal` says how it ended.
    """
    straight, killed = root / "straight", root / "killed"
    runs = Chaos(root, arguments, seed)
    if warm_up:
        runs.finish(root / "warmup")
    first, seconds = runs.finish(straight)
    print(f"without interruption: {seconds:.1f} s, {first:.1f} s to start", flush=True)
    planned, damaged = plan(kills, steps, every, damages)
    log = killed.with_suffix(".log")
    read = 0
    for i, kill in enumerate(planned):
        runs.kill(killed, kill, start_seconds=first)
        if i > 0:
            planned[i - 1].told = told(log, read)
        read = log.stat().st_size if log.exists() else 0
        if i in damaged:
            kill.damaged = runs.damage(killed)
        print(f"kill {i + 1:2d}: {summary(kill)}", flush=True)
    runs.finish(killed)
    planned[-1].told = told(log, read)
    differing = compare(straight, killed)
    return {
        "hardware": f"{os.cpu_count()} cores, {platform.machine()}",
        "command": ["python", "-m", "dydilit_jax.train", *arguments],
        "seed": seed,
        "steps": steps,
        "checkpoint_every": every,
        "kills": [dataclasses.asdict(kill) for kill in planned],
        "kills_by_mode": {m: sum(k.mode == m for k in planned) for m in MODES},
        "kills_in_a_save": sum(kill.unfinished for kill in planned),
        "damaged_checkpoints": sum(bool(kill.damaged) for kill in planned),
        "arrays_compared": len(final_state(straight)),
        "differing": differing,
        "equal": not any(differing.values()),
    }


def told(log: Path, start: int) -> list[str]:
    """What a start said of checkpoints, in the part of the log from byte `start` on."""
    text = log.read_bytes()[start:].decode(errors="replace") if log.exists() else ""
    return [
        line
        for line in text.splitlines()
        if "is skipped" in line or "resumed" in line or "and skipped" in line
    ]


def summary(kill: Kill) -> str:
    """One line."""
    return (
        f"{kill.mode:17s} after {kill.seconds:5.2f} s, checkpoint {kill.checkpoint:3d}, "
        f"logged {kill.logged:3d}{', in a save' if kill.unfinished else ''}"
        f"{', then ' + kill.damaged if kill.damaged else ''}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--damages", type=int, default=6)
    parser.add_argument("--steps", type=int, default=180)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/chaos.json"))
    given = parser.parse_args()
    fields = FIELDS | {"train.steps": given.steps}
    arguments = ["--config=configs/digits.py", *(f"--config.{k}={v}" for k, v in fields.items())]
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        report = chaos(
            Path(folder),
            arguments,
            kills=given.kills,
            steps=given.steps,
            every=FIELDS["train.checkpoint_every"],
            damages=given.damages,
            seed=given.seed,
        )
    report["seconds"] = round(time.perf_counter() - started, 1)
    print(
        f"{len(report['kills'])} kills ({report['kills_in_a_save']} with a checkpoint unfinished), "
        f"{report['damaged_checkpoints']} damaged checkpoints, {report['seconds']:.0f} s"
    )
    print(f"{report['arrays_compared']} arrays, logged records and sample grids: ", end="")
    print("equal, bit for bit" if report["equal"] else f"DIFFERENT: {report['differing']}")
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(json.dumps(report, indent=1) + "\n")
    sys.exit(0 if report["equal"] else 1)


if __name__ == "__main__":
    main()
