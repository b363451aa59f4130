"""Several processes as one: who they are, a meeting before JAX connects them, and then JAX.

JAX's own start fails on a process that does not come without saying which. So all processes meet
first, on the address that JAX's coordinator takes next: each tells process 0 its number, and
process 0 answers all of them at once, when the last one is there or the time is over.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import socket
import time
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path

import jax

from dydilit_jax.errors import UserError

RETRY_SECONDS = 0.2
TPU_PORT = 8476
METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"


@dataclasses.dataclass(frozen=True)
class Cluster:
    """One process among several.

    Attributes:
      coordinator_address: host:port of process 0, free on its host.
      num_processes: how many there are.
      process_id: which one this is, from 0.
      local_device_ids: the GPUs of this process; None for all that it sees.
    """

    coordinator_address: str
    num_processes: int
    process_id: int
    local_device_ids: tuple[int, ...] | None = None


def from_flags(address: str | None, processes: int | None, process: int | None) -> Cluster | None:
    """The cluster that explicit flags describe; None without any of them.

    Raises:
      UserError: only some of the flags, or values that do not fit together.
    """
    given = {"coordinator_address": address, "num_processes": processes, "process_id": process}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        return None
    if missing:
        raise UserError(
            "--coordinator_address, --num_processes and --process_id belong together; missing: "
            + ", ".join(f"--{name}" for name in missing)
        )
    assert address is not None
    assert processes is not None
    assert process is not None
    if not re.fullmatch(r".+:\d+", address):
        raise UserError(f"--coordinator_address={address} has the form host:port")
    if processes < 1 or not 0 <= process < processes:
        raise UserError(
            f"--process_id={process} must be one of 0 to {processes - 1} "
            f"(--num_processes={processes})"
        )
    return Cluster(address, processes, process)


def _hash_port(job: int) -> int:
    """A port from a job's number, so that two jobs on one host seldom meet: 61440 to 65535."""
    return 61440 + job % 4096


def from_slurm(environment: Mapping[str, str]) -> Cluster | None:
    """The cluster of a Slurm step (`srun`), from its variables; None outside of one."""
    names = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID")
    if any(name not in environment for name in names):
        return None
    job, nodes, tasks, process = (environment[name] for name in names)
    # The first host of lists such as node7, node[01-04,9],other and a1,a2.
    match = re.match(r"([^,\[]+)(?:\[([^,\-\]]+))?", nodes)
    if match is None:
        raise UserError(f"cannot read the hosts of SLURM_STEP_NODELIST={nodes!r}")
    host = match.group(1) + (match.group(2) or "")
    return Cluster(
        f"{host}:{_hash_port(int(job))}",
        int(tasks),
        int(process),
        _one_gpu(environment, "SLURM_LOCALID", environment.get("SLURM_STEP_NUM_NODES") == tasks),
    )


def from_open_mpi(environment: Mapping[str, str]) -> Cluster | None:
    """The cluster that Open MPI's `mpirun` started (its versions 1 to 4); None outside of one."""
    uri = environment.get("OMPI_MCA_orte_hnp_uri")
    if uri is None or "OMPI_COMM_WORLD_SIZE" not in environment:
        return None
    # 123.0;tcp://10.0.0.1,10.1.0.1:34911 or 123.0;tcp6://[fe80::1,2620::2]:43370
    match = re.match(r"(\d+)\..*?(?:tcp://([^,:]+)|tcp6://\[([^,\]]+))", uri)
    if match is None:
        raise UserError(f"cannot read the launcher's address in OMPI_MCA_orte_hnp_uri={uri!r}")
    host = match.group(2) or f"[{match.group(3)}]"
    return Cluster(
        f"{host}:{_hash_port(int(match.group(1)) // 4096)}",
        int(environment["OMPI_COMM_WORLD_SIZE"]),
        int(environment["OMPI_COMM_WORLD_RANK"]),
        _one_gpu(
            environment,
            "OMPI_COMM_WORLD_LOCAL_RANK",
            environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1",
        ),
    )


