"""Batches ahead of use: the same ones, the position of the last one handed out."""

import threading
import time

import jax
import numpy as np
import pytest

from dydilit_jax.data.pipeline import make_batches
from dydilit_jax.data.prefetch import DevicePrefetch
from dydilit_jax.data.sources import digits
from dydilit_jax.training.loop import to_mesh
from tests.tiny import mesh_of


class Numbers:
    """Batches 0, 1, 2, ..., which notes how many were read, and fails at one of them."""

    def __init__(self, fail_at=None):
        self.position = 0
        self.read = 0
        self.fail_at = fail_at

    def __next__(self):
        if self.position == self.fail_at:
            raise OSError("disk on fire")
        self.position += 1
        self.read += 1
        return {"label": np.asarray(self.position - 1)}

    def get_state(self):
        return {"next_index": self.position}

    def set_state(self, state):
        self.position = state["next_index"]


def eventually(condition):
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def numbers(batches, depth):
    return DevicePrefetch(batches, lambda batch: int(batch["label"]), depth=depth)


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_position_is_that_of_the_last_batch_handed_out(depth):
    batches = Numbers()
    prefetch = numbers(batches, depth)
    assert prefetch.get_state() == {"next_index": 0}
    for expected in range(5):
        assert next(prefetch) == expected
        assert prefetch.get_state() == {"next_index": expected + 1}
    # So many wait, and one more that finds no room.
    eventually(lambda: batches.read == 5 + depth + bool(depth))
    prefetch.set_state({"next_index": 2})
    assert prefetch.get_state() == {"next_index": 2}
    assert [next(prefetch) for _ in range(4)] == [2, 3, 4, 5]
    assert prefetch.get_state() == {"next_index": 6}
    prefetch.close()
    # Closing loses nothing, and leaves no thread.
    assert batches.position == 6
    assert next(prefetch) == 6
    before = threading.active_count()
    prefetch.close()
    prefetch.close()
    assert threading.active_count() == before - bool(depth)


@pytest.mark.parametrize("depth", [0, 2])
def test_an_error_comes_when_it_is_its_turn(depth):
    batches = Numbers(fail_at=2)
    prefetch = numbers(batches, depth)
    assert [next(prefetch), next(prefetch)] == [0, 1]
    for _ in range(2):
        with pytest.raises(OSError, match="disk on fire"):
            next(prefetch)
        assert prefetch.get_state() == {"next_index": 2}
    batches.fail_at = None
    assert next(prefetch) == 2
    prefetch.close()


def test_batches_lie_on_the_mesh_and_resume_exactly():
    mesh = mesh_of(4, 2)
    plain = make_batches(digits(), batch_size=16, seed=3)
    expected = [next(plain) for _ in range(6)]

    def prefetched():
        batches = make_batches(digits(), batch_size=16, seed=3)
        return DevicePrefetch(batches, lambda batch: to_mesh(batch, mesh))

    prefetch = prefetched()
    for batch in expected[:4]:
        placed = next(prefetch)
        assert isinstance(placed["image"], jax.Array)
        assert len(placed["image"].sharding.device_set) == 8
        np.testing.assert_array_equal(placed["image"], batch["image"])
    position = prefetch.get_state()
    prefetch.close()
    resumed = prefetched()
    resumed.set_state(position)
    for batch in expected[4:]:
        np.testing.assert_array_equal(next(resumed)["label"], batch["label"])
    resumed.close()
