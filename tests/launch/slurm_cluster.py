"""A Slurm cluster of two hosts on this machine: a controller and two daemons, each with its port.

    python -m tests.launch.slurm_cluster --install          # Debian's packages; needs root
    python -m tests.launch.slurm_cluster -- COMMAND ...     # runs COMMAND on a fresh cluster

The hosts are called 127.0.0.2 and 127.0.0.3, names that resolve everywhere. Nothing of a system's
own Slurm is touched: configuration, keys, state and logs are in one folder, and no service is
started by systemd.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

PACKAGES = ("slurm-wlm", "munge", "shellcheck")
PROGRAMS = ("slurmctld", "slurmd", "srun", "sbatch", "munged", "unshare")
HOSTS = ("127.0.0.2", "127.0.0.3")
CONFIGURATION = """\
ClusterName=dydilit
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
# A job that is queued again waits until the old one's credentials have expired: 2 minutes unasked.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1,batch_sched_delay=1
MpiDefault=none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
SlurmdTimeout=5
KillWait=20
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
"""
# What comes into `urgent` takes the hosts from what runs in `main`, which has so long to save.
PARTITIONS = (
    "PartitionName=main Default=YES PriorityTier=1 GraceTime=60",
    "PartitionName=urgent Default=NO PriorityTier=2",
)


def missing_programs() -> list[str]:
    """Programs that this machine lacks for a cluster."""
    return [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]


def install() -> None:
    """Installs Debian's packages, if any is missing."""
    if not missing_programs() and shutil.which("shellcheck"):
        return
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    subprocess.run(["apt-get", "-qq", "update"], check=True, env=environment)
    # No service is to start: the packages' configuration is not ours.
    subprocess.run(
        ["apt-get", "-qq", "--yes", "--no-install-recommends", "install", *PACKAGES],
        check=True,
        env=environment | {"RUNLEVEL": "1"},
        stdout=subprocess.DEVNULL,
    )


def wait_for(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Returns when the condition holds; TimeoutError after so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not come about within {seconds:g} s")
        time.sleep(0.05)


class SlurmCluster:
    """Two hosts and their controller, while the context lasts.

    Args:
      folder: of all files; new or empty.

    Attributes:
      hidden: a folder of which the second host sees another, empty one.
      environment: with which Slurm's commands speak to this cluster.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.hidden = folder / "hidden"
        self.environment = os.environ | {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": _path(),
        }

    def __enter__(self) -> SlurmCluster:
        for name in ("state", "hidden"):
            (self.folder / name).mkdir(parents=True)
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        ports = _free_ports(1 + len(HOSTS))
        text = CONFIGURATION.format(folder=self.folder, controller_port=ports[0])
        for host, port in zip(HOSTS, ports[1:], strict=True):
            text += f"NodeName={host} NodeAddr={host} NodeHostname=localhost Port={port} CPUs=2\n"
        for options in PARTITIONS:
            text += f"{options} Nodes={','.join(HOSTS)} MaxTime=INFINITE State=UP\n"
        (self.folder / "slurm.conf").write_text(text)
        try:
            self._start_all()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def run(self, *command: object) -> str:
        """Standard output of a command that speaks to this cluster."""
        words = [str(each) for each in command]
        return subprocess.run(
            words, env=self.environment, check=True, stdout=subprocess.PIPE, text=True
        ).stdout

    def start_host(self, host: str) -> None:
        """Starts a host's daemon; the second host has a file system of its own in `hidden`."""
        command = ["slurmd", "-N", host]
        if host == HOSTS[1]:
            mount = 'mount -t tmpfs tmpfs "$0" && exec "$@"'
            command = ["unshare", "--mount", "sh", "-c", mount, str(self.hidden), *command]
        self.run(*command)

    def kill_host(self, host: str) -> None:
        """Ends a host as a power failure would: its daemon and all that runs on it."""
        self._kill(f"slurmd.{host}.pid")
        self._kill_all(lambda _, variables: f"SLURMD_NODENAME={host}".encode() in variables)

    def stop(self) -> None:
        """Ends everything."""
        for host in HOSTS:
            self.kill_host(host)
        self._kill_all(lambda name, _: name.startswith(b"slurmstepd"))
        self._kill("slurmctld.pid")
        self._kill("munged.pid")

    def _kill_all(self, chosen: Callable[[bytes, list[bytes]], bool]) -> None:
        """Ends this cluster's processes that a command line and environment tell."""
        configuration = f"SLURM_CONF={self.folder}/slurm.conf".encode()
        for process in Path("/proc").iterdir():
            if not process.name.isdigit():
                continue
            try:
                variables = (process / "environ").read_bytes().split(b"\0")
                name = (process / "cmdline").read_bytes()
            except OSError:
                continue
            if configuration in variables and chosen(name, variables):
                _signal(int(process.name), signal.SIGKILL)

    def _start_all(self) -> None:
        at = self.folder
        self.run(
            "munged",
            "--force",  # The folder's parents may be writable by others, as those of /tmp are.
            *(f"--key-file={at}/munge.key", f"--socket={at}/munge.socket"),
            *(f"--pid-file={at}/munged.pid", f"--log-file={at}/munged.log"),
            f"--seed-file={at}/munge.seed",
        )
        self.run("slurmctld", "-c")
        for host in HOSTS:
            self.start_host(host)
        wait_for(lambda: self._idle() == len(HOSTS), 30, "a cluster with two idle hosts")

    def _idle(self) -> int:
        found = subprocess.run(
            ["sinfo", "--noheader", "--Node", "--states=idle", "--format=%N"],
            env=self.environment,
            capture_output=True,
            text=True,
        )
        return len(set(found.stdout.split()))  # a line for each of its partitions

    def _kill(self, pid_file: str) -> None:
        path = self.folder / pid_file
        if path.is_file():
            _signal(int(path.read_text()), signal.SIGKILL)
            path.unlink()


def _signal(process: int, number: int) -> None:
    try:
        os.kill(process, number)
    except ProcessLookupError:
        return


def _path() -> str:
    # Daemons are where a user's PATH need not lead.
    return os.environ.get("PATH", "") + ":/usr/sbin:/sbin"


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def main() -> int:
    """Installs, or runs a command on a cluster."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--install", action="store_true", help="install Debian's packages")
    parser.add_argument("command", nargs="*", help="what to run while the cluster is there")
    options = parser.parse_args()
    if options.install:
        install()
    if missing := missing_programs():
        print(f"error: {', '.join(missing)} missing: --install as root on Debian", file=sys.stderr)
        return 2
    if not options.command:
        return 0
    with (
        tempfile.TemporaryDirectory(prefix="slurm_") as folder,
        SlurmCluster(Path(folder) / "cluster") as cluster,
    ):
        return subprocess.run(options.command, env=cluster.environment).returncode


if __name__ == "__main__":
    sys.exit(main())
