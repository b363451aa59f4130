"""The evaluation command: scores against independent ones, several processes, kills, mistakes."""

import hashlib
import json
import signal
import socket
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.linalg import sqrtm
from sklearn.neighbors import NearestNeighbors

from dydilit_jax.data.sources import digits
from dydilit_jax.drawing import to_uint8
from tests.commands import ENVIRONMENT, assert_one_line
from tests.tiny import ROOT, plain_config, save_run

EVALUATE, SAMPLE = "dydilit_jax.evaluate", "dydilit_jax.sample"
REAL = to_uint8(digits().images)
PATIENCE = 300.0  # seconds; of a machine that does much else


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A workdir with two checkpoints of the same weights."""
    workdir = tmp_path_factory.mktemp("evaluated") / "run"
    config = plain_config(evaluation={"features": "pixels"})
    save_run(workdir, config, step=1)
    save_run(workdir, config, step=3)
    return workdir


@pytest.fixture(scope="module")
def evaluate(command, tmp_path_factory):
    """Runs the command; returns the report that it wrote, and what it said."""

    def evaluate(*arguments):
        out = tmp_path_factory.mktemp("report") / "scores.json"
        code, output, errors = command(EVALUATE, *arguments, f"--out={out}")
        assert code == 0, errors
        assert not out.with_name(out.name + ".unfinished").exists()
        return json.loads(out.read_text()), output

    return evaluate


@pytest.fixture(scope="module")
def scored(run, evaluate, tmp_path_factory):
    """60 samples: the report, and the .npz beside it."""
    npz = tmp_path_factory.mktemp("drawn") / "samples.npz"
    report, output = evaluate(f"--workdir={run}", "--num=60", "--seed=3", f"--save_npz={npz}")
    return report, npz, output


def vectors(images):
    return images.reshape(len(images), -1) / 127.5 - 1.0


def frechet(first, second):
    """Heusel's formula with scipy's matrix square root, float64."""
    covariances = [np.cov(each, rowvar=False) for each in (first, second)]
    shift = first.mean(0) - second.mean(0)
    root = sqrtm(covariances[0] @ covariances[1])
    return shift @ shift + np.trace(covariances[0] + covariances[1] - 2 * np.real(root))


def share_within(points, manifold, k=3):
    """Share of points within the k-th neighbour's distance of any point of a manifold."""
    radii = NearestNeighbors(n_neighbors=k + 1).fit(manifold).kneighbors(manifold)[0][:, k]
    distances = np.linalg.norm(points[:, None] - manifold[None], axis=-1)
    return np.mean((distances <= radii).any(axis=1))


def test_scores_are_those_of_the_images_that_sample_writes(run, scored, command, tmp_path):
    report, npz, output = scored
    code, _, errors = command(
        SAMPLE, f"--workdir={run}", "--num=60", "--seed=3", f"--out={tmp_path}/s.npz"
    )
    assert code == 0, errors
    with np.load(tmp_path / "s.npz") as drawn, np.load(npz) as saved:
        np.testing.assert_array_equal(saved["arr_0"], drawn["arr_0"])
        np.testing.assert_array_equal(saved["arr_1"], drawn["arr_1"])
        samples = vectors(drawn["arr_0"])
    scores = report["scores"]
    assert scores["num_images"] == 60
    assert scores["pixel_frechet"] == pytest.approx(frechet(samples, vectors(REAL)), rel=1e-6)
    precision, recall = scores["pixel_precision"], scores["pixel_recall"]
    assert precision == pytest.approx(share_within(samples, vectors(REAL)))
    assert recall == pytest.approx(share_within(vectors(REAL), samples))
    assert "fid" not in scores
    assert f"pixel_frechet                {scores['pixel_frechet']:.6g}\n" in output
    settings = report["settings"]
    expected = {
        "step": 3,
        "parameters": "moving average",
        "sampler": "euler",
        "steps": 2,
        "guidance_scale": 1.5,
        "seed": 3,
        "num": 60,
        "labels": "10 classes in turn",
        "image_shape": [8, 8, 1],
        "dtype": "float32",
        "features": "pixel",
        "reference_images": 1797,
    }
    assert {name: settings[name] for name in expected} == expected
    assert len(settings["reference_checksum"]) == len(settings["features_checksum"]) == 64
    assert report["environment"]["devices"] == "8 x cpu"
    assert report["environment"]["versions"].keys() >= {"jax", "dydilit_jax", "python"}
    assert report["config"]["model"]["width"] == 16
    # 60 samples have a singular covariance of 64 pixels.
    assert len(report["warnings"]) == 1