def _one_gpu(environment: Mapping[str, str], rank: str, alone: bool) -> tuple[int, ...] | None:
    """The local rank as the process's only GPU.

    None, for all it sees, if it is alone on its host or the launcher cut the devices itself.
    """
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    if alone or rank not in environment or (visible and "," not in visible):
        return None
    return (int(environment[rank]),)


def from_tpu(
    environment: Mapping[str, str], metadata: Callable[[str], str | None] | None = None
) -> Cluster | None:
    """The cluster of a TPU pod's hosts, of one slice or several; None on a single host.

    Args:
      environment: where GKE has TPU_WORKER_HOSTNAMES and TPU_WORKER_ID, and MEGASCALE_* of several
        slices.
      metadata: reads an attribute of a Cloud TPU VM; None to ask the metadata server, which is
        only done where a TPU is attached.
    """
    hostnames = environment.get("TPU_WORKER_HOSTNAMES")
    worker = environment.get("TPU_WORKER_ID")
    if hostnames is None or worker is None:
        if metadata is None:
            if environment.get("TPU_SKIP_MDS_QUERY") or not _tpu_attached():
                return None
            metadata = _tpu_metadata
        endpoints, worker = metadata("worker-network-endpoints"), metadata("agent-worker-number")
        if endpoints is None or worker is None:
            return None
        # Either host names, or name:number:address of each.
        hostnames = ",".join(each.split(":")[-1] for each in endpoints.split(","))
        pairs = re.findall(r"(MEGASCALE_\w+)\s*:\s*'?([^'\n]*)", metadata("tpu-env") or "")
        environment = {**dict(pairs), **environment}
    hosts = hostnames.split(",")
    slices = int(environment.get("MEGASCALE_NUM_SLICES") or 1)
    slice_id = int(environment.get("MEGASCALE_SLICE_ID") or 0)
    first = (environment.get("MEGASCALE_COORDINATOR_ADDRESS") or hosts[0]).split(":")[0]
    processes = slices * len(hosts)
    return Cluster(f"{first}:{TPU_PORT}", processes, slice_id * len(hosts) + int(worker))


def _tpu_attached() -> bool:
    return Path("/dev/accel0").exists() or Path("/dev/vfio/0").exists()


def _tpu_metadata(name: str) -> str | None:
    request = urllib.request.Request(METADATA + name, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=5) as response:
            return response.read().decode()
    except OSError:
        return None


def detect(environment: Mapping[str, str]) -> Cluster | None:
    """The cluster that a launcher describes: Slurm, Open MPI, a TPU pod; None for one process."""
    for source in (from_slurm, from_open_mpi, from_tpu):
        cluster = source(environment)
        if cluster is not None:
            return cluster if cluster.num_processes > 1 else None
    return None


def initialize(cluster: Cluster | None, timeout: float) -> None:
    """Connects this process to the others; does nothing without a cluster.

    To be called before anything asks JAX for its devices.

    Args:
      cluster: as `from_flags` or `detect` has it.
      timeout: seconds that all processes have to come.

    Raises:
      UserError: processes that did not come (names them), or that do not belong together.
    """
    if cluster is None:
        return
    meet(cluster, timeout)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        cluster.coordinator_address,
        cluster.num_processes,
        cluster.process_id,
        local_device_ids=cluster.local_device_ids,
        cluster_detection_method="deactivate",
        initialization_timeout=max(1, round(timeout)),
    )


def meet(cluster: Cluster, timeout: float) -> None:
    """Waits until all processes of the cluster have come to process 0's address.

    Raises:
      UserError: as `initialize`, in every process that came.
    """
    deadline = time.monotonic() + timeout
    host, _, port = cluster.coordinator_address.rpartition(":")
    if cluster.process_id == 0:
        fault = _receive(cluster, int(port), deadline, timeout)
    else:
        fault = _announce(cluster, (host.strip("[]"), int(port)), deadline, timeout)
    if fault:
        raise UserError(fault)


