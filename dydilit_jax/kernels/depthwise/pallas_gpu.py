"""The depthwise convolution on a Hopper GPU: every activation is read or written once.

With xla.py's equations: (1) forward; backward (2) and (3) together, for (3) is, with q = p - ij,

    dkernel_ij = sum_q x_q dy_(q - ij)

the same window of dy that (2) reads, times the pixel of x at its centre. A program has 128 channels
of some images, a thread one of them, and walks along their rows. The rows under the kernel are in
shared memory, a ring that the TMA unit fills ahead, so that each is read from memory once; along a
row the window stays in registers, of which a step loads one new column, and so do the weights and
the sums of (3). No thread needs another's numbers, and nothing is added atomically: results repeat
bitwise. XLA reads each pixel k * k times through the caches instead.

An image that is cut into strips, where images and channels are too few programs for the chip, has
k - 1 rows read again for each cut.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from dydilit_jax.kernels.platform import not_hopper, target

DTYPES = ("bfloat16", "float32")
CHANNELS = 128  # of a program, one for each thread of a warpgroup
LARGEST_KERNEL = 7  # whose weights, window and sums, 3 k * k, leave a thread some registers
WIDEST = 256  # pixels of a row: the TMA unit's longest box
MOST_AHEAD = 3  # rows of shared memory that are on their way while others are read
GROUP = 8  # pixels of a row in one iteration, between which the window moves without being copied
FEWEST_ROWS = 8  # of a strip, which reads k - 1 more
PROGRAMS = 2 * 132  # wanted: two for each multiprocessor of an H100 or H200
SHARED_MEMORY = 220 * 2**10  # of the 227 KiB that a program can have

Ref = Any
Row = list[jax.Array]


class Work(NamedTuple):
    """How a convolution is cut into programs, and what each keeps.

    Attributes:
      shape: (B, H, W, C) of the images.
      dtype: of the images.
      k: side of the kernel.
      images: of one program, one after the other.
      rows: of each image.
      ahead: rows that are on their way while others are read.
    """

    shape: tuple[int, ...]
    dtype: Any
    k: int
    images: int
    rows: int
    ahead: int

    @property
    def slots(self) -> int:
        """Rows in the ring under the kernel; one more, after them, is zeros for rows outside."""
        return self.k + self.ahead

    @property
    def width(self) -> int:
        """Pixels that are computed of a row: whole groups."""
        return pl.cdiv(self.shape[2], GROUP) * GROUP

    @property
    def grid(self) -> dict[str, int]:
        """Programs by axis, channels varying fastest: neighbours share lines of memory."""
        B, H, _, C = self.shape
        return {"part": B // self.images, "strip": H // self.rows, "tile": pl.cdiv(C, CHANNELS)}

    def ring(self) -> Any:
        """Shared memory for the rows under the kernel, with their border."""
        return plgpu.SMEM((self.slots + 1, self.width + self.k - 1, CHANNELS), self.dtype)

    def lines(self, count: int) -> Any:
        """Shared memory for rows without border."""
        return plgpu.SMEM((count, self.width, CHANNELS), self.dtype)

    def shared_bytes(self) -> int:
        """Shared memory of a program of the gradient, which needs more than the convolution's."""
        pixels = (self.slots + 1) * (self.width + self.k - 1) + (self.ahead + 2) * self.width
        numbers = 2 * (self.k * self.k + 1)
        return CHANNELS * (pixels * self.dtype.itemsize + numbers * 4)


