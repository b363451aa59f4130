"""Trips, groups, bytes and FLOPs read from compiled programs, against what was written in them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dydilit_jax.training.collectives import axes_of, collectives, replica_groups, table
from dydilit_jax.training.costs import product_flops, unknown_kernels, work
from dydilit_jax.training.hbm import activation_bytes, shortage
from dydilit_jax.training.hlo import Module, Schedule, arrays_of, parse, schedule
from tests.tiny import mesh_of

# What libtpu writes, shortened: a scan of 28 trips without a known count, within it a loop of two;
# an asynchronous all-gather in the three fusions of one chain; an all-reduce of which a part is
# kept; a kernel; a batched product as a convolution over the batch; a slice of stacked parameters.
TPU = """\
HloModule jit_step, is_scheduled=true

%start (p: bf16[144,1152]) -> (bf16[144,1152], bf16[1152,1152]) {
  %p = bf16[144,1152]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.1 = bf16[1152,1152]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=7, replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, dimensions={0}, use_global_device_ids=true, frontend_attributes={chain_id="8"}
  ROOT %custom-call.1 = (bf16[144,1152]{1,0}, bf16[1152,1152]{1,0}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%step (p: bf16[144,1152], q: bf16[32,64], r: bf16[64,128]) -> (bf16[32,128], bf16[1152,1152]) {
  %p = bf16[144,1152]{1,0:T(8,128)(2,1)} parameter(0)
  %q = bf16[32,64]{1,0} parameter(1)
  %r = bf16[64,128]{1,0} parameter(2)
  %all-gather.2 = bf16[1152,1152]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=7, replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, dimensions={0}, use_global_device_ids=true, frontend_attributes={chain_id="8"}
  %convolution.1 = bf16[32,128]{1,0} convolution(%q, %r), dim_labels=bf_io->bf
  ROOT %tuple = (bf16[32,128]{1,0}, bf16[1152,1152]{1,0}) tuple(%convolution.1, %all-gather.2)
}

%scatter (p: f32[1280,64]) -> f32[320,64] {
  %p = f32[1280,64]{1,0} parameter(0)
  %all-reduce.1 = f32[1280,64]{1,0} all-reduce(%p), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, use_global_device_ids=true, to_apply=%add
  %partition-id = u32[] partition-id()
  %zero = s32[] constant(0)
  ROOT %slice = f32[320,64]{1,0} dynamic-slice(%all-reduce.1, %partition-id, %zero), dynamic_slice_sizes={320,64}
}

%sliced (p: f32[28,64,64], i: s32[]) -> f32[64,64] {
  %p = f32[28,64,64]{2,1,0:T(8,128)} parameter(0)
  %i = s32[] parameter(1)
  %z = s32[] constant(0)
  %dynamic-slice = f32[1,64,64]{2,1,0} dynamic-slice(%p, %i, %z, %z), dynamic_slice_sizes={1,64,64}
  ROOT %bitcast = f32[64,64]{1,0} bitcast(%dynamic-slice)
}

%batched (a: bf16[4,16,32], b: bf16[4,32,8]) -> bf16[4,16,8] {
  %a = bf16[4,16,32]{2,1,0} parameter(0)
  %b = bf16[4,32,8]{2,1,0} parameter(1)
  ROOT %convolution.2 = bf16[4,16,8]{2,1,0} convolution(%a, %b), window={size=4 stride=3 pad=0_0 lhs_dilate=4}, dim_labels=0bf_0io->0bf
}

%inner_body (t: (u32[], f32[8])) -> (u32[], f32[8]) {
  %t = (u32[], f32[8]{0}) parameter(0)
  %n = u32[]{:T(128)} get-tuple-element(%t), index=0
  %two = u32[]{:T(128)} constant(2)
  %next = u32[]{:T(128)} add(%n, %two)
  %x = f32[8]{0:T(128)S(1)} get-tuple-element(%t), index=1
  %collective-permute-start = (f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(%x), channel_id=9, source_target_pairs={{0,1},{1,0},{2,3},{3,2},{4,5},{5,4},{6,7},{7,6}}
  %y = f32[8]{0} collective-permute-done(%collective-permute-start)
  ROOT %tuple = (u32[], f32[8]{0}) tuple(%next, %y)
}

%inner_condition (t: (u32[], f32[8])) -> pred[] {
  %t = (u32[], f32[8]{0}) parameter(0)
  %four = u32[]{:T(128)} constant(4)
  %n = u32[]{:T(128)} get-tuple-element(%t), index=0
  ROOT %compare = pred[]{:T(512)} compare(%n, %four), direction=LT
}

%body (t: (s32[], f32[8])) -> (s32[], f32[8]) {
  %t = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %x = f32[8]{0} get-tuple-element(%t), index=1
  %first = u32[] constant(0)
  %begun = u32[] copy(%first)
  %tuple.1 = (u32[], f32[8]{0}) tuple(%begun, %x)
  %while.1 = (u32[], f32[8]{0}) while(%tuple.1), condition=%inner_condition, body=%inner_body
  %y = f32[8]{0} get-tuple-element(%while.1), index=1
  ROOT %tuple.2 = (s32[], f32[8]{0}) tuple(%next, %y)
}

%condition (t: (s32[], f32[8])) -> pred[] {
  %t = (s32[], f32[8]{0}) parameter(0)
  %limit = s32[]{:T(128)} constant(28)
  %i = s32[]{:T(128)} get-tuple-element(%t), index=0
  ROOT %compare = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

ENTRY %main (w: bf16[144,1152], q: bf16[32,64], r: bf16[64,128], g: f32[1280,64], s: f32[28,64,64], x: bf16[2,4,16,256], a: bf16[4,16,32], b: bf16[4,32,8], v: f32[8]) -> f32[8] {
  %w = bf16[144,1152]{1,0:T(8,128)(2,1)} parameter(0)
  %q = bf16[32,64]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  %r = bf16[64,128]{1,0} parameter(2)
  %g = f32[1280,64]{1,0} parameter(3)
  %s = f32[28,64,64]{2,1,0:T(8,128)} parameter(4)
  %x = bf16[2,4,16,256]{3,2,1,0} parameter(5)
  %a = bf16[4,16,32]{2,1,0:T(8,128)S(1)} parameter(6)
  %b = bf16[4,32,8]{2,1,0:T(8,128)S(1)} parameter(7)
  %v = f32[8]{0} parameter(8)
  %zero = s32[] constant(0)
  %fusion.1 = (bf16[144,1152]{1,0}, bf16[1152,1152]{1,0}) fusion(%w), kind=kCustom, calls=%start
  %fusion.2 = (bf16[32,128]{1,0}, bf16[1152,1152]{1,0}) fusion(%w, %q, %r), kind=kOutput, calls=%step
  %fusion.3 = f32[320,64]{1,0:T(8,128)S(1)} fusion(%g), kind=kCustom, calls=%scatter
  %fusion.4 = f32[64,64]{1,0:T(8,128)S(1)} fusion(%s, %zero), kind=kLoop, calls=%sliced
  %fusion.5 = bf16[4,16,8]{2,1,0:T(8,128)S(1)} fusion(%a, %b), kind=kOutput, calls=%batched
  %kernel = bf16[2,4,16,256]{3,2,1,0:T(8,128)(2,1)} custom-call(%x), custom_call_target="tpu_custom_call", operand_layout_constraints={bf16[2,4,16,256]{3,2,1,0}}, metadata={op_name="jit(step)/shard_map/dydila_forward/pallas_call"}
  %other = bf16[2,4,16,256]{3,2,1,0:T(8,128)S(1)} custom-call(%kernel), custom_call_target="tpu_custom_call", metadata={op_name="jit(step)/unheard_of/pallas_call"}
  %tuple.3 = (s32[], f32[8]{0}) tuple(%zero, %v)
  %while = (s32[], f32[8]{0}) while(%tuple.3), condition=%condition, body=%body
  ROOT %result = f32[8]{0} get-tuple-element(%while), index=1
}
"""  # noqa: E501
MESH = {"data": 2, "fsdp": 4, "tensor": 1, "sequence": 1}


@pytest.fixture(scope="module")
def program():
    module = parse(TPU)
    return module, schedule(module)


def test_loops_run_as_often_as_their_counters_say(program):
    _, executed = program
    assert executed.times == {"%main": 1, "%body": 28, "%inner_body": 56}
    assert executed.unknown_loops == ()


def test_a_loop_of_unknown_length_counts_once_and_is_named():
    changed = TPU.replace("constant(28)", "parameter(1)")
    executed = schedule(parse(changed))
    assert executed.unknown_loops == ("%while",)
    assert executed.times["%inner_body"] == 2


def test_collectives_of_a_tpus_program(program):
    module, executed = program
    found = collectives(module, executed, MESH)
    rows = {(row["kind"], *row["axes"]): row for row in table(found)}
    shard = 144 * 1152 * 2
    assert rows == {
        # One operation, though three fusions hold it; a group of four.
        ("all-gather", "fsdp"): {
            "kind": "all-gather",
            "axes": ["fsdp"],
            "count": 1,
            "bytes": shard,
            "sent_bytes": 3 * shard,
        },
        ("reduce-scatter", "fsdp"): {
            "kind": "reduce-scatter",
            "axes": ["fsdp"],
            "count": 1,
            "bytes": 1280 * 64 * 4,
            "sent_bytes": 1280 * 64 * 4 * 3 // 4,
        },
        ("collective-permute", "fsdp"): {
            "kind": "collective-permute",
            "axes": ["fsdp"],
            "count": 56,
            "bytes": 56 * 32,
            "sent_bytes": 56 * 32,
        },
    }


def test_flops_and_bytes_of_a_tpus_program(program):
    module, _ = program
    cost = {each.name: each.cost for each in work(*program)}
    # A product within an asynchronous chain; the operand in VMEM is free, the weights are not.
    assert cost["%fusion.2"] == (2 * 32 * 64 * 128, 2 * (64 * 128 + 32 * 128))
    # Four products of 16 x 32 x 8, all in VMEM: the window's other taps meet no value.
    assert cost["%fusion.5"] == (2 * 4 * 16 * 32 * 8, 0)
    assert cost["%fusion.4"] == (0, 64 * 64 * 4 + 4)  # one layer of 28, and its number
    # K^T V and Q S over B 2, H 4, d 16, N 256; read and written once.
    size = 2 * 4 * 16 * 256
    assert cost["%kernel"] == (2 * 2 * size * 16, 2 * 2 * size)
    assert cost["%other"] == (0, 2 * size)
    assert unknown_kernels(module) == ["unheard_of"]


def test_products_that_a_gpus_library_computes():
    """(4, 32, 16) x (4, 16, 8) in a call whose numbers stand in its configuration."""
    module = parse(
        """\
HloModule jit_step

ENTRY %main (a: bf16[4,32,16], b: bf16[4,16,8]) -> bf16[4,32,8] {
  %a = bf16[4,32,16]{2,1,0} parameter(0)
  %b = bf16[4,16,8]{2,1,0} parameter(1)
  %call = (bf16[4,32,8]{2,1,0}, s8[64]{0}) custom-call(%a, %b), """
        """custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"""
        """"dot_dimension_numbers":{"lhs_contracting_dimensions":["2"],"rhs_contracting_"""
        """dimensions":["1"],"lhs_batch_dimensions":["0"],"rhs_batch_dimensions":["0"]}}}
  ROOT %c = bf16[4,32,8]{2,1,0} get-tuple-element(%call), index=0
}
"""
    )
    (product,) = work(module, schedule(module))
    assert product.cost.flops == 2 * 4 * 32 * 16 * 8
    assert product.cost.bytes == 2 * (4 * 32 * 16 + 4 * 16 * 8 + 4 * 32 * 8) + 64


def test_a_kernel_in_a_fusion_counts_as_it_does_alone():
    """XLA for GPUs puts a kernel in one fusion with what slices its operands: B 2, N 8, d 16."""
    kernel = """custom-call({}), custom_call_target="mosaic_gpu", metadata={{op_name="""
    kernel += """"jit(f)/dydila_gpu_key_sums/mpmd_map"}}"""
    module = parse(
        """\
HloModule jit_step

%wrapped (p0: bf16[3,2,8,1,16], p1: bf16[2,8,1,16]) -> f32[2,3,8] {
  %p0 = bf16[3,2,8,1,16]{4,3,2,1,0} parameter(0)
  %p1 = bf16[2,8,1,16]{3,2,1,0} parameter(1)
  %slice = bf16[1,2,8,1,16]{4,3,2,1,0} slice(%p0), slice={[1:2], [0:2], [0:8], [0:1], [0:16]}
  %one = bf16[2,8,1,16]{3,2,1,0} bitcast(%slice)
  ROOT %inner = f32[2,3,8]{2,1,0} """
        + kernel.format("%one, %p1")
        + """
}

ENTRY %main (a: bf16[3,2,8,1,16], b: bf16[2,8,1,16]) -> f32[2,3,8] {
  %a = bf16[3,2,8,1,16]{4,3,2,1,0} parameter(0)
  %b = bf16[2,8,1,16]{3,2,1,0} parameter(1)
  %alone = f32[2,3,8]{2,1,0} """
        + kernel.format("%b, %b")
        + """
  ROOT %fused = f32[2,3,8]{2,1,0} fusion(%a, %b), kind=kCustom, calls=%wrapped
}
"""
    )
    cost = {each.name: each.cost for each in work(module, schedule(module))}
    assert cost["%fused"] == cost["%alone"]
    assert cost["%fused"] == (2 * 2 * 8 * 16 * 16, 2 * 2 * 2 * 8 * 16 + 4 * 2 * 3 * 8)


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,2},{1,3}}, x", [[0, 2], [1, 3]]),
        ("replica_groups={}, x", [[0, 1, 2, 3]]),
        ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0), x", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}, x", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'b','a'}", [[0, 2, 1, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(1)2}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(2)2}", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=(3,1,2,0) {'b'}", [[3, 1], [2, 0]]),
    ],
)
def test_every_form_of_groups(text, groups):
    assert replica_groups(text, 4) == groups


