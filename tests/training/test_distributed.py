"""Several processes: how they find and await each other, and that they compute what one does."""

import dataclasses
import re
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from dydilit_jax.data.pipeline import make_batches
from dydilit_jax.data.sources import digits
from dydilit_jax.errors import UserError
from dydilit_jax.training import distributed
from dydilit_jax.training.distributed import Cluster
from dydilit_jax.training.loop import train
from dydilit_jax.training.writers import read_metrics
from tests.tiny import ROOT, to_numpy
from tests.training.processes import TRAINED


def free_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """Workdir of a run in two processes on loopback, four devices each."""
    workdir, address = tmp_path_factory.mktemp("two"), free_address()
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.training.processes", address, "2", str(i), str(workdir)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
    # One of them tells how it goes.
    assert "step 4/4" in outputs[0]
    assert "step 4/4" not in outputs[1]
    return workdir


def test_two_processes_compute_what_one_does(two_processes, tmp_path):
    state = train(TRAINED, tmp_path).state
    expected = to_numpy(state.parameters)
    for process in range(2):
        with np.load(two_processes / f"process_{process}.npz") as arrays:
            for name, value in expected.items():
                np.testing.assert_allclose(arrays[name], value, atol=1e-6, err_msg=name)
    two, one = (
        [record["loss"] for record in read_metrics(each)] for each in (two_processes, tmp_path)
    )
    assert len(two) == 4
    np.testing.assert_allclose(two, one, rtol=1e-6)


def test_each_process_gets_the_rows_it_needs_whoever_read_them(two_processes):
    batch = next(make_batches(digits(), batch_size=16, seed=TRAINED.seed))
    for process in range(2):
        with np.load(two_processes / f"process_{process}.npz") as arrays:
            np.testing.assert_array_equal(arrays["batch/image"], batch["image"])
            np.testing.assert_array_equal(arrays["batch/label"], batch["label"])


def test_their_checkpoint_is_one_that_one_process_goes_on_from(two_processes):
    longer = dataclasses.replace(TRAINED, train=dataclasses.replace(TRAINED.train, steps=5))
    assert int(train(longer, two_processes).state.step) == 5


def meeting(clusters, timeout):
    """What each process of a meeting is told, '' for all is well, and the seconds it took."""
    told = {}

    def come(i, cluster):
        start = time.monotonic()
        try:
            distributed.meet(cluster, timeout)
            told[i] = ("", time.monotonic() - start)
        except UserError as error:
            told[i] = (str(error), time.monotonic() - start)

    threads = [
        threading.Thread(target=come, args=(i, cluster)) for i, cluster in enumerate(clusters)
    ]
    for thread in reversed(threads):  # process 0 is often not the first
        thread.start()
        time.sleep(0.02)
    for thread in threads:
        thread.join(timeout + 20)
    return [told[i][0] for i in range(len(clusters))], max(seconds for _, seconds in told.values())


def test_all_meet():
    address = free_address()
    told, seconds = meeting([Cluster(address, 4, i) for i in range(4)], 20.0)
    assert told == [""] * 4
    assert seconds < 5
    # The port is free again at once: JAX's coordinator takes it.
    with socket.create_server(("127.0.0.1", int(address.split(":")[1]))):
        pass


def test_all_are_told_who_is_missing_when_the_time_is_over():
    address = free_address()
    told, seconds = meeting([Cluster(address, 6, i) for i in (0, 2, 5)], 1.0)
    for line in told:
        assert f"processes 1, 3, 4 of 6 did not come to {address} within 1 s" in line
        assert "\n" not in line
    assert seconds < 4


def test_without_process_0_the_others_say_so():
    address = free_address()
    told, seconds = meeting([Cluster(address, 2, 1)], 0.6)
    assert f"process 1 did not reach process 0 at {address} within 0.6 s" in told[0]
    assert "Connection refused" in told[0]
    assert seconds < 3


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ([(3, 1), (3, 1)], "two processes came as process 1: give each its own --process_id"),
        ([(4, 1)], "process 1 was started as one of 4 processes, process 0 as one of 3"),
        ([(3, 0)], "process 0 cannot listen on|did not come"),
    ],
)
def test_processes_that_do_not_belong_together_are_told(others, message):
    address = free_address()
    clusters = [Cluster(address, 3, 0)] + [Cluster(address, *other) for other in others]
    told, _ = meeting(clusters, 1.0)
    assert any(re.search(message, line) for line in told), told
    assert all(told)


def test_a_stranger_at_the_port_does_not_disturb():
    address = free_address()
    host, port = address.split(":")
    stop = threading.Event()

    def knock():
        while not stop.is_set():
            try:
                with socket.create_connection((host, int(port)), timeout=1) as connection:
                    connection.sendall(b"GET / HTTP/1.1\r\n\r\n\n")
                    stop.set()
            except OSError:
                time.sleep(0.01)

    thread = threading.Thread(target=knock)
    thread.start()
    told = {}

    def zero():
        distributed.meet(Cluster(address, 2, 0), 10.0)
        told[0] = ""

    first = threading.Thread(target=zero)
    first.start()
    thread.join(10)
    distributed.meet(Cluster(address, 2, 1), 10.0)
    first.join(10)
    assert told == {0: ""}