def _receive(cluster: Cluster, port: int, deadline: float, timeout: float) -> str:
    """Process 0: takes the others' numbers and answers them; returns what is wrong, or ''."""
    came: dict[int, socket.socket] = {}
    try:
        server = _listen(port)
    except OSError as error:
        return f"process 0 cannot listen on {cluster.coordinator_address}: {error.strerror}"
    with contextlib.ExitStack() as stack:
        stack.enter_context(server)
        fault = ""
        while not fault and len(came) < cluster.num_processes - 1:
            server.settimeout(max(deadline - time.monotonic(), 1e-3))
            try:
                connection, _ = server.accept()
                stack.enter_context(connection)
                connection.settimeout(max(deadline - time.monotonic(), 1e-3))
                with contextlib.suppress(ValueError, KeyError, TypeError, ConnectionError):
                    said = json.loads(_line(connection))
                    fault = _wrong(cluster, said, came)
                    came[said["process"]] = connection
            except TimeoutError:
                fault = _missing(cluster, set(came) | {0}, timeout)
        for connection in came.values():
            with contextlib.suppress(OSError):
                connection.sendall(json.dumps({"fault": fault}).encode() + b"\n")
                # The other side closes first: a closed port that waits would not take JAX.
                connection.settimeout(5)
                connection.recv(1)
    return fault


def _listen(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def _wrong(cluster: Cluster, said: dict, came: Mapping[int, object]) -> str:
    if said["of"] != cluster.num_processes:
        return (
            f"process {said['process']} was started as one of {said['of']} processes, process 0 "
            f"as one of {cluster.num_processes}: start all with the same --num_processes"
        )
    if said["process"] in came or said["process"] == 0:
        return f"two processes came as process {said['process']}: give each its own --process_id"
    return ""


def _missing(cluster: Cluster, came: set[int], timeout: float) -> str:
    missing = sorted(set(range(cluster.num_processes)) - came)
    return (
        f"{_named(missing)} of {cluster.num_processes} did not come to "
        f"{cluster.coordinator_address} within {timeout:g} s: see whether they were started and "
        "can reach that address, or raise --distributed_timeout"
    )


def _named(processes: list[int], most: int = 20) -> str:
    names = ", ".join(str(each) for each in processes[:most])
    more = f" and {len(processes) - most} more" if len(processes) > most else ""
    return f"process{'es' if len(processes) > 1 else ''} {names}{more}"


def _announce(cluster: Cluster, address: tuple[str, int], deadline: float, timeout: float) -> str:
    """The others: tell process 0 their number; return what it says is wrong, or ''."""
    told = json.dumps({"process": cluster.process_id, "of": cluster.num_processes}).encode()
    reason = "no answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection(address, timeout=left) as connection:
                connection.sendall(told + b"\n")
                # Process 0 came first and knows who is missing: let it say so.
                connection.settimeout(left + 5)
                return json.loads(_line(connection))["fault"]
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error) or reason
            time.sleep(min(RETRY_SECONDS, max(deadline - time.monotonic(), 0)))
    return (
        f"process {cluster.process_id} did not reach process 0 at {cluster.coordinator_address} "
        f"within {timeout:g} s ({reason}): process 0 is missing, or its address is not reachable"
    )


def _line(connection: socket.socket, most: int = 65536) -> bytes:
    """A line from a connection; ConnectionError when it ends before."""
    received = b""
    while not received.endswith(b"\n"):
        part = connection.recv(4096)
        if not part or len(received) > most:
            raise ConnectionError("the connection ended")
        received += part
    return received


def start(address: str | None, processes: int | None, process: int | None, timeout: float) -> None:
    """Connects this process to the others that flags or a launcher tell of, if there are any.

    Raises:
      UserError: as `from_flags` and `initialize`.
    """
    initialize(from_flags(address, processes, process) or detect(os.environ), timeout)