def test_groups_of_an_unknown_form_are_refused():
    with pytest.raises(ValueError, match="unknown form"):
        replica_groups("replica_groups=@somewhere", 4)


def test_members_tell_their_axes():
    mesh = {"data": 2, "fsdp": 2, "tensor": 1, "sequence": 2}
    assert axes_of([0, 1], mesh) == ("sequence",)
    assert axes_of([0, 2], mesh) == ("fsdp",)
    assert axes_of([0, 4], mesh) == ("data",)
    assert axes_of([0, 1, 2, 3], mesh) == ("fsdp", "sequence")
    assert axes_of(range(8), mesh) == ("data", "fsdp", "sequence")


def test_shapes_have_their_layouts_memory():
    arrays = arrays_of(
        "(bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, /*index=1*/pred[3]{0}, u32[], token[])"
    )
    assert [(array.bytes, array.in_hbm) for array in arrays] == [
        (2048, False),
        (3, True),
        (4, True),
    ]


def test_what_the_compiler_says_of_too_little_memory():
    temporaries = shortage(
        RuntimeError(
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (31.76G) exceeds available HBM (15.75G)."
        )
    )
    assert temporaries is not None
    assert temporaries.needed == round(31.76 * 2**30)
    assert temporaries.available == round(15.75 * 2**30)
    assert temporaries.message.startswith("Ran out of memory on HBM")
    used = shortage(
        RuntimeError(
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory "
            "space hbm. Used 21.02G of 15.75G hbm.\nExceeded hbm capacity by 5.27G."
        )
    )
    assert used is not None
    assert (used.needed, used.available) == (round(21.02 * 2**30), round(15.75 * 2**30))
    assert "\n" not in used.message
    assert shortage(RuntimeError("INVALID_ARGUMENT: no such thing")) is None
    vmem = "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 20M of 16M vmem."
    assert shortage(RuntimeError(vmem)) is None


