"""What DyDi-LiT-XL/2 would take on three slices at three sizes: the table of docs/compile.md.

    .venv-tpu/bin/python -m benchmarks.compile_table [--json FILE] [--cells 256/v5e:16x16 ...]

Every cell is a search over meshes and rematerialisations (dydilit_jax.compile --search) of the same
breadth, --compiles programs, so this takes about an hour. What is in the file already is not
compiled again. The batch is DiT's, 256, or one image a chip where there are more chips, over as
many steps as see DiT's images: 400,000 batches of 256. At 1,024 pixels the latents are 128 x 128
and an image 4,096 tokens.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dydilit_jax.config import Config
from dydilit_jax.training.compile_report import mesh_text, report
from dydilit_jax.training.compile_search import line, search
from dydilit_jax.training.lowering import compile_program
from dydilit_jax.training.topology import Topology, open_topology

RESULTS = Path(__file__).parent / "results"
CONFIGS = Path(__file__).parent.parent / "configs"
TOPOLOGIES = ("v5e:16x16", "v6e:16x16", "v5p:8x8x16")
PIXELS = (256, 512, 1024)
BATCH, STEPS = 256, 400_000
LATENT_FACTOR = 8


def config_of(pixels: int, chips: int) -> Config:
    """The run: ImageNet's config of the size, or of 512 pixels with larger images."""
    name = "imagenet256.py" if pixels == 256 else "imagenet512.py"
    fields = runpy.run_path(str(CONFIGS / name))["get_config"]("size=XL")
    batch = max(BATCH, chips)
    fields.model.image_size = pixels // LATENT_FACTOR
    fields.data.image_size = pixels
    fields.data.batch_size = batch
    fields.train.steps = STEPS * BATCH // batch
    return Config.from_dict(fields)


class Tried(NamedTuple):
    """A program's account, and what the search reads of a program."""

    account: dict[str, Any]
    fits: bool
    seconds: float


def cell(pixels: int, name: str, compiles: int, known: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The accounts of all programs of a search, the best first; known ones are not compiled."""

    def compile(config: Config, topology: Topology, what: str) -> Any:
        wanted = (dataclasses.asdict(config.mesh), config.model.rematerialisation)
        for account in known:
            if (account["mesh"], account["rematerialisation"]) == wanted:
                return Tried(account, account["fits"], account["compile_seconds"])
        program = compile_program(config, topology, what)
        print(f"{pixels} {name}: {line(program)}", flush=True)
        return Tried(report(program), program.fits, program.seconds)

    topology = open_topology(name)
    config = config_of(pixels, topology.chips)
    tried: list[Any] = list(search(config, topology, "train", compiles, compile))
    accounts = sorted((each.account for each in tried), key=_without_overlap)
    return {"pixels": pixels, "topology": name, "compiles": compiles, "candidates": accounts}


def _without_overlap(account: dict[str, Any]) -> float:
    return account["estimate"]["seconds"][1] if account["fits"] else math.inf


def table(cells: Sequence[dict[str, Any]]) -> str:
    """The best candidate of each cell, as Markdown."""
    head = (
        "| pixels | slice | batch | mesh | remat | GiB a chip | TFLOP a chip | bound | ms a step "
        "| MFU | images a second | days | chip-hours |"
    )
    rows = [head, "|" + "---|" * 13]
    for each in cells:
        best = each["candidates"][0]
        memory = best["memory"]
        start = f"| {each['pixels']} | {each['topology']} | {best['images']} "
        if not best["fits"]:
            rows.append(f"{start}| does not fit |" + " |" * 9)
            continue
        numbers = best["estimate"]

        def pair(name: str, form: str, scale: float = 1.0, numbers: Any = numbers) -> str:
            low, high = numbers[name]
            return f"{low * scale:{form}} to {high * scale:{form}}"

        rows.append(
            f"{start}| {mesh_text(best['mesh'])} | {best['rematerialisation']} "
            f"| {memory['total'] / 2**30:.1f} of {memory['capacity'] / 2**30:.0f} "
            f"| {best['flops_per_device'] / 1e12:.2f} | {numbers['bound']} "
            f"| {pair('seconds', '.1f', 1e3)} | {pair('mfu', '.0%')} "
            f"| {pair('images_per_second', ',.0f')} | {pair('days', '.2f')} "
            f"| {pair('chip_hours', ',.0f')} |"
        )
    return "\n".join(rows)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    everything = [f"{pixels}/{name}" for pixels in PIXELS for name in TOPOLOGIES]
    parser.add_argument("--cells", nargs="*", default=everything)
    parser.add_argument("--compiles", type=int, default=2, help="programs a cell, at most")
    parser.add_argument("--json", type=Path, default=RESULTS / "compile_table.json")
    options = parser.parse_args(arguments)
    saved: list[dict[str, Any]] = []
    if options.json.exists():
        saved = json.loads(options.json.read_text())["cells"]
    done = {f"{each['pixels']}/{each['topology']}": each for each in saved}
    for name in options.cells:
        before = done.get(name, {"candidates": []})
        if before.get("compiles") != options.compiles:
            pixels, topology = name.split("/")
            done[name] = cell(int(pixels), topology, options.compiles, before["candidates"])
            ordered = [done[each] for each in everything if each in done]
            options.json.write_text(json.dumps({"cells": ordered}, indent=1) + "\n")
    print(table([done[each] for each in everything if each in done]))


if __name__ == "__main__":
    main()
