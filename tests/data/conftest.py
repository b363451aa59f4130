"""A small data set in tfds's layout, written once."""

import pytest

from tests.data.pictures import examples, write_data_set


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """The folder of data set `pets`: 23 train images in two shards, 4 of test; three classes."""
    root = tmp_path_factory.mktemp("tfds")
    all_examples = examples(27)
    shards = {"train": [all_examples[:12], all_examples[12:23]], "test": [all_examples[23:]]}
    write_data_set(root, "pets", shards)
    return root


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory):
    """Nothing is kept in the user's own cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield
