"""A compiled program's account, as text for people and as a dict for programs."""

from __future__ import annotations

from typing import Any

import jax

from dydilit_jax.training.collectives import table
from dydilit_jax.training.lowering import Program
from dydilit_jax.training.roofline import SECONDS_A_DAY, Roofline

GIB = 2**30
SAMPLES = 50_000  # images that FID-50K is measured on
ESTIMATE = (
    "from the compiled program and data sheets, nothing was timed; from all communication hidden "
    "behind computation to none of it"
)
MEMORY_ROWS = (
    ("parameters", "parameters"),
    ("optimizer", "optimizer"),
    ("ema", "moving average"),
    ("other_arguments", "batch, padding"),
    ("activations", "activations"),
    ("temporaries", "temporaries"),
    ("outputs", "outputs"),
    ("code", "program"),
)


def report(program: Program) -> dict[str, Any]:
    """Everything that is known of a program, as JSON takes it; bytes, seconds, FLOPs.

    Estimates are pairs: with all collectives overlapped, with none.
    """
    topology, model, config = program.topology, program.config.model, program.config
    chip = topology.chip
    result: dict[str, Any] = {
        "program": program.what,
        "fits": program.fits,
        "topology": {
            "name": topology.name,
            "chips": topology.chips,
            "devices": len(topology.devices),
            "device": chip._asdict() | {"kinds": list(chip.kinds)},
        },
        "mesh": program.mesh,
        "rematerialisation": model.rematerialisation,
        "images": program.images,
        "tokens": model.tokens,
        "accumulation_steps": config.optimizer.accumulation_steps,
        "memory": {name: getattr(program.memory, name) for name, _ in MEMORY_ROWS}
        | {
            "total": program.memory.total,
            "host": program.memory.host,
            "capacity": round(chip.hbm),
        },
        "compile_seconds": round(program.seconds, 1),
        "versions": {"jax": jax.__version__, "jaxlib": jax.lib.__version__},
        "notes": list(program.notes),
    }
    if program.shortage is not None:
        result["shortage"] = {
            "message": program.shortage.message,
            "needed": program.shortage.needed,
            "available": program.shortage.available,
        }
    if program.roofline is not None:
        result["flops_per_device"] = program.roofline.flops
        result["model_flops"] = program.model_flops
        result["hbm_bytes_per_device"] = program.roofline.hbm_bytes
        result["collectives"] = table(program.collectives)
        result["estimate"] = estimate(program, program.roofline)
    return result


def estimate(program: Program, line: Roofline) -> dict[str, Any]:
    """What follows from the roofline; pairs are (all overlapped, none)."""
    devices = program.devices
    seconds = (line.overlapped, line.serial)
    peak = program.topology.chip.flops * devices
    result: dict[str, Any] = {
        "what": ESTIMATE,
        "compute_seconds": line.compute,
        "memory_seconds": line.memory,
        "device_seconds": line.device,
        "network_seconds": line.network,
        "bound": line.bound,
        "seconds": list(seconds),
        "mfu": [program.model_flops / (peak * each) for each in seconds],
        "images_per_second": [program.images / each for each in seconds],
    }
    if program.what == "train":
        steps = program.config.train.steps
        days = [steps * each / SECONDS_A_DAY for each in seconds]
        result |= {"steps": steps, "days": days}
    else:
        days = [SAMPLES / program.images * each / SECONDS_A_DAY for each in seconds]
        result |= {"samples": SAMPLES, "days": days}
    result["chip_hours"] = [24 * each * program.topology.chips for each in days]
    return result


def text(program: Program) -> str:
    """The account for a terminal."""
    return "\n".join([*_head(program), "", *_memory(program), *_performance(program)])


