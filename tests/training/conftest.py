"""Programs that several tests compile are compiled once: a run is repeated many times here."""

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

SETTINGS = {
    "jax_persistent_cache_min_compile_time_secs": 0.3,
    "jax_persistent_cache_min_entry_size_bytes": 0,
}


@pytest.fixture(autouse=True, scope="package")
def compiled_programs(tmp_path_factory):
    """A compilation cache that lives as long as these tests; its directory."""
    folder = tmp_path_factory.mktemp("compiled")
    settings = {"jax_compilation_cache_dir": str(folder), **SETTINGS}
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield folder
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