def test_the_same_images_from_files_have_the_same_scores(run, scored, evaluate, command, tmp_path):
    report, npz, _ = scored
    reference = f"--reference={run}/references/pixels.npz"
    from_npz, _ = evaluate(f"--images={npz}", reference, "--features=pixels")
    assert from_npz["scores"] == pytest.approx(report["scores"], rel=1e-9)
    with np.load(npz) as saved:
        for i, image in enumerate(saved["arr_0"][..., 0]):
            Image.fromarray(image).save(tmp_path / f"{i:06d}.png")
    # The run tells the features and makes the reference.
    from_folder, _ = evaluate(f"--images={tmp_path}", f"--workdir={run}", "--batch_size=13")
    assert from_folder["scores"] == pytest.approx(report["scores"], rel=1e-9)
    first, _ = evaluate(f"--images={npz}", f"--workdir={run}", "--num=20", "--scores=frechet")
    assert first["scores"].keys() == {"num_images", "pixel_frechet"}
    assert first["scores"]["num_images"] == 20


def start(*arguments, devices=8, **options):
    environment = ENVIRONMENT | {
        "XLA_FLAGS": ENVIRONMENT["XLA_FLAGS"].replace("count=8", f"count={devices}")
    }
    return subprocess.Popen(
        [sys.executable, "-m", EVALUATE, *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_two_processes_and_one_give_the_same_scores(run, scored, tmp_path):
    report, npz, _ = scored
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    arguments = [
        f"--workdir={run}",
        "--num=60",
        "--seed=3",
        "--batch_size=17",
        f"--out={tmp_path}/scores.json",
        f"--save_npz={tmp_path}/samples.npz",
        f"--coordinator_address={address}",
        "--num_processes=2",
    ]
    processes = [start(*arguments, f"--process_id={i}", devices=4) for i in (0, 1)]
    said = [process.communicate(timeout=PATIENCE) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert "pixel_frechet" in said[0][0]
    assert "pixel_frechet" not in said[1][0]
    ours = json.loads((tmp_path / "scores.json").read_text())
    assert ours["scores"] == pytest.approx(report["scores"], rel=1e-6)
    assert ours["settings"] == report["settings"]
    assert ours["environment"]["processes"] == 2
    with np.load(npz) as one, np.load(tmp_path / "samples.npz") as two:
        np.testing.assert_array_equal(one["arr_0"], two["arr_0"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["samples.npz", "scores.json"]


def test_terminated_and_killed_it_goes_on_and_ends_with_the_same_scores(
    run, evaluate, command, tmp_path
):
    drawn = [f"--workdir={run}", "--num=480", "--batch_size=8", "--save_every=16"]
    out, npz = tmp_path / "scores.json", tmp_path / "samples.npz"
    arguments = [*drawn, f"--out={out}", f"--save_npz={npz}"]
    states = tmp_path / "scores.json.unfinished" / "sums"

    def whole_states():
        return set(states.glob("state-*.npz"))  # one that is still being written is no .npz

    def wait_for_state(process, after):
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline and process.poll() is None:
            if whole_states() - after:
                return
            time.sleep(0.01)
        raise AssertionError(process.communicate())

    with start(*arguments) as process:
        wait_for_state(process, set())
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert "of 480 images; run again to go on" in output
    stopped = int(output.split("stopped at ")[1].split()[0])
    with start(*arguments) as process:
        wait_for_state(process, whole_states())
        process.kill()
        output, _ = process.communicate(timeout=PATIENCE)
    assert f"{stopped} of 480 images are scored already" in output
    code, _, errors = command(EVALUATE, *arguments, "--seed=1")
    assert_one_line(code, errors, "part of another request, with another seed:")
    code, output, errors = command(EVALUATE, *arguments)
    assert code == 0, errors
    resumed = int(output.split(" of 480 images are scored already")[0].splitlines()[-1])
    assert stopped < resumed < 480
    whole = tmp_path / "whole.npz"
    straight, _ = evaluate(*drawn, f"--save_npz={whole}")
    report = json.loads(out.read_text())
    assert report["scores"] == pytest.approx(straight["scores"], rel=1e-9)
    assert report["settings"] == straight["settings"]
    with np.load(npz) as one, np.load(whole) as other:
        np.testing.assert_array_equal(one["arr_0"], other["arr_0"])
    # What is there is told again, and not overwritten by something else.
    code, told, _ = command(EVALUATE, *arguments)
    assert code == 0
    assert f"pixel_frechet                {report['scores']['pixel_frechet']:.6g}\n" in told
    code, _, errors = command(EVALUATE, *arguments, "--guidance_scale=2")
    assert_one_line(code, errors, "the scores of another request, with another guidance_scale:")


def test_a_reference_holds_the_moments_of_the_data_set(command, evaluate, tmp_path):
    out = tmp_path / "digits.npz"
    config = ["--config=configs/digits.py", "--features=pixels"]
    arguments = [f"--make_reference={out}", *config, "--reference_images=50"]
    code, output, errors = command(EVALUATE, *arguments)
    assert code == 0, errors
    assert "the reference of 1797 images" in output
    with np.load(out) as arrays:
        np.testing.assert_allclose(arrays["mu"], vectors(REAL).mean(0), atol=1e-6)
        np.testing.assert_allclose(arrays["sigma"], np.cov(vectors(REAL).T), atol=1e-6)
        assert arrays["arr_0"].shape == (50, 8, 8, 1)
        kept = arrays["arr_0"]
        assert arrays["features"].shape == (50, 64)
        np.testing.assert_allclose(arrays["features"], vectors(kept), atol=1e-6)
    everything = {image.tobytes() for image in REAL}
    assert {image.tobytes() for image in kept} <= everything
    assert [path.name for path in tmp_path.iterdir()] == ["digits.npz"]
    assert_one_line(*command(EVALUATE, *arguments)[::2], "exists: choose another file")
    # Real images against their own reference.
    np.savez(tmp_path / "real.npz", arr_0=REAL)
    report, _ = evaluate(f"--images={tmp_path}/real.npz", f"--reference={out}", "--features=pixels")
    assert report["scores"]["pixel_frechet"] == pytest.approx(0.0, abs=1e-6)
    assert report["scores"]["pixel_recall"] == 1.0


def test_a_reference_of_unknown_size_is_warned_of(evaluate, tmp_path):
    np.savez(tmp_path / "real.npz", arr_0=REAL)
    moments = {"mu": vectors(REAL).mean(0), "sigma": np.cov(vectors(REAL).T)}
    moments["extractor"] = np.array("pixel")  # else they would be taken for Inception's
    arguments = [f"--images={tmp_path}/real.npz", "--features=pixels", "--scores=frechet"]
    np.savez(tmp_path / "sized.npz", **moments, image_shape=np.array([8, 8, 1]))
    np.savez(tmp_path / "bare.npz", **moments)
    for name in ("sized", "bare"):
        report, _ = evaluate(*arguments, f"--reference={tmp_path}/{name}.npz")
        assert report["scores"]["pixel_frechet"] == pytest.approx(0.0, abs=1e-6)
        said = [line for line in report["warnings"] if "does not say of which size" in line]
        assert len(said) == (name == "bare")
        size = report["settings"]["reference_image_shape"]
        assert size == ([8, 8, 1] if name == "sized" else "not known")


def test_weights_labels_and_checkpoints_are_chosen(run, scored, evaluate):
    report, *_ = scored
    drawn = [f"--workdir={run}", "--num=60", "--seed=3"]
    # The average of weights that never changed.
    trained, _ = evaluate(*drawn, "--noema", "--step=1")
    assert trained["settings"]["parameters"] == "as trained"
    assert trained["settings"]["step"] == 1
    assert trained["scores"] == pytest.approx(report["scores"], rel=1e-3)
    random, _ = evaluate(*drawn, "--random_labels", "--scores=frechet")
    assert random["settings"]["labels"] == "random labels of 10 classes"
    assert random["scores"]["pixel_frechet"] != report["scores"]["pixel_frechet"]
    odd, _ = evaluate(f"--workdir={run}", "--num=20", "--labels=1,2,7", "--scores=frechet")
    assert odd["settings"]["labels"] == "3 classes in turn, not balanced: 20 is no multiple"


def test_a_classifier_is_trained_once_and_kept(run, evaluate, command, tmp_path):
    arguments = [f"--workdir={run}", "--num=40", "--features=classifier", "--scores=frechet"]
    report, _ = evaluate(*arguments)
    assert report["scores"].keys() == {"num_images", "classifier_frechet"}
    assert "right on held-out images" in report["settings"]["features_description"]
    names = {path.name for path in (run / "references").iterdir()}
    assert names >= {"classifier.npz", "classifier.classifier.safetensors"}
    again, _ = evaluate(*arguments)
    assert again["scores"] == report["scores"]
    # Another classifier beside the reference is not the one that it is of.
    lost = tmp_path / "lost.npz"
    lost.write_bytes((run / "references" / "classifier.npz").read_bytes())
    code, _, errors = command(
        EVALUATE, f"--images={tmp_path}", f"--reference={lost}", "--features=classifier"
    )
    assert_one_line(code, errors, "no .png files")
    for i in range(4):
        Image.fromarray(REAL[i, ..., 0]).save(tmp_path / f"{i}.png")
    code, _, errors = command(
        EVALUATE, f"--images={tmp_path}", f"--reference={lost}", "--features=classifier"
    )
    assert_one_line(code, errors, "there is no classifier", "lost.classifier.safetensors")


def test_dinov2_scores_bear_its_name(evaluate, command, tmp_path):
    """Random weights; a reference of them serves no other network."""
    fixtures = ROOT / "tests" / "metrics" / "fixtures" / "dinov2"
    dinov2 = ["--features=dinov2", f"--weights={fixtures}/plain"]
    reference, images = tmp_path / "fdd.npz", tmp_path / "real.npz"
    made = [f"--make_reference={reference}", "--config=configs/digits.py", "--num=64"]
    code, _, errors = command(EVALUATE, *made, *dinov2)
    assert code == 0, errors
    np.savez(images, arr_0=REAL[:64])
    report, _ = evaluate(f"--images={images}", f"--reference={reference}", *dinov2)
    scores = report["scores"]
    assert scores.keys() == {"num_images"} | {
        f"dinov2_{name}"
        for name in ("frechet", "kernel", "kernel_standard_error", "precision", "recall")
    }
    assert scores["dinov2_frechet"] == pytest.approx(0.0, abs=1e-4)
    assert scores["dinov2_recall"] == 1.0
    weights = (fixtures / "plain" / "model.safetensors").read_bytes()
    assert report["settings"]["features_checksum"] == hashlib.sha256(weights).hexdigest()
    assert "positions as dgm_eval" in report["settings"]["features_description"]
    np.savez(images, arr_0=255 - REAL[:64])
    asked = [f"--images={images}", f"--reference={reference}"]
    inverted, _ = evaluate(*asked, *dinov2, "--scores=frechet")
    assert inverted["scores"]["dinov2_frechet"] > 0.1
    for arguments, message in (
        (["--features=pixels"], "holds features of dinov2, the samples are seen by pixel"),
        ([*dinov2, "--variant=transformers"], "positions as dgm_eval"),
        (["--features=dinov2", f"--weights={fixtures}/swiglu"], "features are of weights"),
    ):
        code, _, errors = command(EVALUATE, *asked, *arguments, f"--out={tmp_path}/none.json")
        assert_one_line(code, errors, message)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Folders and files that cannot be scored."""
    folder = tmp_path_factory.mktemp("pictures")
    for name, images in (("mixed", [*REAL[:4], REAL[4, :6]]), ("damaged", REAL[:5])):
        (folder / name).mkdir()
        for i, image in enumerate(images):
            Image.fromarray(image[..., 0]).save(folder / name / f"{i}.png")
    damaged = folder / "damaged" / "3.png"
    damaged.write_bytes(damaged.read_bytes()[:-40])
    np.savez(folder / "large.npz", arr_0=REAL.repeat(2, 1).repeat(2, 2))
    np.savez(folder / "sized.npz", mu=np.zeros(64), sigma=np.eye(64), image_shape=(16, 16, 1))
    np.savez(folder / "huge.npz", arr_0=np.zeros((4, 80, 80, 3), np.uint8))
    np.savez(folder / "neither.npz", other=np.zeros(3))
    (folder / "empty").mkdir()
    save_run(folder / "empty" / "run", plain_config())
    for path in (folder / "empty" / "run" / "checkpoints" / "1").glob("manifest.json"):
        path.unlink()
    return folder


MISTAKES: dict[str, tuple[Any, ...]] = {
    "no workdir": ([], "--workdir is missing, or --images"),
    "not a workdir": (["--workdir={pictures}"], "is not a workdir"),
    "no checkpoint": (["--workdir={pictures}/empty/run"], "has no checkpoint yet: train first"),
    "another step": (["--workdir={run}", "--step=2"], "has no checkpoint of step 2; it has: 1, 3"),
    "no reference": (
        ["--workdir={run}", "--reference={pictures}/no.npz"],
        "no.npz' does not exist: python -m dydilit_jax.evaluate --make_reference=",
    ),
    "reference missing": (
        ["--workdir={run}", "--features=inception"],
        "a reference is missing (--reference, evaluation.reference)",
    ),
    "another size": (
        ["--workdir={run}", "--reference={pictures}/large.npz"],
        "is of images 16 x 16, the samples are 8 x 8",
    ),
    "another size, without images": (
        ["--workdir={run}", "--reference={pictures}/sized.npz"],
        "is of images 16 x 16, the samples are 8 x 8",
    ),
    "not a reference": (
        ["--workdir={run}", "--reference={pictures}/neither.npz"],
        "holds neither moments (mu, sigma) nor images (arr_0)",
    ),
    "unknown features": (
        ["--workdir={run}", "--features=inceptoin"],
        "unknown features 'inceptoin': did you mean 'inception'",
    ),
    "unknown score": (["--workdir={run}", "--scores=fid"], "unknown score 'fid'"),
    "one image": (
        ["--workdir={run}", "--num=1"],
        "1 images are too few: precision and recall need at least 4",
    ),
    "no spread": (["--workdir={run}", "--num=1", "--scores=frechet"], "needs at least 2"),
    "no image": (["--workdir={run}", "--num=0"], "--num=0"),
    "more than there are": (
        ["--images={pictures}/huge.npz", "--num=5"],
        "--num=5, but",
        "has 4 images",
    ),
    "mixed sizes": (
        ["--images={pictures}/mixed", "--workdir={run}"],
        "4.png' has 8 x 6 pixels, 0.png before it 8 x 8",
    ),
    "damaged": (["--images={pictures}/damaged", "--workdir={run}"], "3.png' cannot be read"),
    "nothing there": (["--images={pictures}/none"], "does not exist: expected a folder of PNG"),
    "no images in it": (["--images={pictures}/neither.npz"], "has no array arr_0"),
    "too large": (
        ["--images={pictures}/huge.npz", "--workdir={run}"],
        "--features=pixels is for images of up to 64 pixels a side",
    ),
    "two things": (
        ["--images={pictures}/mixed", "--make_reference=a.npz"],
        "--images and --make_reference are two things",
    ),
    "whose reference": (["--make_reference={pictures}/a.npz"], "needs --config, or --workdir"),
    "no npz": (["--workdir={run}", "--save_npz={pictures}/a.png"], "does not end in .npz"),
    "no weights": (
        [
            "--workdir={run}",
            "--features=inception",
            "--weights={pictures}/none.pth",
            "--reference={pictures}/moments.npz",
        ],
        "none.pth",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_told_in_one_line(command, run, pictures, tmp_path, mistake):
    arguments, *parts = MISTAKES[mistake]
    width = 2048
    moments = pictures / "moments.npz"
    if not moments.exists() and mistake == "no weights":
        np.savez(moments, mu=np.zeros(width), sigma=np.eye(width))
    given = [each.format(run=run, pictures=pictures) for each in arguments]
    out = tmp_path / "scores.json"
    code, _, errors = command(EVALUATE, *given, f"--out={out}")
    # A progress bar may have begun.
    lines = [line for line in errors.splitlines() if line and "image/s" not in line]
    assert_one_line(code, "\n".join(lines), *parts)
    assert not out.exists()
