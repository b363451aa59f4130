"""What runs on the hosts: supervise.sh, a TPU host's start, Slurm's containers, host.sh."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time

import pytest

from tests.launch.fakes import Fakes
from tests.launch.slurm_cluster import wait_for
from tests.launch.test_places import ODD, TPU
from tests.tiny import ROOT

SUPERVISE = ROOT / "launch" / "supervise.sh"
# Counts the signals it gets; the second one would end a trainer without saving.
SAVES = """
trap 'echo asked >>"$0/log"; sleep 0.3; echo saved >>"$0/log"; exit 75' TERM
echo running >>"$0/log"
while :; do sleep 0.05; done
"""


def supervised(tmp_path, *program, restarts=2):
    """A supervised program; its folder has the status and the program's log."""
    return subprocess.Popen(
        [
            *(str(SUPERVISE), f"--max-restarts={restarts}", "--pause=0"),
            *(f"--status={tmp_path}/status", "--", *program),
        ],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.parametrize(
    ("statuses", "expected", "starts"),
    [
        ([0], 0, 1),
        ([2], 2, 1),
        ([1, 0], 0, 2),
        ([1, 134, 7], 7, 3),  # Two restarts, and no more.
        ([75, 75, 75, 75, 0], 0, 5),  # Stopped elsewhere: not counted.
        ([143, 130, 1, 75, 0], 0, 5),
    ],
)
def test_what_is_started_again(tmp_path, statuses, expected, starts):
    script = 'echo x >>"$0/log"; n=$(wc -l <"$0/log"); shift $((n - 1)); exit "$1"'
    program = ["bash", "-c", script, str(tmp_path), *map(str, statuses)]
    assert supervised(tmp_path, *program).wait(20) == expected
    assert (tmp_path / "log").read_text().count("x") == starts
    assert (tmp_path / "status").read_text() == f"{expected}\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("send", [os.kill, os.killpg], ids=["alone", "group"])
def test_a_signal_is_passed_on_once(tmp_path, send, number):
    """To the supervisor, or to its group, as a terminal sends Ctrl-C; and a second time."""
    process = supervised(tmp_path, "bash", "-c", SAVES, str(tmp_path))
    wait_for(lambda: (tmp_path / "log").exists(), 10, "a start")
    send(process.pid, number)
    time.sleep(0.1)
    send(process.pid, number)
    assert process.wait(20) == 75
    assert (tmp_path / "log").read_text() == "running\nasked\nsaved\n"


def test_a_signal_ends_the_pause_too(tmp_path):
    process = subprocess.Popen([str(SUPERVISE), "--pause=600", "--", "bash", "-c", "exit 1"])
    time.sleep(0.3)
    process.terminate()
    assert process.wait(10) == 75


def test_a_tpu_host_starts_the_program_as_it_was_given(tmp_path, checkout):
    """The startup script, run as a host would, with stand-ins for all that it would change."""
    checkout.git("remote", "set-url", "origin", tmp_path / "remote.git")
    names = ("gcsfuse", "mount", "gcloud", "apt-get", "systemctl")
    fakes = Fakes(tmp_path / "fakes", *names, DYDILIT_BASE=str(tmp_path / "base's $1"))
    # Nothing is written outside of the test's folder, and nothing installed.
    fakes.script(
        "mkdir", '#!/bin/bash\n[[ $2 == /gcs/* || $2 == /nfs/* ]] || exec /bin/mkdir "$@"\n'
    )
    fakes.script("mountpoint", "#!/bin/sh\nexit 1\n")
    fakes.script("mount.nfs", "#!/bin/sh\n")
    # pip brings uv, which is another stand-in here.
    install = (
        'mkdir -p "$DYDILIT_BASE/uv/bin" && cp "$(command -v gcloud)" "$DYDILIT_BASE/uv/bin/uv"'
    )
    fakes.script("python3", f"#!/bin/bash\n{install}\n")
    fakes.script("python", f'#!/bin/bash\nprintf \'%s\\0\' "$PWD" "$@" >{tmp_path}/said\n')
    # systemd would run it in an environment of its own.
    fakes.script(
        "systemd-run",
        f'#!/bin/bash\nenv -i "${{@: -1}}" >{tmp_path}/log 2>&1; echo $? >{tmp_path}/out',
    )
    program = ["python", "-m", "dydilit_jax.sample", "--workdir=gs://bucket/r 1", *ODD]
    status, output, errors = fakes.run(
        checkout.script("tpu"),
        *("start", "--dry-run", *TPU, "--topology=v5e:4x4", "--nfs=10.0.0.2:/share:/nfs/data"),
        *("--", *program),
    )
    assert status == 0, errors
    (script,) = [
        text.split("\n", 1)[1].rsplit("\nEND_OF_INPUT", 1)[0]
        for text in output.split("dd of=")
        if "#!/usr/bin/env bash" in text
    ]
    status, _, errors = fakes.run("bash", "-c", script)
    base = tmp_path / "base's $1"
    assert status == 0, errors + (base / "startup.log").read_text()
    expected = ["-m", "dydilit_jax.sample", "--workdir=/gcs/bucket/r 1", *ODD]
    directory, *said = (tmp_path / "said").read_text().split("\0")[:-1]
    assert said == [*expected, "--distributed_timeout=1800"]
    assert directory == str(base / "code")
    assert (base / "code" / "launch" / "tpu_vm.sh").is_file()
    assert (tmp_path / "out").read_text() == "0\n"
    assert (base / "status").read_text() == "0\n"
    calls = [call.argv for call in fakes.calls()]
    assert [argv for argv in calls if argv[0] == "uv"] == [
        ["uv", "venv", "--quiet", "--clear", "--python=3.12", f"{base}/venv"],
        [
            *("uv", "pip", "install", "--quiet", f"--python={base}/venv/bin/python"),
            *(f"--requirement={base}/code/requirements.txt", "jax[tpu]"),
        ],
    ]
    assert [argv for argv in calls if argv[0] in ("gcsfuse", "mount")] == [
        ["gcsfuse", "--implicit-dirs", "-o", "allow_other", "bucket", "/gcs/bucket"],
        ["mount", "-t", "nfs", "-o", "hard", "10.0.0.2:/share", "/nfs/data"],
    ]
    # After a reboot a finished run is not begun again.
    (tmp_path / "said").unlink()
    assert fakes.run("bash", "-c", script)[0] == 0
    assert not (tmp_path / "said").exists()


def test_a_tpu_host_runs_an_image(tmp_path, checkout):
    fakes = Fakes(
        tmp_path / "fakes", "gcsfuse", "docker", "gcloud", "systemctl", DYDILIT_BASE=str(tmp_path)
    )
    fakes.script("mkdir", '#!/bin/bash\n[[ $2 == /gcs/* ]] || exec /bin/mkdir "$@"\n')
    fakes.script("mountpoint", "#!/bin/sh\n")
    fakes.script("systemd-run", '#!/bin/bash\n"${@: -1}"\n')
    image = "us-docker.pkg.dev/p/r/x:1"
    output = fakes.run(
        checkout.script("tpu"),
        *("start", "--dry-run", *TPU, "--topology=v6e:2x2", f"--image={image}", "--shared=/mnt"),
        *("--", "bash", "-c", "true", "--workdir=gs://bucket/r", *ODD),
    )[1]
    script = output.split("<<'END_OF_INPUT'\n")[1].split("\nEND_OF_INPUT")[0]
    assert fakes.run("bash", "-c", script)[0] == 0
    calls = [call.argv for call in fakes.calls()]
    assert ["gcloud", "auth", "configure-docker", "us-docker.pkg.dev", "--quiet"] in calls
    assert calls[-1] == [
        *("docker", "run", "--rm", "--name", "dydilit", "--privileged", "--network", "host"),
        *("--ipc", "host", "--volume", "/gcs/bucket:/gcs/bucket", "--volume", "/mnt:/mnt", image),
        *("bash", "-c", "true", "--workdir=/gcs/bucket/r", *ODD),
    ]


@pytest.mark.parametrize("container", ["pyxis", "apptainer"])
def test_slurm_runs_in_containers(tmp_path, container):
    """The batch script with a stand-in for srun, which runs nothing."""
    fakes = Fakes(
        tmp_path / "fakes",
        *("srun", "scontrol"),
        SLURM_JOB_ID="7",
        SLURM_JOB_NUM_NODES="2",
        SLURM_CPUS_PER_TASK="12",
    )
    folder, workdir, image = f"{tmp_path}/f", f"{tmp_path}/w $1", "docker://host/x:1"
    program = ["python", "-m", "dydilit_jax.train", f"--workdir={workdir}", *ODD]
    status, output, errors = fakes.run(
        *(ROOT / "launch" / "slurm_job.sh", f"--folder={folder}", "--code=/opt/dydilit_jax"),
        *(f"--container={container}", f"--image={image}", "--mount=/data", "--", *program),
    )
    assert status == 0, output + errors
    *probes, run = fakes.calls()
    base = ["srun", "--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--cpus-per-task=12"]
    base += ["--cpu-bind=none"]
    places = (folder, workdir, "/data")
    if container == "pyxis":
        base += [f"--container-image={image}"]
        base += ["--container-mounts=" + ",".join(f"{each}:{each}" for each in places)]
        base += ["--container-workdir=/opt/dydilit_jax"]
        inside = []
    else:
        inside = ["apptainer", "exec", "--nv", "--pwd", "/opt/dydilit_jax"]
        inside += [word for each in places for word in ("--bind", each)] + [image]
    assert run.argv == [*base, "--label", "--wait=0", "--kill-on-bad-exit=0", *inside, *program]
    assert len(probes) == 2
    for call in probes:  # The containers are asked whether they see what is written.
        assert call.argv[: len(base) + len(inside) + 2] == [*base, *inside, "sh", "-c"]
    assert (tmp_path / "f" / "exit" / "7").read_text() == "0\n"


def test_one_host(tmp_path, checkout):
    """Starts in the background, goes on without a terminal, ends when it is asked to."""
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "program").symlink_to("/bin/bash")
    (venv / "bin" / "python").symlink_to("/bin/true")
    folder = tmp_path / "folder's $1"
    folder.mkdir()
    script, where = checkout.script("host"), f"--folder={folder}"
    fakes = Fakes(tmp_path / "fakes")
    program = ["program", "-c", SAVES + "\n# " + shlex.join(ODD), str(folder)]
    start = (script, "start", where, f"--venv={venv}", "--gpus=0,1", "--", *program)
    status, watcher, errors = fakes.run(*start)
    assert status == 0, errors
    try:
        wait_for(lambda: (folder / "log").exists(), 10, "a start")
        assert fakes.run(script, "status", where)[1] == f"RUNNING\t{watcher}"
        status, _, errors = fakes.run(*start)
        assert status == 2
        assert f"in use by process {watcher.strip()}" in errors
    finally:
        status, _, errors = fakes.run(script, "delete", where)
    assert status == 0, errors
    assert (folder / "log").read_text() == "running\nasked\nsaved\n"
    assert fakes.run(script, "status", where)[1] == "STOPPED\n"
    assert "nothing runs in" in fakes.run(script, "delete", where)[2]


def test_one_host_with_an_image(tmp_path, checkout):
    fakes = Fakes(tmp_path / "fakes", "docker")
    folder = tmp_path / "folder's $1"
    status, _, errors = fakes.run(
        *(checkout.script("host"), "start", f"--folder={folder}", "--image=host/x:1"),
        *("--gpus=0,1", "--mount=/data", "--", "python", f"--workdir={tmp_path}/w", *ODD),
    )
    assert status == 0, errors
    wait_for(lambda: (folder / "status").exists(), 10, "an end")
    (call,) = fakes.calls()
    assert call.argv[:4] == ["docker", "run", "--rm", "--name"]
    places = (folder, tmp_path / "w", "/data")
    assert call.argv[5:] == [
        *("--user", f"{os.getuid()}:{os.getgid()}", "--env", "HOME=/tmp"),
        *("--network", "host", "--ipc", "host", "--gpus", '"device=0,1"'),
        *(
            word
            for each in places
            for word in ("--mount", f"type=bind,source={each},target={each}")
        ),
        *("host/x:1", "python", f"--workdir={tmp_path}/w", *ODD),
    ]