def _head(program: Program) -> list[str]:
    topology, chip = program.topology, program.topology.chip
    model, config = program.config.model, program.config
    what = {
        "train": "training step",
        "sample": f"sampling, {config.sampling.steps} steps",
        "decode": f"decoding by {config.autoencoder.weights}",
    }
    accumulation = config.optimizer.accumulation_steps
    latents = f"latents of {model.image_size} x {model.image_size} x {model.channels}"
    size = latents if program.what == "decode" else f"{model.tokens} tokens"
    parts = f" in {accumulation} parts" if accumulation > 1 and program.what == "train" else ""
    policy = f"rematerialisation {model.rematerialisation}; " if program.what == "train" else ""
    return [
        f"{what[program.what]} of {program.images} images{parts}, {size} each",
        f"{topology.name}: {topology.chips} chips, {len(topology.devices)} devices of "
        f"{chip.flops / 1e12:g} TFLOP/s, {chip.hbm / GIB:.4g} GiB, {chip.hbm_bandwidth / 1e9:,.0f} "
        f"GB/s, links of {chip.link_bandwidth / 1e9:g} GB/s ({chip.source})",
        f"mesh {mesh_text(program.mesh)}; {policy}compiled in {program.seconds:.0f} s",
    ]


def mesh_text(mesh: dict[str, int]) -> str:
    """A mesh as flags set it, axes of length 1 left out."""
    return " ".join(f"{axis}={size}" for axis, size in mesh.items() if size > 1) or "data=1"


def _memory(program: Program) -> list[str]:
    memory, capacity = program.memory, program.topology.chip.hbm
    if program.shortage is not None:
        short = program.shortage
        lines = [f"does NOT fit: {short.message}"]
        lines += [
            f"  {name:<16}{getattr(memory, field) / GIB:10.3f} GiB on each device"
            for field, name in MEMORY_ROWS
            if getattr(memory, field)
        ]
        return [
            *lines,
            "cut more of the state (mesh.fsdp), keep less (model.rematerialisation=full, "
            "optimizer.accumulation_steps), or try --search",
        ]
    lines = [f"fits: {memory.total / GIB:.2f} of {capacity / GIB:.4g} GiB on each device"]
    lines += [
        f"  {name:<16}{getattr(memory, field) / GIB:10.3f} GiB"
        for field, name in MEMORY_ROWS
        if getattr(memory, field)
    ]
    if memory.host:
        lines.append(f"  {'on the host':<16}{memory.host / GIB:10.3f} GiB")
    return lines


def _performance(program: Program) -> list[str]:
    line = program.roofline
    if line is None:
        return []
    devices = program.devices
    numbers = estimate(program, line)
    share = program.model_flops / (line.flops * devices) if line.flops else 0.0
    lines = [
        "",
        f"FLOPs: {line.flops * devices / 1e12:,.4g} T on all devices, {line.flops / 1e12:.4g} T on "
        f"each; the model asks for {share:.0%} of them",
        f"HBM traffic: {line.hbm_bytes / 1e9:,.4g} GB on each device",
        "collectives, a device:",
        f"  {'kind':<20}{'axes':<16}{'count':>8}{'GB sent':>10}",
    ]
    lines += [
        f"  {row['kind']:<20}{'+'.join(row['axes']):<16}{row['count']:>8}"
        f"{row['sent_bytes'] / 1e9:>10.3f}"
        for row in table(program.collectives)
    ]
    lines += [
        "",
        f"ESTIMATE, {ESTIMATE}:",
        f"  compute {_time(line.compute)}, memory {_time(line.memory)}, together "
        f"{_time(line.device)}; network {_time(line.network)}; bound by {line.bound}",
        f"  {'step' if program.what == 'train' else 'batch':<18}"
        f"{_time(line.overlapped)} to {_time(line.serial)}",
        f"  {'MFU':<18}{_pair(numbers['mfu'], '.1%')}",
        f"  {'images a second':<18}{_pair(numbers['images_per_second'], ',.4g')}",
    ]
    if program.what == "train":
        goal = f"{numbers['steps']:,} steps"
    else:
        goal = f"{numbers['samples']:,} images"
    lines += [
        f"  {goal:<18}{_pair(numbers['days'], ',.3g')} days",
        f"  {'chip-hours':<18}{_pair(numbers['chip_hours'], ',.4g')}",
        *(f"note: {note}" for note in program.notes),
    ]
    return lines


def _pair(values: list[float], form: str) -> str:
    return f"{values[0]:{form}} to {values[1]:{form}}"


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:,.4g} ms"
