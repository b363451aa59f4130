"""The compile check: its search, its report, its mistakes; without a TPU's compiler."""

from __future__ import annotations

import dataclasses
import importlib.util
import json

import jax
import pytest

from dydilit_jax.config import MeshConfig
from dydilit_jax.errors import UserError
from dydilit_jax.training import compile_report, topology
from dydilit_jax.training.chips import CHIPS
from dydilit_jax.training.collectives import Collective
from dydilit_jax.training.compile_search import candidates, line, ranked, search
from dydilit_jax.training.costs import Cost, Work
from dydilit_jax.training.hbm import Memory, Shortage
from dydilit_jax.training.lowering import Program
from dydilit_jax.training.roofline import roofline
from dydilit_jax.training.topology import TOPOLOGIES, Topology, group_bandwidth, parse_topology
from tests.commands import assert_one_line
from tests.tiny import tiny_config

COMPILE, CONFIG = "dydilit_jax.compile", "--config=configs/digits.py"
V5E, V5P = CHIPS[1], CHIPS[2]
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Place:
    """A device at its coordinates."""

    coords: tuple[int, ...]


def slice_of(chip, *shape):
    """A topology of devices that are coordinates alone."""
    places = [Place(())]
    for length in shape:
        places = [Place((*p.coords, i)) for p in places for i in range(length)]
    name = "x".join(map(str, shape))
    return Topology(f"{chip.name}:{name}", "tpu", places, chip, len(places), shape)


GPUS = ("--topology=cuda:1x1x8",)
# As XLA describes a GPU to itself; its figures are NVIDIA's.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84929347584
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
runtime_version: { major: 12 minor: 8 patch: 0 }
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 7 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
HAS_GPU_COMPILER = any(importlib.util.find_spec(each) for each in topology.GPU_COMPILERS)
needs_gpu_compiler = pytest.mark.skipif(
    not HAS_GPU_COMPILER,
    reason="needs jax-cuda12-plugin and jax-cuda12-pjrt of JAX's version (no GPU)",
)

MISTAKES = {
    "no topology": ([CONFIG], ["--topology is missing"]),
    "no config": (["--topology=v5e:2x4"], ["--config is missing"]),
    "unknown chip": (
        [CONFIG, "--topology=v9:2x4"],
        ["topology 'v9:2x4'", "v5e:16x16", "v5p:8x8x16"],
    ),
    "near miss": ([CONFIG, "--topology=v5e-2x4"], ["did you mean 'v5e:2x4'"]),
    "unknown shape": (
        [CONFIG, "--topology=v5e:3x3"],
        ["topology of v5e 'v5e:3x3'", "v5e:2x4, v5e:4x4", "v5e:16x16"],
    ),
    "shape of GPUs": ([CONFIG, "--topology=cuda:8"], ["cuda:SLICESxHOSTSxGPUS"]),
    "no file of a GPU": (
        [CONFIG, "--topology=cuda:1x1x8", "--gpu_target=nowhere.txt"],
        ["--gpu_target=nowhere.txt is no file"],
    ),
    "no host decodes by itself": (
        [CONFIG, "--topology=v5e:2x4", "--what=decode", "--search"],
        ["--search is for train and sample"],
    ),
    "unknown program": (
        [CONFIG, "--topology=v5e:2x4", "--what=trian"],
        ["program 'trian'", "did you mean 'train'"],
    ),
    "nowhere to write": (
        [CONFIG, "--topology=v5e:2x4", "--json=nowhere/a.json"],
        ["--json=nowhere/a.json"],
    ),
    "unknown field": (
        [CONFIG, "--topology=v5e:2x4", "--config.mesh.fdsp=8"],
        ["'mesh.fdsp'", "'mesh.fsdp'"],
    ),
}


