"""DyDi-LiT-XL/2's whole training step, with every kernel in it, compiled for eight TPU chips."""

from __future__ import annotations

import os

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

pytest.importorskip("libtpu", reason="compiling for a TPU needs libtpu: make test-tpu-compile")

from dydilit_jax.config import Config, DiffusionConfig
from dydilit_jax.kernels.platform import tracing_for
from dydilit_jax.models.config import ModelConfig, size_fields
from dydilit_jax.training.sharding import AXES, batch_sharding
from dydilit_jax.training.state import Network, abstract_state
from dydilit_jax.training.step import jit_step

IMAGES_ON_A_CHIP = 16
HBM = 16 * 2**30
KERNELS = (
    "dydila_forward",
    "dydila_backward",
    "projection_dx",
    "grouped_projection_dbank",
    "depthwise_backward",
)


def test_the_step_of_xl_compiles_with_the_kernels_in_it():
    """Its compilation fails where HBM or a kernel's VMEM overflows, as the chip would."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
    mesh = Mesh(np.array(devices).reshape(1, 8, 1, 1), AXES, axis_types=(AxisType.Auto,) * 4)
    config = Config(
        model=ModelConfig(
            dtype="bfloat16", rematerialisation="full", **size_fields("XL", "dydila", "mix")
        ),
        diffusion=DiffusionConfig(process="gaussian"),
    )
    network = Network.create(config)
    rows, images = batch_sharding(mesh), IMAGES_ON_A_CHIP * mesh.size
    batch = {
        "image": jax.ShapeDtypeStruct((images, 32, 32, 4), jnp.float32, sharding=rows),
        "label": jax.ShapeDtypeStruct((images,), jnp.int32, sharding=rows),
    }
    state = abstract_state(network, mesh)
    step = jit_step(network, mesh)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), tracing_for("tpu"):
        traced = step.trace(state, batch, None)
        program = traced.lower(lowering_platforms=("tpu",)).compile()
    text = program.as_text()
    for kernel in KERNELS:
        assert kernel in text, kernel
    # Attention core, two projections, depthwise terms of V and Mix-FFN, each in both directions.
    assert text.count('custom_call_target="tpu_custom_call"') >= 8
    memory = program.memory_analysis()
    held = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    assert held < HBM
