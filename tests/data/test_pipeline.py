"""Batches: each example once an epoch, the same for any number of processes, resumed exactly."""

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest

from dydilit_jax.data.pipeline import flip_at_random, make_batches
from dydilit_jax.data.sources import ArraySource
from dydilit_jax.errors import UserError
from tests.data.pictures import images_of

COUNT = 60
RECORDS: dict[str, Any] = {"batch_size": 6, "seed": 5, "horizontal_flip": True}


@pytest.fixture(scope="module")
def source():
    """Images that tell their own index and direction."""
    images = np.zeros((COUNT, 2, 3, 1), np.float32)
    images[:, 0, 0, 0] = np.arange(COUNT) + 1
    return ArraySource(images, np.arange(COUNT, dtype=np.int32), tuple(map(str, range(COUNT))))


def take(batches, count):
    return list(itertools.islice(iter(lambda: next(batches), None), count))


def labels(batches, count):
    return np.concatenate([batch["label"] for batch in take(batches, count)])


def assert_same(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a["label"], b["label"])
        np.testing.assert_array_equal(a["image"], b["image"])


def test_shapes_and_types(source):
    batch = next(make_batches(source, batch_size=12, seed=0))
    assert batch["image"].shape == (12, 2, 3, 1)
    assert batch["image"].dtype == np.float32
    assert batch["label"].shape == (12,)
    assert batch["label"].dtype == np.int32
    # Image and label belong together.
    np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], batch["label"] + 1)


