"""Rows in files: what is held of them."""

import tracemalloc

import numpy as np

from dydilit_jax.metrics.rows import FILE_BYTES, KeptRows, Lookup
from tests.tiny import mesh_of

WIDTH, COUNT = 4096, 3200  # 3 files of FILE_BYTES, and a part of one


def test_a_lookup_holds_indices_and_not_all_rows(tmp_path):
    rows, indices = KeptRows(WIDTH, tmp_path), np.random.default_rng(0).permutation(COUNT)
    for start in range(0, COUNT, 400):
        part = indices[start : start + 400]
        rows.add(np.broadcast_to(part[:, None], (len(part), WIDTH)), part)
    rows.flush()
    tracemalloc.start()
    lookup = Lookup(rows, mesh_of(1))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 2 * FILE_BYTES < 4 * WIDTH * COUNT
    places = np.array([0, 17, COUNT - 1])
    np.testing.assert_array_equal(lookup.take(places)[:, 0], places)