# Programs of this machine's own compiler, on eight devices.
B, D, LAYERS = 16, 32, 5


def read(compiled) -> tuple[Module, Schedule]:
    """A compiled program and its executions."""
    module = parse(compiled.as_text())
    return module, schedule(module)


@pytest.fixture(scope="module")
def scanned():
    """Layers of gathered weights over fsdp, then a mean over all devices; and its gradients."""
    mesh = mesh_of(2, 4)

    def loss(weights, x):
        def layer(x, w):
            return jnp.tanh(x @ w), None

        return jnp.sum(jax.lax.scan(layer, x, weights)[0])

    shardings = NamedSharding(mesh, P(None, "fsdp")), NamedSharding(mesh, P(("data", "fsdp")))
    with jax.set_mesh(mesh):
        function = jax.jit(jax.grad(loss), in_shardings=shardings, out_shardings=shardings[0])
        compiled = function.lower(
            jax.ShapeDtypeStruct((LAYERS, D, D), jnp.float32),
            jax.ShapeDtypeStruct((B, D), jnp.float32),
        ).compile()
    return *read(compiled), dict(mesh.shape)


def test_flops_of_scanned_layers(scanned):
    """Forward one product a layer, backward two, of an eighth of the rows on each device."""
    module, executed, _ = scanned
    assert sum(w.cost.flops * w.times for w in work(module, executed)) == pytest.approx(
        3 * 2 * LAYERS * (B // 8) * D * D
    )


def test_activations_of_scanned_layers(scanned):
    """Each layer's input and its tanh, or what the compiler makes one array of."""
    module, executed, _ = scanned
    rows = LAYERS * (B // 8) * D * 4
    assert rows <= activation_bytes(module, executed) <= 3 * rows


@pytest.mark.parametrize(("axes", "group"), [(("data",), 2), (("fsdp",), 4), (("data", "fsdp"), 8)])
def test_a_sum_over_an_axis_in_a_scan(axes, group):
    """Known bytes, a known axis, times the trips."""
    mesh = mesh_of(2, 4)

    def each(x):
        def body(total, _):
            return total + jax.lax.psum(x * total, axes), None

        return jax.lax.scan(body, x, None, length=7)[0]

    mapped = jax.shard_map(each, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    compiled = jax.jit(mapped).lower(jax.ShapeDtypeStruct((6, 10), jnp.float32)).compile()
    (row,) = table(collectives(*read(compiled), dict(mesh.shape)))
    assert (row["kind"], tuple(row["axes"]), row["count"]) == ("all-reduce", axes, 7)
    assert row["bytes"] == 7 * 6 * 10 * 4
    assert row["sent_bytes"] == round(7 * 240 * 2 * (group - 1) / group)


def test_gathers_exchanges_and_permutes_over_an_axis():
    mesh = mesh_of(2, 4)

    def each(x):
        gathered = jax.lax.all_gather(x, "fsdp", tiled=True)
        scattered = jax.lax.psum_scatter(gathered * 2, "fsdp", tiled=True)
        exchanged = jax.lax.all_to_all(scattered, "fsdp", 0, 0, tiled=True)
        return jax.lax.ppermute(exchanged, "data", [(0, 1), (1, 0)])

    spec = P(("data", "fsdp"))
    mapped = jax.shard_map(each, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    compiled = jax.jit(mapped).lower(jax.ShapeDtypeStruct((64, 10), jnp.float32)).compile()
    part = 8 * 10 * 4
    found = {
        row["kind"]: (tuple(row["axes"]), row["sent_bytes"])
        for row in table(collectives(*read(compiled), dict(mesh.shape)))
    }
    assert found == {
        "all-gather": (("fsdp",), 3 * part),
        "reduce-scatter": (("fsdp",), 3 * part),
        "all-to-all": (("fsdp",), part * 3 // 4),
        "collective-permute": (("data",), part),
    }


def test_convolutions_count_as_xla_counts_them():
    """Padding, strides and dilation, against the compiler's own account."""

    def convolve(x, w):
        return jax.lax.conv_general_dilated(
            x,
            w,
            (2, 1),
            [(1, 2), (3, 0)],
            lhs_dilation=(1, 3),
            rhs_dilation=(2, 1),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((2, 9, 7, 4), (3, 3, 4, 5))]
    compiled = jax.jit(convolve).lower(*shapes).compile()
    cost = sum(each.cost.flops for each in work(*read(compiled)))
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal(s.shape) != 0 for s in shapes)  # ones: the sum counts products
    products = convolve(np.asarray(x, np.float32), np.asarray(w, np.float32)).sum()
    assert cost == 2 * products


def test_flops_that_a_function_asks_for_are_two_for_each_multiply_add():
    """A batch of products within a function of its own, and a convolution in two groups."""

    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=2,
        )  # fmt: skip

    def function(a, b, x, kernel):
        return jax.jit(lambda a, b: jnp.einsum("bij,bjk->bik", a, b))(a, b), convolve(x, kernel)

    shapes = ((3, 5, 7), (3, 7, 11), (2, 8, 8, 4), (3, 3, 2, 6))
    traced = jax.jit(function).trace(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes))
    products = 2 * 3 * 5 * 7 * 11
    convolution = 2 * (2 * 4 * 4 * 6) * (3 * 3 * 2)  # each output sees half of the inputs
    assert product_flops(traced.jaxpr.jaxpr) == products + convolution