def test_a_missing_process_ends_the_command_in_one_line():
    address = free_address()
    start = time.monotonic()
    result = subprocess.run(
        [
            *(sys.executable, "-m", "dydilit_jax.train", "--config=configs/digits.py"),
            *("--workdir=unused", f"--coordinator_address={address}", "--num_processes=2"),
            *("--process_id=0", "--distributed_timeout=1"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert f"error: process 1 of 2 did not come to {address} within 1 s" in result.stderr
    assert time.monotonic() - start < 60
    assert not (ROOT / "unused").exists()


SLURM = {
    "SLURM_JOB_ID": "70001",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
}
SLURM_PORT = 61440 + 70001 % 4096


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("node7", "node7"),
        ("node7,node9", "node7"),
        ("gpu[01-04]", "gpu01"),
        ("gpu[007,010-012],cpu1", "gpu007"),
        ("a-b-[3,5]", "a-b-3"),
    ],
)
def test_slurm_tells_its_cluster(nodes, host):
    environment = {**SLURM, "SLURM_STEP_NODELIST": nodes}
    expected = Cluster(f"{host}:{SLURM_PORT}", 16, 5, (1,))
    assert distributed.detect(environment) == expected
    # A step that gives each task its own GPU has nothing left to choose.
    cut = {**environment, "CUDA_VISIBLE_DEVICES": "3"}
    assert distributed.detect(cut) == dataclasses.replace(expected, local_device_ids=None)
    # One task on each host has all its GPUs.
    alone = {**environment, "SLURM_STEP_NUM_NODES": "16", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}
    assert distributed.detect(alone) == dataclasses.replace(expected, local_device_ids=None)
    assert distributed.detect({**alone, "SLURM_STEP_NUM_NODES": "2"}) == expected
    # A job with one task is no cluster, nor is a batch script outside of a step.
    assert distributed.detect({**environment, "SLURM_STEP_NUM_TASKS": "1"}) is None
    assert distributed.from_slurm({"SLURM_JOB_ID": "1", "SLURM_PROCID": "0"}) is None


@pytest.mark.parametrize(
    ("uri", "host"),
    [
        ("1531576320.0;tcp://10.96.0.1,10.148.0.1:34911", "10.96.0.1"),
        ("1531576320.0;tcp://10.96.0.1:34911", "10.96.0.1"),
        (
            "1531576320.0;tcp6://[fe80::b9b:ac5d:9cf0:b858,2620::2]:43370",
            "[fe80::b9b:ac5d:9cf0:b858]",
        ),
    ],
)
def test_open_mpi_tells_its_cluster(uri, host):
    environment = {
        "OMPI_MCA_orte_hnp_uri": uri,
        "OMPI_COMM_WORLD_SIZE": "8",
        "OMPI_COMM_WORLD_RANK": "3",
        "OMPI_COMM_WORLD_LOCAL_RANK": "3",
    }
    port = 61440 + 1531576320 // 4096 % 4096
    assert distributed.detect(environment) == Cluster(f"{host}:{port}", 8, 3, (3,))
    alone = {**environment, "OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}
    assert distributed.detect(alone) == Cluster(f"{host}:{port}", 8, 3, None)


def test_a_tpu_pod_tells_its_cluster():
    gke = {"TPU_WORKER_HOSTNAMES": "w0,w1,w2,w3", "TPU_WORKER_ID": "2"}
    assert distributed.detect(gke) == Cluster("w0:8476", 4, 2)
    slices = {
        "MEGASCALE_NUM_SLICES": "3",
        "MEGASCALE_SLICE_ID": "1",
        "MEGASCALE_COORDINATOR_ADDRESS": "first:8080",
    }
    assert distributed.detect(gke | slices) == Cluster("first:8476", 12, 6)
    one = {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}
    assert distributed.detect(one) is None
    attributes = {
        "worker-network-endpoints": "unknown:unknown:10.0.0.4,unknown:unknown:10.0.0.5",
        "agent-worker-number": "1",
        "tpu-env": "ZONE: 'z'\nMEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\n"
        "MEGASCALE_COORDINATOR_ADDRESS: '10.0.0.9'\n",
    }
    assert distributed.from_tpu({}, attributes.get) == Cluster("10.0.0.9:8476", 4, 3)
    assert distributed.from_tpu({}, lambda _: None) is None


def test_no_launcher_is_one_process():
    assert distributed.detect({"PATH": "/bin"}) is None
    assert distributed.from_flags(None, None, None) is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("h:1", 2, None), "belong together; missing: --process_id"),
        ((None, None, 0), "missing: --coordinator_address, --num_processes"),
        (("host", 2, 0), "--coordinator_address=host has the form host:port"),
        (("h:1", 2, 2), "--process_id=2 must be one of 0 to 1"),
        (("h:1", 0, 0), "--process_id=0 must be one of"),
    ],
)
def test_flags_that_do_not_fit_are_one_line(given, message):
    with pytest.raises(UserError, match=message):
        distributed.from_flags(*given)