def cut(shape: tuple[int, ...], dtype: Any, k: int) -> Work:
    """As many images to a program as leave PROGRAMS; if one is too many, strips of images."""
    B, H, _, C = shape
    tiles = pl.cdiv(C, CHANNELS)
    images = max(
        n for n in range(1, B + 1) if B % n == 0 and (n == 1 or B // n * tiles >= PROGRAMS)
    )
    wanted = max(1, min(H // FEWEST_ROWS, pl.cdiv(PROGRAMS, B // images * tiles)))
    strips = max(n for n in range(1, wanted + 1) if H % n == 0)
    work = Work(shape, jnp.dtype(dtype), k, images, H // strips, MOST_AHEAD)
    while work.ahead > 1 and work.shared_bytes() > SHARED_MEMORY:
        work = work._replace(ahead=work.ahead - 1)
    return work


def unsupported(x: jax.Array, kernel: jax.Array) -> str | None:
    """Say why this kernel cannot run for x (B, H, W, C) and kernel (k, k, C); None if it can."""
    _, _, W, C = x.shape
    k = kernel.shape[0]
    if x.dtype not in DTYPES:
        return f"images of {x.dtype}: it runs for {' and '.join(DTYPES)}"
    if 0 in x.shape:
        return f"there is nothing in x {x.shape}"
    if C * x.dtype.itemsize % 16:
        return f"{C} channels of {x.dtype}: it runs for multiples of {16 // x.dtype.itemsize}"
    if k > LARGEST_KERNEL:
        return f"a kernel of {k} x {k}: it runs for up to {LARGEST_KERNEL} x {LARGEST_KERNEL}"
    if W > WIDEST or cut(x.shape, x.dtype, k).shared_bytes() > SHARED_MEMORY:
        return f"rows of {W} pixels in {x.dtype} do not fit into shared memory: use smaller images"
    return not_hopper()


def convolution(x: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
    """Equation (1); see `api.depthwise_conv` for arguments."""
    k, C = kernel.shape[0], x.shape[3]
    work = cut(x.shape, x.dtype, k)
    last = jnp.zeros(C, jnp.float32) if bias is None else bias.astype(jnp.float32)
    taps = jnp.concatenate([kernel.astype(jnp.float32).reshape(k * k, C), last[None]])

    def depthwise(
        x_ref: Ref, taps_ref: Ref, y_ref: Ref, ring: Ref, taps_s: Ref, y_s: Ref, ready: Ref,
        loaded: Ref,
    ) -> None:  # fmt: skip
        place = Place.of_program(work)
        weights = fetch_taps(taps_ref, taps_s, loaded, place)
        clear(ring)

        def of_image(image: jax.Array, _: None) -> None:
            rows = Rows(work, place, x_ref.at[place.image(image)], ring, ready)
            rows.begin()

            def of_row(step: jax.Array, _: None) -> None:
                row = rows.arrived(step)
                slot = lax.rem(step, jnp.int32(2))

                def pixel(w: jax.Array, window: Row, carry: tuple) -> tuple:
                    y_s[slot, w] = dot(window, weights[:-1], weights[-1]).astype(work.dtype)
                    return carry

                rows.walk(row, pixel, ())
                plgpu.commit_smem()
                write_row(y_s, slot, y_ref, place, image, row)
                rows.next(row)

            lax.fori_loop(0, work.rows, of_row, None)
            plgpu.wait_smem_to_gmem(0)

        lax.fori_loop(0, work.images, of_image, None)

    return launch(
        depthwise,
        work,
        out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
        scratch_types=[
            work.ring(),
            plgpu.SMEM((k * k + 1, CHANNELS), jnp.float32),
            work.lines(2),
            plgpu.Barrier(num_arrivals=1, num_barriers=work.slots),
            plgpu.Barrier(num_arrivals=1),
        ],
    )(x, taps)


def gradient(
    x: jax.Array, kernel: jax.Array, dy: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Equations (2) and (3).

    Args:
      x: (B, H, W, C).
      kernel: (k, k, C).
      dy: (B, H, W, C) in `x.dtype`.

    Returns:
      dx (B, H, W, C) in `x.dtype`; dkernel (k, k, C) and dbias (C,) in float32.
    """
    k, C = kernel.shape[0], x.shape[3]
    work = cut(x.shape, x.dtype, k)
    taps = k * k
    flipped = kernel.astype(jnp.float32).reshape(taps, C)[::-1]

    def depthwise_backward(
        x_ref: Ref, dy_ref: Ref, taps_ref: Ref, dx_ref: Ref, sums_ref: Ref, ring: Ref, taps_s: Ref,
        x_s: Ref, dx_s: Ref, sums_s: Ref, ready: Ref, x_ready: Ref, loaded: Ref,
    ) -> None:  # fmt: skip
        place = Place.of_program(work)
        weights = fetch_taps(taps_ref, taps_s, loaded, place)
        clear(ring)
        clear(x_s)

        def of_image(image: jax.Array, sums: tuple) -> tuple:
            rows = Rows(work, place, dy_ref.at[place.image(image)], ring, ready)
            rows.begin()

            def fetch_x(step: jax.Array) -> None:
                @pl.when(step < work.rows)
                def _() -> None:
                    source = x_ref.at[place.image(image), place.first + step, :, place.channels]
                    slot = lax.rem(step, jnp.int32(work.ahead))
                    inside = x_s.at[slot, pl.ds(0, work.shape[2])]
                    plgpu.copy_gmem_to_smem(source, inside, x_ready.at[slot])

            for step in range(work.ahead):
                fetch_x(jnp.int32(step))

            def of_row(step: jax.Array, sums: tuple) -> tuple:
                row = rows.arrived(step)
                x_slot, slot = lax.rem(step, jnp.int32(work.ahead)), lax.rem(step, jnp.int32(2))
                plgpu.barrier_wait(x_ready.at[x_slot])

                def pixel(w: jax.Array, window: Row, sums: tuple) -> tuple:
                    dx_s[slot, w] = dot(window, weights, None).astype(work.dtype)
                    centre = x_s[x_slot, w].astype(jnp.float32)
                    of_taps = [total + centre * dy for total, dy in zip(sums, window, strict=False)]
                    return (*of_taps, sums[taps] + window[taps // 2])

                sums = rows.walk(row, pixel, sums)
                plgpu.commit_smem()
                write_row(dx_s, slot, dx_ref, place, image, row)
                rows.next(row)
                fetch_x(step + work.ahead)
                return sums

            sums = lax.fori_loop(0, work.rows, of_row, sums)
            plgpu.wait_smem_to_gmem(0)
            return sums

        nothing = (jnp.zeros((CHANNELS,), jnp.float32),) * (taps + 1)
        sums = lax.fori_loop(0, work.images, of_image, nothing)
        for tap, total in enumerate(sums):
            sums_s[tap] = total
        plgpu.commit_smem()
        part, strip = lax.axis_index("part"), lax.axis_index("strip")
        plgpu.copy_smem_to_gmem(sums_s, sums_ref.at[part, strip, :, place.channels])
        plgpu.wait_smem_to_gmem(0)

    grid = work.grid
    dx, sums = launch(
        depthwise_backward,
        work,
        out_type=[
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct((grid["part"], grid["strip"], taps + 1, C), jnp.float32),
        ],
        scratch_types=[
            work.ring(),
            plgpu.SMEM((taps, CHANNELS), jnp.float32),
            work.lines(work.ahead),
            work.lines(2),
            plgpu.SMEM((taps + 1, CHANNELS), jnp.float32),
            plgpu.Barrier(num_arrivals=1, num_barriers=work.slots),
            plgpu.Barrier(num_arrivals=1, num_barriers=work.ahead),
            plgpu.Barrier(num_arrivals=1),
        ],
    )(x, dy, flipped)
    total = sums.sum(axis=(0, 1))
    return dx, total[:taps][::-1].reshape(kernel.shape), total[taps]


class Place(NamedTuple):
    """What a program has: the first image and row, and its channels."""

    first_image: jax.Array
    first: jax.Array
    channels: Any

    @classmethod
    def of_program(cls, work: Work) -> Place:
        """That of the program that this is traced for."""
        return cls(
            lax.axis_index("part") * work.images,
            lax.axis_index("strip") * work.rows,
            pl.ds(lax.axis_index("tile") * CHANNELS, CHANNELS),
        )

    def image(self, index: jax.Array) -> jax.Array:
        """The image of that number among the program's."""
        return self.first_image + index


class Rows(NamedTuple):
    """The rows of one image that a program walks along, those under the kernel in a ring.

    Row p is in slot p mod slots; one above the image or below is the slot of zeros.

    Attributes:
      work, place: of the program.
      source: reference to the image in memory, (H, W, C).
      ring: shared memory, `work.ring`, all zeros at first.
      ready: a barrier for each slot but the last.
    """

    work: Work
    place: Place
    source: Ref
    ring: Ref
    ready: Ref

    def begin(self) -> None:
        """Starts the first copies, and waits for the rows above the first row's last."""
        first, radius = self.place.first, self.work.k // 2
        for ahead in range(self.work.slots):
            self._fetch(first - radius + ahead)
        for ahead in range(2 * radius):
            self._wait(first - radius + ahead)

    def arrived(self, step: jax.Array) -> jax.Array:
        """The row of a step, when all that its windows hold is there."""
        row = self.place.first + step
        self._wait(row + self.work.k // 2)
        return row

    def next(self, row: jax.Array) -> None:
        """Starts the copy into the slot that this row was the last to read, in every thread."""
        self._fetch(row - self.work.k // 2 + self.work.slots)

    def walk(
        self, row: jax.Array, pixel: Callable[[jax.Array, Row, tuple], tuple], carry: tuple
    ) -> tuple:
        """Calls `pixel` with column, window (k * k of (CHANNELS,) float32) and carry, in order."""
        k = self.work.k
        slots = []
        for i in range(k):
            p = row + (i - k // 2)
            inside = jnp.logical_and(p >= 0, p < self.work.shape[1])
            ring_slot = lax.rem(jnp.maximum(p, 0), jnp.int32(self.work.slots))
            slots.append(jnp.where(inside, ring_slot, jnp.int32(self.work.slots)))

        def column(w: jax.Array) -> Row:
            return [self.ring[slot, w].astype(jnp.float32) for slot in slots]

        def of_group(group: jax.Array, state: tuple) -> tuple:
            columns, carry = [list(one) for one in state[0]], state[1]
            for offset in range(GROUP):
                w = group * GROUP + offset
                columns.append(column(w + (k - 1)))
                window = [columns[-k + j][i] for i in range(k) for j in range(k)]
                carry = pixel(w, window, carry)
            return tuple(tuple(one) for one in columns[GROUP:]), carry

        first = tuple(tuple(column(jnp.int32(w))) for w in range(k - 1))
        return lax.fori_loop(0, self.work.width // GROUP, of_group, (first, carry))[1]

    def _has(self, row: jax.Array) -> jax.Array:
        """Whether a row is copied: it is in the image, and under the kernel in this strip."""
        end = self.place.first + (self.work.rows + self.work.k // 2)
        return jnp.logical_and(row >= 0, row < jnp.minimum(end, self.work.shape[1]))

    def _fetch(self, row: jax.Array) -> None:
        @pl.when(self._has(row))
        def _() -> None:
            slot = lax.rem(row, jnp.int32(self.work.slots))
            inside = self.ring.at[slot, pl.ds(self.work.k // 2, self.work.shape[2])]
            source = self.source.at[row, :, self.place.channels]
            plgpu.copy_gmem_to_smem(source, inside, self.ready.at[slot])

    def _wait(self, row: jax.Array) -> None:
        @pl.when(self._has(row))
        def _() -> None:
            plgpu.barrier_wait(self.ready.at[lax.rem(row, jnp.int32(self.work.slots))])


def dot(window: Row, weights: Row, start: jax.Array | None) -> jax.Array:
    """Sum of the window's pixels times their weights, plus `start`: (CHANNELS,) float32."""
    terms = [pixel * weight for pixel, weight in zip(window, weights, strict=True)]
    total = terms[0] if start is None else start + terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def fetch_taps(taps: Ref, into: Ref, loaded: Ref, place: Place) -> Row:
    """The program's channels of `taps` (n, C) float32, through shared memory into registers."""
    plgpu.copy_gmem_to_smem(taps.at[:, place.channels], into, loaded)
    plgpu.barrier_wait(loaded)
    return [into[tap] for tap in range(taps.shape[0])]


def clear(lines: Ref) -> None:
    """Zeros in every pixel of shared memory (rows, pixels, CHANNELS)."""
    rows, pixels = lines.shape[:2]

    @pl.loop(0, rows * pixels)
    def clear_pixel(index: jax.Array) -> None:
        row, pixel = lax.div(index, jnp.int32(pixels)), lax.rem(index, jnp.int32(pixels))
        lines[row, pixel] = jnp.zeros((CHANNELS,), lines.dtype)

    plgpu.commit_smem()


def write_row(
    lines: Ref, slot: jax.Array, into: Ref, place: Place, image: jax.Array, row: jax.Array
) -> None:
    """Starts the copy of a slot of `lines` to a row in memory; the other slot is then free."""
    target_row = into.at[place.image(image), row, :, place.channels]
    plgpu.copy_smem_to_gmem(lines.at[slot, pl.ds(0, into.shape[2])], target_row)
    plgpu.wait_smem_to_gmem(1, wait_read_only=True)


def launch(kernel: Any, work: Work, *, out_type: Any, scratch_types: Any) -> Callable[..., Any]:
    """A kernel on the grid of `work`; layouts of registers are inferred for a warpgroup."""
    grid = work.grid
    return plgpu.kernel(
        kernel,
        out_type=out_type,
        scratch_types=scratch_types,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        # No barriers around every store of a pixel: a thread reads only what it or the TMA unit
        # wrote, and `commit_smem` is a barrier between its reads of a row and the row's refill.
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup, unsafe_no_auto_barriers=True
        ),
        interpret=target().interpret,
    )
