"""Examples that cannot be read are replaced, named and counted, or end the run."""

import itertools

import numpy as np
import pytest

from dydilit_jax.data.pipeline import make_batches
from dydilit_jax.data.tolerance import Tolerant
from dydilit_jax.errors import UserError
from tests.data.pictures import examples, images_of, write_data_set

COUNT, BAD = 11, (2, 5, 6, 10)
# The first readable one after each; after the last comes the first.
STAND_INS = {2: 3, 5: 7, 6: 7, 10: 0}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Eleven records of which four are damaged, each in its own way."""
    root = tmp_path_factory.mktemp("damaged")
    records = [(image, i % 3) for i, (image, _) in enumerate(examples(COUNT))]
    records[2] = (records[2][0][:300], 2)
    records[5] = (b"no JPEG", 2)
    records[6] = (records[6][0], 99)
    records[10] = (b"", 1)
    write_data_set(root, "pets", {"train": [records[:6], records[6:]]})
    return images_of(root)


def batches_of(source, count=11, **options):
    batches = make_batches(source, batch_size=4, seed=1, **options)
    return list(itertools.islice(iter(lambda: next(batches), None), count)), batches


def test_stand_ins_are_the_next_readable_examples(source):
    items = Tolerant(source, skip=True, max_errors=10)
    for index in range(COUNT):
        item, skipped = items[index]
        expected = source[STAND_INS.get(index, index)]
        np.testing.assert_array_equal(item["image"], expected["image"])
        assert item["label"] == expected["label"]
        assert skipped == (index if index in BAD else -1)


def test_batches_keep_their_shape_and_errors_are_named_once(source, capfd):
    batches, iterator = batches_of(source, max_errors=4)
    assert {batch["image"].shape for batch in batches} == {(4, 8, 8, 3)}
    assert {tuple(sorted(batch)) for batch in batches} == {("image", "label")}
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("skipped: ")]
    assert len(lines) == len(BAD) == iterator.skipped
    text = "\n".join(lines)
    assert "record 2 of" in text
    assert "label 99 is outside 0 to 2" in text
    assert "(4 so far, data.max_errors=4)" in lines[-1]
    # Four epochs of eleven: the stand-ins are there as often as those they stand for.
    images = [image.tobytes() for batch in batches for image in batch["image"]]
    counts = [images.count(source[i]["image"].tobytes()) for i in (0, 1, 3, 4, 7)]
    assert counts == [8, 4, 8, 4, 12]


def test_processes_see_the_same_stand_ins(source):
    whole, _ = batches_of(source, max_errors=9)
    parts = [
        batches_of(source, max_errors=9, process_index=index, process_count=2)[0]
        for index in range(2)
    ]
    for batch, *halves in zip(whole, *parts, strict=True):
        for name, values in batch.items():
            np.testing.assert_array_equal(values, np.concatenate([half[name] for half in halves]))


def test_errors_travel_from_workers(source, capfd):
    alone, _ = batches_of(source, max_errors=9)
    batches, iterator = batches_of(source, max_errors=9, workers=1)
    iterator.close()
    for one, other in zip(alone, batches, strict=True):
        np.testing.assert_array_equal(one["image"], other["image"])
    assert iterator.skipped == 4
    assert capfd.readouterr().err.count("skipped: ") == 8


def test_too_many_errors_end_the_run(source):
    with pytest.raises(UserError, match=r"more than 3 examples cannot be read .*the last: record"):
        batches_of(source, max_errors=3)
    with pytest.raises(UserError, match=r"more than 1 examples cannot be read"):
        # Two in a row.
        Tolerant(source, skip=True, max_errors=1)[5]


def test_stop_ends_the_run_at_the_first(source):
    message = r"^record \d+ of '.*': .*\(data.on_error=skip goes on without it\)$"
    with pytest.raises(UserError, match=message):
        batches_of(source, on_error="stop", max_errors=100)
    with pytest.raises(UserError, match=r"unknown data.on_error 'skp': did you mean 'skip'"):
        batches_of(source, on_error="skp")
