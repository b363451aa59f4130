"""`python -m dydilit_jax.compile` with the TPU's real compiler: memory, FLOPs, search, limits."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

pytest.importorskip("libtpu", reason="compiling for a TPU needs libtpu: make test-tpu-compile")

from dydilit_jax.autoencoders.kl import KLConfig
from dydilit_jax.autoencoders.weights import KNOWN
from dydilit_jax.errors import UserError
from dydilit_jax.models.count import count_parameters, multiply_adds, parameter_table
from dydilit_jax.training.collectives import table
from dydilit_jax.training.compile_report import text
from dydilit_jax.training.decoding import DECODED_AT_ONCE
from dydilit_jax.training.lowering import compile_program, mesh_of
from dydilit_jax.training.sharding import AXES
from dydilit_jax.training.state import Network
from dydilit_jax.training.topology import open_topology
from tests.tiny import plain_config, tiny_config

DEVICES, IMAGES = 8, 1024
KL = "sd-vae-ft-ema"


@pytest.fixture(scope="module")
def topology():
    return open_topology("v5e:2x4")


@pytest.fixture(scope="module")
def step(topology):
    """A step of 1,024 images of 256 tokens, the parameters cut over four devices."""
    config = plain_config(
        model={
            "image_size": 64,
            "width": 128,
            "depth": 3,
            "dtype": "bfloat16",
            "scan_layers": True,
        },
        data={"batch_size": IMAGES},
        mesh={"data": 2, "fsdp": 4},
    )
    return compile_program(config, topology, "train")


def test_the_state_is_counted_as_the_rules_cut_it(step):
    """Matrices in four parts, everything else whole; two moments and an average beside them."""
    network = Network.create(step.config)
    parts = [
        count // (4 if path.split("/")[-1] in ("kernel", "embedding") else 1)
        for path, _, _, count in parameter_table(network.abstract_parameters())
        if "depthwise" not in path
    ]
    whole = [
        count
        for path, _, _, count in parameter_table(network.abstract_parameters())
        if "depthwise" in path
    ]
    total = 4 * (sum(parts) + sum(whole))
    assert step.memory.parameters == total
    counters = step.memory.optimizer - 2 * total
    assert 0 <= counters <= 16
    assert step.memory.ema == total + 4
    assert step.fits
    assert step.memory.total < step.topology.chip.hbm


def test_flops_are_those_of_the_model_and_little_more(step):
    """Inputs of the first layers need no gradient; the attention core is a kernel."""
    macs = sum(multiply_adds(step.config.model, 1).values())
    assert step.model_flops == 6 * macs * IMAGES
    share = step.roofline.flops * DEVICES / step.model_flops
    assert 0.95 < share < 1.02
    assert step.notes == ()  # every kernel's formula is known, every loop's length


def test_gradients_cross_the_axes_that_they_must(step):
    """Each device's part of the parameters' gradients goes over `data` once, in float32."""
    rows = table(step.collectives)
    over_data = sum(
        row["bytes"] for row in rows if "data" in row["axes"] and row["kind"] == "all-reduce"
    )
    assert over_data >= step.memory.parameters
    assert any(row["axes"] == ["fsdp"] for row in rows)


def test_the_forward_pass_keeps_at_least_each_blocks_input(step):
    """128 images of 256 tokens in bfloat16, three times; and no more than a few dozen of those."""
    least = 3 * (IMAGES // DEVICES) * 256 * 128 * 2
    assert least <= step.memory.activations <= 60 * least


def test_a_program_that_cannot_fit_says_so(topology):
    """128 images of 1,024 tokens on each chip, and all that twelve blocks keep of them."""
    config = plain_config(
        model={"image_size": 128, "width": 512, "depth": 12, "scan_layers": True},
        data={"batch_size": 1024},
    )
    program = compile_program(config, topology, "train")
    short = program.shortage
    assert short is not None
    assert short.needed is not None
    assert short.available is not None
    assert short.needed > short.available > 15 * 2**30
    assert "HBM" in short.message.upper()
    assert program.memory.parameters == 4 * count_parameters(config.model, 1)


def test_a_state_that_cannot_fit_is_not_compiled(topology):
    config = plain_config(model={"width": 16384, "depth": 8, "attention": {"heads": 64}})
    program = compile_program(config, topology, "train")
    assert program.shortage is not None
    assert "nothing was compiled" in program.shortage.message
    assert program.seconds == 0


def test_the_command_searches_and_writes(command, tmp_path):
    out = tmp_path / "account.json"
    code, output, errors = command(
        "dydilit_jax.compile",
        "--config=configs/digits.py:attention=relu,feedforward=mlp",
        "--topology=v5e:2x2",
        "--config.model.scan_layers=true",
        "--config.model.depth=1",
        "--search",
        "--search_compiles=2",
        f"--json={out}",
    )
    assert code == 0, errors
    accounts = json.loads(out.read_text())["candidates"]
    assert len(accounts) == 2
    times = [account["estimate"]["seconds"][1] for account in accounts]
    assert times == sorted(times)
    assert {tuple(account["mesh"][axis] for axis in AXES) for account in accounts} == {
        (1, 4, 1, 1),
        (4, 1, 1, 1),
    }
    for part in ("ranked by", "nothing was timed", "fits:", "chip-hours", "1,400 steps"):
        assert part in output


def test_the_sampler_is_compiled_with_its_loop(topology):
    """Three steps of guided sampling: three passes of twice the images."""
    config = plain_config(
        sampling={"steps": 3, "batch_size": 12, "guidance_scale": 2.0},
    )
    program = compile_program(config, topology, "sample")
    assert program.images == 16  # rounded up to the devices
    macs = sum(multiply_adds(config.model, 1).values())
    assert program.model_flops == 2 * macs * 16 * 3 * 2
    assert program.roofline is not None
    assert 0.9 < program.roofline.flops * DEVICES / program.model_flops < 1.3
    assert program.memory.optimizer == program.memory.activations == 0


def test_the_decoder_is_compiled_for_one_hosts_devices(monkeypatch):
    """Of 256 devices a host has four; they decode apart, with all weights each.

    On a slice of this size libtpu refuses one program over those four alone.
    """
    slice_of_256 = open_topology("v5e:16x16")
    sizes = KLConfig(block_out_channels=(16,), layers_per_block=1, norm_num_groups=4)
    monkeypatch.setitem(KNOWN, KL, dataclasses.replace(KNOWN[KL], sizes=sizes))
    config = plain_config(model={"image_size": 8, "channels": 4}, autoencoder={"weights": KL})
    program = compile_program(config, slice_of_256, "decode")
    assert program.mesh == {"batch": 4}
    assert program.images == 4 * DECODED_AT_ONCE
    assert program.fits
    assert program.collectives == ()
    assert program.roofline is not None
    # Of 3 x 3 convolutions of 8 x 8 pixels the compiler leaves out what lies beyond the border.
    assert (22 / 24) ** 2 < program.roofline.flops * 4 / program.model_flops < 1
    told = text(program)
    assert f"decoding by {KL} of 32 images, latents of 8 x 8 x 4 each" in told
    assert "50,000 images" in told
    pixels = plain_config(autoencoder={"weights": KL})
    with pytest.raises(UserError, match="latents of 4 channels, the network draws 1"):
        compile_program(pixels, slice_of_256, "decode")
    with pytest.raises(UserError, match="nothing to decode"):
        compile_program(plain_config(), slice_of_256, "decode")


def test_an_axis_may_go_along_part_of_a_dimension():
    """128 parts, the most that XL's width takes, on 16 x 16 chips."""
    config = tiny_config(data={"batch_size": 256}, mesh={"data": 2, "fsdp": 128})
    mesh = mesh_of(config, open_topology("v5e:16x16"))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 128, "tensor": 1, "sequence": 1}
    assert len(set(np.asarray(mesh.devices).flat)) == 256
