"""What each launch script runs, seen by stand-ins for gcloud, kubectl and sbatch."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.launch.fakes import Fakes
from tests.tiny import ROOT

HOSTILE = ["a b", "it's", '"', "$HOME", "$(touch hurt)", "`id`", "*", "\\", "", "ü;&|<>#", "$$(X)"]
ODD = [*HOSTILE, "tab\there, two\nlines, bell\x07, next\u0085line", "ends\n"]
TRAIN = ["python", "-m", "dydilit_jax.train", "--config=configs/digits.py", "--config.tag=it's $1"]
ADDED = ["--stopped_status=75", "--distributed_timeout=1800"]
TPU = ["--job=xl", "--project=p", "--zone=us-west4-a"]
GKE = ["--job=xl", "--project=p", "--cluster=c", "--location=us-east5", "--image=host/p/x:1"]


@pytest.fixture
def fakes(tmp_path):
    names = ("gcloud", "kubectl", "sbatch")
    made = Fakes(tmp_path / "fakes", *names, XDG_STATE_HOME=str(tmp_path / "state"))
    made.answer(["buckets", "describe"], ("True\n", 0))
    made.answer(["sbatch"], ("77\n", 0))
    return made


@pytest.fixture
def venv(tmp_path):
    folder = tmp_path / "an environment"
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").symlink_to("/bin/true")
    return folder


def both_ways(fakes, script, *arguments):
    """Runs a script, and then, as a script, what it prints with --dry-run: the same calls."""
    status, output, errors = fakes.run(script, *arguments)
    assert status == 0, errors
    calls = fakes.calls()
    command, *rest = arguments
    status, dry, errors = fakes.run(script, command, "--dry-run", *rest)
    assert status == 0, errors
    assert fakes.calls() == []
    status, _, errors = fakes.run("bash", "-euo", "pipefail", "-c", dry)
    assert status == 0, errors
    assert fakes.calls() == calls
    return calls, output


@pytest.mark.parametrize("place", ["slurm", "gke", "tpu", "host"])
def test_help_is_help(place, fakes):
    status, output, errors = fakes.run(ROOT / "launch" / f"{place}.sh", "start", "--help")
    assert (status, errors) == (0, "")
    for word in ("start", "status", "logs", "delete", "--dry-run"):
        assert word in output


@pytest.mark.parametrize("command", ["status", "delete"])
@pytest.mark.parametrize(
    ("place", "arguments", "tool"),
    [
        ("slurm", ["--job=xl"], "squeue|scancel"),
        ("tpu", TPU, "gcloud"),
        ("gke", [each for each in GKE if "image" not in each], "kubectl"),
    ],
)
def test_a_dry_run_calls_nothing(fakes, checkout, place, command, arguments, tool):
    for name in ("squeue", "scancel", "scontrol"):
        fakes.script(name, "#!/bin/sh\nexit 9\n")
    status, output, errors = fakes.run(checkout.script(place), command, "--dry-run", *arguments)
    assert (status, errors, fakes.calls()) == (0, "", [])
    assert re.search(f"^({tool}) ", output, re.MULTILINE)


def test_slurm_hands_over_every_word(fakes, checkout, venv, tmp_path):
    workdir = tmp_path / "work dir's $1"
    program = [*TRAIN, f"--workdir={workdir}", *ODD]
    calls, output = both_ways(
        fakes,
        checkout.script("slurm"),
        "start",
        *("--job=xl", "--nodes=4", "--gpus-per-node=8", "--time=1-00:00:00", f"--venv={venv}"),
        *("--partition=big gpus", "--sbatch-option=--comment=it's $1", "--", *program),
    )
    assert output == "77\n"
    folder = f"{workdir}/launch"
    code = f"{folder}/code/{checkout.revision}"
    assert [call.argv for call in calls] == [
        [
            *("sbatch", "--parsable", "--job-name=xl", "--nodes=4", "--ntasks-per-node=1"),
            *("--requeue", "--open-mode=append", "--signal=TERM@120", "--gpus-per-node=8"),
            *("--exclusive", "--mem=0", "--partition=big gpus", "--time=1-00:00:00"),
            *(f"--output={folder}/logs/%j.out", "--comment=it's $1"),
            *(str(checkout.root / "launch" / "slurm_job.sh"), f"--folder={folder}"),
            *(f"--code={code}", "--max-restarts=3", f"--venv={venv}", "--", *program, *ADDED),
        ]
    ]
    # The code is the revision's, and nothing in a hostile name was executed.
    assert (workdir / "launch" / "code" / checkout.revision / "dydilit_jax" / "train.py").is_file()
    assert not list(tmp_path.rglob("hurt"))


def test_slurm_keeps_an_array_s_commands(fakes, checkout, venv, tmp_path):
    file = tmp_path / "commands"
    commands = [[*TRAIN, f"--workdir={tmp_path}/run {k}", *HOSTILE] for k in range(3)]
    file.write_text("".join(shlex.join(command) + "\n" for command in commands))
    folder = tmp_path / "sweep 100%"
    calls, _ = both_ways(
        fakes,
        checkout.script("slurm"),
        "start",
        *("--job=sweep", f"--array={file}", f"--folder={folder}", "--max-parallel=2"),
        f"--venv={venv}",
    )
    (argv,) = [call.argv for call in calls]
    assert "--array=0-2%2" in argv
    assert f"--output={tmp_path}/sweep 100%%/logs/%A_%a.out" in argv
    (copy,) = [each.removeprefix("--commands=") for each in argv if "--commands=" in each]
    lines = Path(copy).read_text().splitlines()
    assert [shlex.split(line) for line in lines] == [each + ADDED for each in commands]


def test_tpu_requests_a_slice(fakes, checkout, tmp_path):
    calls, output = both_ways(
        fakes,
        checkout.script("tpu"),
        "start",
        *(*TPU, "--topology=v5e:16x16", "--spot", "--service-account=a@p.iam"),
        *("--", *TRAIN, "--workdir=gs://bucket/it's $1"),
    )
    assert output == "xl\n"
    assert [call.argv for call in calls] == [
        [
            *("gcloud", "storage", "buckets", "describe", "gs://bucket", "--raw"),
            "--format=value(hierarchicalNamespace.enabled)",
        ],
        [
            *("gcloud", "compute", "tpus", "queued-resources", "create", "xl", "--project=p"),
            *("--zone=us-west4-a", "--accelerator-type=v5litepod-256"),
            *("--runtime-version=v2-alpha-tpuv5-lite", "--node-id=xl", "--spot"),
            *("--service-account=a@p.iam", "--labels=dydilit-jax-launch=xl"),
            f"--metadata-from-file=startup-script={tmp_path}/state/dydilit-jax/xl-startup.sh",
        ],
    ]
    assert f"revision={checkout.revision}" in calls[1].input


@pytest.mark.parametrize(
    ("topology", "kind"),
    [
        ("v4:2x2x4", ["--type=v4", "--topology=2x2x4"]),
        ("v5p:2x2x2", ["--accelerator-type=v5p-16"]),
        ("v5p:4x4x8", ["--accelerator-type=v5p-256"]),
        ("v5p:8x8x12", ["--accelerator-type=v5p-1536"]),
        ("v6e:16x16", ["--accelerator-type=v6e-256"]),
    ],
)
def test_tpu_names_a_slice_as_queued_resources_do(fakes, checkout, topology, kind):
    arguments = [*TPU, f"--topology={topology}", "--slices=2"]
    behind = ["--", *TRAIN, "--workdir=gs://bucket/r"]
    assert fakes.run(checkout.script("tpu"), "start", *arguments, *behind)[0] == 0
    create = fakes.calls()[-1].argv
    assert create[8 : 8 + len(kind)] == kind
    assert {"--node-count=2", "--node-prefix=xl"} <= {*create}


def test_tpu_asks_again_after_a_preemption_until_the_run_has_ended(fakes, checkout):
    """Queued, there, working, preempted; again; ended on one host, then on all; deleted."""
    absent = ("ERROR: NOT_FOUND: no such resource", 1)
    states = ["WAITING_FOR_RESOURCES", "ACTIVE", "SUSPENDED", "PROVISIONING", "ACTIVE", "ACTIVE"]
    fakes.answer(["queued-resources", "describe"], absent, *((state, 0) for state in states))
    fakes.answer(["ssh", "--worker=0"], ("Worker 0:\nrunning\n", 0), ("Worker 0:\n0\n", 0))
    fakes.answer(["ssh", "--worker=all"], ("0\nrunning\n", 0), ("0\n0\n", 0))
    status, _, errors = fakes.run(
        checkout.script("tpu"),
        "keep",
        *(*TPU, "--topology=v5e:4x4", "--spot", "--poll=0"),
        *("--", *TRAIN, "--workdir=gs://bucket/r"),
    )
    assert status == 0, errors
    did = [next(w for w in call.argv if w in VERBS) for call in fakes.calls()]
    assert did == [
        *("buckets", "describe", "create", "describe", "describe", "ssh", "describe"),
        *("delete", "create", "describe", "describe", "ssh", "ssh", "describe", "ssh", "ssh"),
        "delete",
    ]


VERBS = ("buckets", "create", "describe", "ssh", "delete")


@pytest.mark.parametrize(
    ("states", "ssh", "status", "message"),
    [
        # Someone deleted it: it is not wanted any more.
        (["ACTIVE", "NONE"], "running", 0, "was deleted by someone else"),
        # A user's mistake ends it at once.
        (["ACTIVE"], "2", 2, "has ended with status 2"),
        # It cannot be had.
        (["FAILED", "FAILED", "FAILED"], "", 2, "error: the request for xl failed 3 times"),
    ],
)
def test_tpu_does_not_ask_again(fakes, checkout, states, ssh, status, message):
    answers = [("NOT_FOUND", 1) if each == "NONE" else (each, 0) for each in states]
    fakes.answer(["queued-resources", "describe"], *answers)
    fakes.answer(["ssh"], (f"{ssh}\n", 0))
    found, _, errors = fakes.run(
        checkout.script("tpu"),
        "keep",
        *(*TPU, "--topology=v5e:4x4", "--poll=0", "--", *TRAIN, "--workdir=gs://bucket/r"),
    )
    assert found == status, errors
    assert message in errors


def test_tpu_status_logs_and_delete(fakes, checkout):
    script = checkout.script("tpu")
    fakes.answer(["describe"], ("ACTIVE\n", 0))
    assert fakes.run(script, "status", *TPU) == (0, "xl\tACTIVE\n", "")
    fakes.calls()
    both_ways(fakes, script, "logs", *TPU, "--host=3", "--follow")
    calls, _ = both_ways(fakes, script, "delete", *TPU, "--slices=2")
    ssh = ["gcloud", "compute", "tpus", "tpu-vm", "ssh"]
    rest = ["--project=p", "--zone=us-west4-a", "--worker=all", "--quiet"]
    stop = "--command=sudo systemctl stop dydilit"
    assert [call.argv for call in calls] == [
        [*ssh, "xl-0", *rest, stop],
        [*ssh, "xl-1", *rest, stop],
        [
            *("gcloud", "compute", "tpus", "queued-resources", "delete", "xl", "--project=p"),
            *("--zone=us-west4-a", "--force", "--quiet"),
        ],
    ]


def test_gke_creates_what_it_shows(fakes, checkout):
    arguments = [*GKE, "--topology=v6e:8x8", "--", *TRAIN, "--workdir=gs://bucket/r", *ODD]
    calls, output = both_ways(fakes, checkout.script("gke"), "start", *arguments)
    assert output == "xl\n"
    context = ["kubectl", "--context=gke_p_us-east5_c", "--namespace=default"]
    assert [call.argv for call in calls] == [
        [
            *("gcloud", "container", "clusters", "get-credentials", "c", "--location=us-east5"),
            "--project=p",
        ],
        [
            *("gcloud", "storage", "buckets", "describe", "gs://bucket", "--raw"),
            "--format=value(hierarchicalNamespace.enabled)",
        ],
        [*context, "create", "-f", "-"],
    ]
    assert fakes.run(checkout.script("gke"), "manifest", *arguments)[1] == calls[-1].input


def test_gke_status_logs_and_delete(fakes, checkout):
    script, place = checkout.script("gke"), GKE[:-1]
    fakes.answer(["get"], ("xl-0\tCompleted\t2\t1 ready\nxl-1\t\t\t0 ready\n", 0))
    _, output, _ = fakes.run(script, "status", *place)
    assert output == "xl-0\tFINISHED\t2\t1 ready\nxl-1\tACTIVE\t0\t0 ready\n"
    fakes.calls()
    for command in ("logs", "delete"):
        calls, _ = both_ways(fakes, script, command, *place, "--task=1")
        assert any("xl-1" in each for each in calls[-1].argv)
    calls, _ = both_ways(fakes, script, "delete", *place)
    assert calls[-1].argv[3:] == [
        *("delete", "jobsets.jobset.x-k8s.io", "--selector=dydilit-jax/launch=xl")
    ]


def test_a_flat_bucket_is_refused(fakes, checkout):
    fakes.script("gcloud", "#!/bin/sh\nexit 0\n")  # Prints nothing: no hierarchical namespace.
    arguments = [*TPU, "--topology=v5e:4x4", "--", *TRAIN, "--workdir=gs://flat/r"]
    status, _, errors = fakes.run(checkout.script("tpu"), "start", *arguments)
    assert status == 2
    assert errors.startswith("error: gs://flat has no hierarchical namespace")


@pytest.mark.skipif(shutil.which("gcloud") is None, reason="needs the Google Cloud CLI")
def test_gcloud_takes_these_arguments(fakes, checkout, tmp_path):
    """The real one reads them all, and then misses an account."""
    tpu, gke = checkout.script("tpu"), checkout.script("gke")
    more = ["--spot", "--internal-ips", "--network=n", "--subnetwork=s", "--valid-until=6h"]
    behind = ["--", *TRAIN, "--workdir=gs://bucket/r"]
    assert fakes.run(tpu, "start", *TPU, "--topology=v6e:4x4", *more, *behind)[0] == 0
    assert fakes.run(tpu, "start", *TPU, "--topology=v4:2x2x4", "--reserved", *behind)[0] == 0
    assert fakes.run(tpu, "delete", *TPU)[0] == 0
    assert fakes.run(gke, "start", *GKE, "--topology=v6e:4x4", *behind)[0] == 0
    fakes.run(tpu, "status", *TPU)
    distinct = {shlex.join(call.argv): call.argv for call in fakes.calls()}
    commands = [argv for argv in distinct.values() if argv[0] == "gcloud"]
    assert len(commands) == 7
    environment = os.environ | {"CLOUDSDK_CONFIG": str(tmp_path / "empty")}
    for argv in commands:
        done = subprocess.run(argv, env=environment, capture_output=True, text=True)
        assert "You do not currently have an active account" in done.stderr, done.stderr