@pytest.mark.parametrize(("arguments", "parts"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_end_in_one_line(command, arguments, parts):
    code, _, errors = command(COMPILE, *arguments)
    assert_one_line(code, errors, *parts)


def test_a_missing_libtpu_is_told_with_what_to_install(monkeypatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs libtpu.*requirements-tpu\.txt") as error:
        topology.open_topology("v5e:2x4")
    assert "\n" not in str(error.value)


def test_a_missing_compiler_for_gpus_is_told_with_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    target = tmp_path / "h100.txtpb"
    target.write_text(H100)
    with pytest.raises(UserError, match=r"needs JAX's compiler for GPUs") as error:
        topology.open_topology("cuda:1x1x8", target)
    assert f"jax-cuda12-plugin=={jax.__version__} jax-cuda12-pjrt" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.skipif(HAS_GPU_COMPILER, reason="its compiler is installed")
def test_no_compiler_for_gpus_ends_in_one_line(command):
    code, _, errors = command(COMPILE, CONFIG, *GPUS)
    assert_one_line(code, errors, "jax-cuda12-plugin==", "--gpu_target=FILE")


@needs_gpu_compiler
def test_a_step_is_compiled_for_gpus_that_are_not_there(command, tmp_path):
    """A network for eight H100: each has a part of the matrices, and gathers and sums the rest."""
    target, out = tmp_path / "h100.txtpb", tmp_path / "account.json"
    target.write_text(H100)
    code, output, errors = command(
        COMPILE, "--config=configs/digits.py:attention=relu,feedforward=mlp", *GPUS,
        f"--gpu_target={target}", f"--json={out}", "--config.model.depth=1",
        "--config.data.batch_size=128", "--config.mesh.data=1", "--config.mesh.fsdp=8",
    )  # fmt: skip
    assert code == 0, errors
    account = json.loads(out.read_text())
    assert account["topology"]["device"]["name"] == "H100"
    assert account["topology"]["devices"] == 8
    assert 0.9 < account["model_flops"] / (8 * account["flops_per_device"]) < 1.1
    assert any(row["axes"] == ["fsdp"] for row in account["collectives"])
    assert account["fits"]
    assert "8 devices of 989 TFLOP/s" in output


@needs_gpu_compiler
def test_no_target_or_none_that_xla_knows_is_told(command, tmp_path):
    target = tmp_path / "h100.txtpb"
    target.write_text("gpu: H100")
    for options, part in (([f"--gpu_target={target}"], str(target)), ([], "no GPU here")):
        code, _, errors = command(COMPILE, CONFIG, *GPUS, *options)
        told = errors.splitlines()[-1]  # CUDA's own complaints come before it
        assert code == 2
        assert told.startswith("error: this JAX does not compile for cuda:1x1x8")
        assert part in told
        assert "Traceback" not in errors


def test_every_listed_topology_is_one():
    for generation, shapes in TOPOLOGIES.items():
        for shape in shapes:
            chip, lengths = parse_topology(f"{generation}:{shape}")
            assert chip == generation
            assert len(lengths) == (3 if generation in ("v5p", "tpu7x") else 2)


def test_links_of_a_group():
    """Whole closed dimensions give two links each, parts and open ones one."""
    flat = slice_of(V5E, 16, 16)

    def links(topology, keep):
        group = [d for d in topology.devices if keep(*d.coords)]
        return group_bandwidth(topology, group) / topology.chip.link_bandwidth

    assert links(flat, lambda x, y: True) == 4
    assert links(flat, lambda x, y: x == 3) == 2
    assert links(flat, lambda x, y: x < 8) == 3
    assert links(flat, lambda x, y: x == 0 and y < 8) == 1
    assert links(slice_of(V5E, 4, 8), lambda x, y: True) == 2
    cube = slice_of(V5P, 4, 4, 8)
    assert links(cube, lambda x, y, z: True) == 6
    assert links(cube, lambda x, y, z: z == 0 and x == 0) == 2


def some_roofline(network_bytes=0.0):
    """A kernel at the peak for 2 ms and a copy of 1 ms, ten times each."""
    work = [
        Work("%product", Cost(2e-3 * V5E.flops, 1e-3 * V5E.hbm_bandwidth), 10),
        Work("%copy", Cost(0.0, 1e-3 * V5E.hbm_bandwidth), 10),
    ]
    found = [Collective("all-reduce", ("data",), (0, 1), 1, network_bytes, 5, 0)]
    return roofline(work, found, V5E, lambda group: 100e9)


def test_the_roofline_adds_the_longer_of_each_instruction():
    line = some_roofline(network_bytes=1e9)  # five times 10 ms
    assert line.compute == pytest.approx(20e-3)
    assert line.memory == pytest.approx(20e-3)
    assert line.device == pytest.approx(30e-3)
    assert line.network == pytest.approx(50e-3)
    assert line.overlapped == pytest.approx(50e-3)
    assert line.serial == pytest.approx(80e-3)
    assert line.bound == "network"


def program_of(config, topology, what, *, fits, network=0.0):
    """What compiling would have given."""
    return Program(
        config=config,
        what=what,
        topology=topology,
        mesh=dataclasses.asdict(config.mesh),
        memory=Memory(parameters=GIB, optimizer=2 * GIB, ema=GIB, temporaries=GIB),
        shortage=None if fits else Shortage("too little", 20 * GIB, 16 * GIB),
        images=16,
        model_flops=0.5 * 8 * 20e-3 * V5E.flops,
        roofline=some_roofline(network) if fits else None,
        collectives=(),
        seconds=1.0,
    )


def test_the_report_is_what_follows_from_the_figures():
    config = tiny_config(train={"steps": 1000})
    program = program_of(config, slice_of(V5E, 2, 4), "train", fits=True, network=1e9)
    report = json.loads(json.dumps(compile_report.report(program)))
    estimate = report["estimate"]
    assert estimate["seconds"] == pytest.approx([50e-3, 80e-3])
    # Half of the compiled FLOPs are the model's: 10 ms of peak.
    assert estimate["mfu"] == pytest.approx([10 / 50, 10 / 80])
    assert estimate["images_per_second"] == pytest.approx([16 / 50e-3, 16 / 80e-3])
    assert estimate["days"] == pytest.approx([50 / 86400, 80 / 86400])
    assert estimate["chip_hours"] == pytest.approx([8 * 50 / 3600, 8 * 80 / 3600])
    assert report["memory"]["total"] == 5 * GIB
    assert report["fits"]
    text = compile_report.text(program)
    for part in ("fits: 5.00 of 16 GiB", "20.0% to 12.5%", "nothing was timed", "1,000 steps"):
        assert part in text
    failed = program_of(config, slice_of(V5E, 2, 4), "train", fits=False)
    assert "does NOT fit: too little" in compile_report.text(failed)
    assert compile_report.report(failed)["shortage"]["needed"] == 20 * GIB


def test_candidates_fit_and_cut_most_first():
    config = tiny_config(data={"batch_size": 16})
    meshes = candidates(config, slice_of(V5E, 4, 8), "train")
    for mesh in meshes:
        assert mesh.data * mesh.fsdp * mesh.tensor * mesh.sequence == 32
        assert 16 % (mesh.data * mesh.fsdp) == 0  # every device has an image or a part of one
    assert len(set(meshes)) == len(meshes)
    assert meshes[0] == MeshConfig(data=1, fsdp=16, tensor=1, sequence=2)
    sizes = [mesh.tensor * mesh.sequence for mesh in meshes]
    assert sizes == sorted(sizes)


def test_the_search_ranks_what_fits_and_leaves_out_what_cannot():
    """A stand-in for the compiler: fsdp=4 needs rematerialisation, and less is too little."""
    tried = []

    def compile(config, topology, what):
        mesh, policy = config.mesh, config.model.rematerialisation
        tried.append((mesh.fsdp, policy))
        fits = mesh.fsdp >= 8 or (mesh.fsdp == 4 and policy == "full")
        return program_of(config, topology, what, fits=fits, network=mesh.fsdp * 1e8)

    config = tiny_config(data={"batch_size": 32})
    programs = list(search(config, slice_of(V5E, 4, 4), "train", 5, compile))
    assert tried == [
        (16, "none"),  # it fits: no rematerialisation is tried on that mesh
        (4, "none"),
        (4, "full"),
        (4, "dots"),
        (1, "full"),  # the others did not fit on 4 either
    ]
    best = ranked(programs)
    times = [program.roofline.serial for program in best if program.roofline is not None]
    assert times == sorted(times)
    assert best[0].mesh["fsdp"] == 4
    assert all(program.fits for program in best)
    assert "does not fit" in line(next(program for program in programs if not program.fits))
    assert "network" in line(ranked(programs)[-1])


def test_the_search_stops_at_its_limit():
    config = tiny_config(data={"batch_size": 32})

    def compile(config, topology, what):
        return program_of(config, topology, what, fits=True)

    assert len(list(search(config, slice_of(V5E, 4, 4), "train", 2, compile))) == 2


def test_a_batch_no_mesh_can_hold_is_refused():
    config = tiny_config(data={"batch_size": 3})
    with pytest.raises(UserError, match="no mesh of 16 devices fits"):
        list(search(config, slice_of(V5E, 4, 4), "train", 2))
