"""Tests run on eight host devices of a CPU; most of their time is compilation: XLA tries less."""

import os

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
os.environ["TF_ENABLE_ONEDNN_OPTS"] = "0"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)


@pytest.fixture(scope="session")
def command():
    """Runs a command from the checkout: (exit code, standard output, standard error)."""
    from tests.commands import command_server  # after the environment is set

    with command_server() as run:
        yield run
