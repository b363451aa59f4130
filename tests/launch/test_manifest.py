"""GKE's manifests against the schemas of Kubernetes and JobSet, and what their containers run."""

from __future__ import annotations

import re
import shlex

import pytest
import yaml

from tests.launch.fakes import Fakes
from tests.launch.test_places import ADDED, GKE, HOSTILE, ODD, TRAIN

kubernetes_validate = pytest.importorskip("kubernetes_validate")
trainer_models = pytest.importorskip("kubeflow_trainer_api.models")

VERSIONS = ("1.31", "1.37")  # of Kubernetes: the oldest and the newest that a JobSet may meet


@pytest.fixture
def manifests(tmp_path, checkout):
    """The JobSets that options and a program make."""
    fakes = Fakes(tmp_path / "fakes")

    def make(*arguments):
        status, output, errors = fakes.run(checkout.script("gke"), "manifest", *arguments)
        assert status == 0, errors
        return list(yaml.safe_load_all(output))

    return make


def validate(jobset):
    """Every field is one of the schemas', and has a value that they allow."""
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    model = trainer_models.JobsetV1alpha2JobSet.from_dict(jobset)
    # What the model does not know would be gone; the Jobs within are for their own schema.
    assert without_templates(model.to_dict()) == without_templates(jobset)
    for job in jobset["spec"]["replicatedJobs"]:
        whole = {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {"name": job["name"]},
            **job["template"],
        }
        for version in VERSIONS:
            kubernetes_validate.validate(whole, version, strict=True)
    for labels in (jobset["metadata"]["labels"], pod_of(jobset)["metadata"]["labels"]):
        for value in labels.values():
            assert re.fullmatch(r"[a-z0-9A-Z]([a-z0-9A-Z._-]{0,61}[a-z0-9A-Z])?", value)


def without_templates(value):
    if isinstance(value, dict):
        return {k: without_templates(v) for k, v in value.items() if k != "template"}
    if isinstance(value, list):
        return [without_templates(each) for each in value]
    return value


def job_of(jobset):
    (job,) = jobset["spec"]["replicatedJobs"]
    return job


def pod_of(jobset):
    return job_of(jobset)["template"]["spec"]["template"]


def run_by(jobset, **variables):
    """The arguments as the container gets them: Kubernetes puts in variables, and reads $$ as $."""
    container = pod_of(jobset)["spec"]["containers"][0]

    def expand(match):
        if match[0] == "$$":
            return "$"
        return variables.get(match[1], match[0])

    return [re.sub(r"\$\$|\$\(([A-Za-z_]\w*)\)", expand, each) for each in container["args"]]