@pytest.mark.parametrize("batch_size", [12, 7])
def test_every_example_comes_once_an_epoch(source, batch_size):
    # Seven does not divide the epoch: batches then go over its end.
    order = labels(make_batches(source, batch_size=batch_size, seed=0), 26)
    epochs = [order[i : i + COUNT] for i in range(0, 3 * COUNT, COUNT)]
    for epoch in epochs[: len(order) // COUNT]:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(COUNT))
    assert not np.array_equal(epochs[0], epochs[1])
    assert not np.array_equal(epochs[0], np.arange(COUNT))


def test_a_batch_larger_than_the_data_is_filled_from_the_next_epoch(source):
    batch = next(make_batches(source, batch_size=2 * COUNT, seed=0))
    np.testing.assert_array_equal(np.sort(batch["label"]), np.repeat(np.arange(COUNT), 2))


def test_order_is_a_function_of_the_seed(source):
    first = labels(make_batches(source, batch_size=12, seed=3), 10)
    again = labels(make_batches(source, batch_size=12, seed=3, read_threads=4), 10)
    other = labels(make_batches(source, batch_size=12, seed=4), 10)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("flip", [False, True])
def test_processes_read_the_parts_of_one_global_batch(source, flip):
    def batches(index=0, count=1):
        return take(
            make_batches(
                source,
                batch_size=12,
                seed=0,
                horizontal_flip=flip,
                process_index=index,
                process_count=count,
            ),
            11,
        )

    parts = [batches(index, 4) for index in range(4)]
    joined = [
        {name: np.concatenate([part[name] for part in step]) for name in ("image", "label")}
        for step in zip(*parts, strict=True)
    ]
    assert parts[0][0]["label"].shape == (3,)
    assert_same(joined, batches())


@pytest.mark.parametrize("stop", [1, 3, 8])
def test_a_saved_position_resumes_exactly(source, stop):
    def batches():
        return make_batches(source, batch_size=7, seed=0, horizontal_flip=True)

    straight = take(batches(), 20)
    first = batches()
    take(first, stop)
    position = first.get_state()
    rest = take(first, 5)
    resumed = batches()
    take(resumed, 2)
    resumed.set_state(position)
    assert_same(take(resumed, 20 - stop), straight[stop:])
    assert_same(rest, straight[stop : stop + 5])


def test_a_position_means_the_same_for_any_number_of_processes(source):
    whole = make_batches(source, batch_size=12, seed=0)
    take(whole, 3)
    expected = next(whole)["label"]
    part = make_batches(source, batch_size=12, seed=0, process_index=1, process_count=4)
    before = make_batches(source, batch_size=12, seed=0)
    take(before, 3)
    part.set_state(before.get_state())
    np.testing.assert_array_equal(next(part)["label"], expected[3:6])


def test_about_half_of_the_images_are_mirrored_and_always_the_same(source):
    def flips():
        batches = make_batches(source, batch_size=60, seed=0, horizontal_flip=True)
        result = []
        for batch in take(batches, 20):
            image = batch["image"]
            mirrored = image[:, 0, 2, 0] == batch["label"] + 1
            kept = image[:, 0, 0, 0] == batch["label"] + 1
            assert np.all(mirrored ^ kept)
            assert np.all(image[:, 1] == 0)
            result.append(dict(zip(batch["label"].tolist(), mirrored.tolist(), strict=True)))
        return result

    first = flips()
    assert first == flips()
    share = np.mean([list(epoch.values()) for epoch in first])
    # 1,200 draws: five standard deviations are 0.072.
    assert abs(share - 0.5) < 0.072
    # The same example is not mirrored in every epoch alike.
    assert len({epoch[0] for epoch in first}) == 2


def test_mirroring_turns_left_to_right():
    image = np.arange(6.0).reshape(2, 3, 1)
    results = [
        flip_at_random({"image": image, "label": 1}, np.random.default_rng(seed))
        for seed in range(20)
    ]
    seen = {tuple(result["image"].ravel().tolist()) for result in results}
    assert seen == {(0, 1, 2, 3, 4, 5), (2, 1, 0, 5, 4, 3)}
    assert all(result["label"] == 1 for result in results)


def test_a_batch_that_processes_do_not_divide_is_refused(source):
    with pytest.raises(UserError, match=r"data.batch_size 10 is not divisible by 4 processes"):
        make_batches(source, batch_size=10, seed=0, process_count=4)


def test_an_empty_source_is_refused(source):
    empty = dataclasses.replace(source, images=source.images[:0], labels=source.labels[:0])
    with pytest.raises(UserError, match="empty"):
        make_batches(empty, batch_size=4, seed=0)


@pytest.fixture(scope="module")
def straight(data_dir):
    """Nine batches of 6 out of 23 real records, read without workers."""
    return take(make_batches(images_of(data_dir), **RECORDS), 9)


def identity(image):
    """An image's bytes or those of its mirror image, whichever are less."""
    return min(image.tobytes(), image[:, ::-1].tobytes())


def test_every_record_comes_once_an_epoch(data_dir, straight):
    source = images_of(data_dir)
    images = np.concatenate([batch["image"] for batch in straight])
    expected = sorted(identity(source[i]["image"]) for i in range(23))
    assert len(set(expected)) == 23
    for epoch in (images[:23], images[23:46]):
        assert sorted(identity(image) for image in epoch) == expected


def test_records_are_the_same_for_several_processes(data_dir, straight):
    parts = [
        take(make_batches(images_of(data_dir), **RECORDS, process_index=index, process_count=3), 9)
        for index in range(3)
    ]
    joined = [
        {name: np.concatenate([part[name] for part in step]) for name in ("image", "label")}
        for step in zip(*parts, strict=True)
    ]
    assert_same(joined, straight)


def test_workers_change_nothing_and_resume_exactly(data_dir, straight):
    batches = make_batches(images_of(data_dir), **RECORDS, workers=2)
    assert_same(take(batches, 5), straight[:5])
    # In the middle of the second epoch; as saved with workers, gone on without, and the reverse.
    position = batches.get_state()
    assert position["next_index"] == 5
    alone = make_batches(images_of(data_dir), **RECORDS)
    alone.set_state(position)
    assert_same(take(alone, 4), straight[5:])
    alone.set_state({"next_index": 3, "examples": 23})
    next(alone)
    batches.set_state(alone.get_state())
    assert_same(take(batches, 3), straight[4:7])
    batches.close()


def test_a_position_in_another_data_set_is_refused(data_dir):
    batches = make_batches(images_of(data_dir), **RECORDS)
    with pytest.raises(UserError, match="trained on 22 examples, the data set now has 23"):
        batches.set_state({"next_index": 3, "examples": 22})
    # Older checkpoints do not say how many there were.
    batches.set_state({"next_index": 3})
    assert batches.get_state() == {"next_index": 3, "examples": 23}


class Moments:
    """A source whose items become examples by chance, as precomputed latents do."""

    image_shape = (2, 2, 1)
    label_names = ("a", "b")

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return float(index)

    def transform(self, item, rng):
        image = np.full((2, 2, 1), item + 0.5 * rng.random(), np.float32)
        return {"image": image, "label": np.int32(item % 2)}


def test_a_source_that_draws_its_examples():
    epochs = [batch["image"][:, 0, 0, 0] for batch in take(make_batches(Moments(), **RECORDS), 5)]
    drawn = np.concatenate(epochs).reshape(3, 10)
    np.testing.assert_array_equal(np.sort(np.floor(drawn)), np.tile(np.arange(10), (3, 1)))
    # Each time anew, and each run the same.
    assert len(np.unique(drawn)) == 30
    again = make_batches(Moments(), **RECORDS, process_index=1, process_count=2)
    np.testing.assert_array_equal(next(again)["image"][:, 0, 0, 0], drawn.ravel()[3:6])