def test_slices_of_several_hosts(manifests):
    (jobset,) = manifests(
        *(*GKE, "--topology=v5e:16x16", "--slices=2", "--spot", "--queue=big", "--grace=25"),
        *("--service-account=trainer", "--volume=data-claim:/data it's", "--memory=100Gi"),
        *("--", *TRAIN, "--workdir=gs://bucket/runs/it's $1", "--data", "gs://other-bucket/a"),
        *ODD,
    )
    validate(jobset)
    job = job_of(jobset)
    assert job["replicas"] == 2
    assert job["template"]["spec"]["parallelism"] == 256 // 4
    assert job["template"]["spec"]["completions"] == 256 // 4
    pod = pod_of(jobset)["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "16x16",
        "cloud.google.com/gke-spot": "true",
    }
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": 4}
    expected = [*TRAIN, "--workdir=/gcs/bucket/runs/it's $1", "--data", "/gcs/other-bucket/a"]
    assert run_by(jobset, X="hurt") == [*expected, *ODD, *ADDED]
    mounted = {mount["mountPath"]: mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    assert mounted.keys() == {"/dev/shm", "/gcs/bucket", "/gcs/other-bucket", "/data it's"}
    volumes = {volume.pop("name"): volume for volume in pod["volumes"]}
    assert volumes[mounted["/gcs/bucket"]]["csi"]["volumeAttributes"]["bucketName"] == "bucket"
    assert volumes[mounted["/data it's"]] == {"persistentVolumeClaim": {"claimName": "data-claim"}}
    assert {*mounted.values()} == volumes.keys()
    assert pod_of(jobset)["metadata"]["annotations"]["gke-gcsfuse/volumes"] == "true"


@pytest.mark.parametrize(
    ("topology", "label", "hosts", "chips"),
    [
        ("v5e:2x4", "tpu-v5-lite-podslice", 1, 8),
        ("v6e:1x1", "tpu-v6e-slice", 1, 1),
        ("v6e:4x4", "tpu-v6e-slice", 4, 4),
        ("v4:2x2x1", "tpu-v4-podslice", 1, 4),
        ("v5p:8x8x16", "tpu-v5p-slice", 256, 4),
        ("tpu7x:4x4x4", "tpu7x", 16, 4),
    ],
)
def test_hosts_of_a_slice(manifests, topology, label, hosts, chips):
    (jobset,) = manifests(*GKE, f"--topology={topology}", "--", *TRAIN, "--workdir=gs://bucket/r")
    validate(jobset)
    job, pod = job_of(jobset)["template"]["spec"], pod_of(jobset)["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] == label
    assert (job["parallelism"], pod["containers"][0]["resources"]["limits"]["google.com/tpu"]) == (
        hosts,
        chips,
    )
    # Only a slice of several hosts is a node pool of its own.
    annotation = "alpha.jobset.sigs.k8s.io/exclusive-topology"
    assert (annotation in jobset["metadata"].get("annotations", {})) == (hosts > 1)


def test_gpu_hosts_are_told_of_each_other(manifests):
    (jobset,) = manifests(
        *(*GKE, "--gpu=nvidia-h100-80gb", "--nodes=2", "--shared=/mnt/data"),
        *("--", *TRAIN, "--workdir=/mnt/data/run"),
    )
    validate(jobset)
    said = run_by(jobset, JOB_COMPLETION_INDEX="1")
    assert said[-3:] == [
        "--coordinator_address=xl-hosts-0-0.xl:8476",
        "--num_processes=2",
        "--process_id=1",
    ]
    limits = pod_of(jobset)["spec"]["containers"][0]["resources"]["limits"]
    assert limits == {"nvidia.com/gpu": 8}
    # A program of another kind has no such flags.
    (jobset,) = manifests(*GKE, "--gpu=nvidia-l4", "--nodes=2", "--", "nvidia-smi")
    assert run_by(jobset) == ["nvidia-smi"]


def test_a_mistake_ends_the_jobset_and_nothing_else_does(manifests):
    (jobset,) = manifests(*GKE, "--topology=v5e:4x4", "--", *TRAIN, "--workdir=gs://bucket/r")
    job = job_of(jobset)["template"]["spec"]
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule == {
        "action": "FailJob",
        "onExitCodes": {"containerName": "main", "operator": "In", "values": [2]},
    }
    # Any other failure of a pod fails its Job at once, and then all Jobs are made anew.
    assert job["backoffLimit"] == 0
    policy = jobset["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 100
    (rule,) = policy["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])


def test_an_array_is_a_jobset_for_each_line(manifests, tmp_path):
    file = tmp_path / "commands"
    programs = [[*TRAIN, f"--workdir=gs://bucket-{k}/r", *HOSTILE] for k in range(2)]
    file.write_text("".join(shlex.join(each) + "\n" for each in programs))
    found = manifests(*GKE, "--topology=v5e:2x2", f"--array={file}")
    assert [jobset["metadata"]["name"] for jobset in found] == ["xl-0", "xl-1"]
    for k, jobset in enumerate(found):
        validate(jobset)
        expected = [each.replace("gs://", "/gcs/") for each in programs[k]]
        assert run_by(jobset) == expected + ADDED
        (volume,) = [each["csi"] for each in pod_of(jobset)["spec"]["volumes"] if "csi" in each]
        assert volume["volumeAttributes"]["bucketName"] == f"bucket-{k}"


def test_the_schemas_would_see_a_mistake(manifests):
    (jobset,) = manifests(*GKE, "--topology=v5e:4x4", "--", *TRAIN, "--workdir=gs://bucket/r")
    pod_of(jobset)["spec"]["nodeSelectors"] = pod_of(jobset)["spec"].pop("nodeSelector")
    with pytest.raises(kubernetes_validate.ValidationError):
        validate(jobset)
    (jobset,) = manifests(*GKE, "--topology=v5e:4x4", "--", *TRAIN, "--workdir=gs://bucket/r")
    jobset["spec"]["failurePolicies"] = jobset["spec"].pop("failurePolicy")
    with pytest.raises(AssertionError):
        validate(jobset)
