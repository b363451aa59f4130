"""Drawing from a run, and from weights of other projects and ours."""

import dataclasses
import json
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dydilit_jax.diffusion.gaussian import GaussianProcess
from dydilit_jax.diffusion.samplers import make_sampler, sample
from dydilit_jax.errors import UserError
from dydilit_jax.models.pretrained import read_pretrained, save_pretrained
from dydilit_jax.models.pretrained.files import find_weights
from dydilit_jax.training.state import Network
from dydilit_jax.training.trained import load_run, load_weights, weights_config
from tests.autoencoders.test_diffusers import FIXTURES as AUTOENCODERS
from tests.models.test_pretrained import DIFFUSERS, OFFICIAL, output
from tests.tiny import plain_config, random_parameters, save_run

VAE = str(AUTOENCODERS / "kl")


def config_of(path, **options):
    return weights_config(read_pretrained(path, heads=4), find_weights(path), **options)


def test_a_dit_is_gaussian_with_learned_variance_and_sampled_as_its_code_does():
    config = config_of(OFFICIAL, autoencoder=VAE)
    assert config.diffusion.process == "gaussian"
    # The published models': 1,000 linear steps, noise predicted, variance learned.
    expected = GaussianProcess(schedule="linear", train_steps=1000, prediction="noise")
    assert config.diffusion.gaussian == expected
    assert config.diffusion.gaussian.learned_variance
    sampling = config.sampling
    assert (sampling.sampler, sampling.steps, sampling.guidance_channels) == ("", 250, 3)
    assert config.autoencoder.weights == VAE


def network_output(pretrained, x, labels, time):
    """What a DiT's file puts out for x (b, 8, 8, 4) at one time, all of its eight channels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(output.__globals__, "DIT", {"images": x, "labels": labels})
        times = np.full(len(labels), time, np.float32)
        return output(pretrained.config, pretrained.parameters, time=times)


def test_a_dit_draws_what_ddim_by_hand_gives():
    """Two steps, at 999 and 0, with the noise that the network predicts of four channels."""
    trained = load_weights(
        OFFICIAL, heads=4, autoencoder=VAE, sampler="ddim", steps=2, guidance_scale=1.0
    )
    labels, seed = np.array([3, 7]), 5
    (latents,) = trained.batches(labels, seed=seed)
    betas = np.linspace(1e-4, 0.02, 1000)
    kept = np.cumprod(1 - betas)
    # A network that predicts no noise leaves the start, scaled: so the start is known.
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(np.arange(2))
    sampler = make_sampler("ddim", GaussianProcess(), 2)
    still = sample(sampler, lambda x, _: jnp.zeros((*x.shape[:-1], 8)), keys, (8, 8, 4))
    x = np.asarray(still) * np.sqrt(kept[999])
    assert 0.8 < np.std(x) < 1.2
    pretrained = read_pretrained(OFFICIAL, heads=4)
    for step, after in ((999, kept[0]), (0, 1.0)):
        noise = network_output(pretrained, x, labels, step)[..., :4]
        x_0 = (x - np.sqrt(1 - kept[step]) * noise) / np.sqrt(kept[step])
        x = (np.sqrt(after) * x_0 + np.sqrt(1 - after) * noise).astype(np.float32)
    np.testing.assert_allclose(latents, x, rtol=0, atol=1e-3 * np.abs(x).max())


def test_latents_are_decoded_to_the_size_that_the_network_gives():
    trained = load_weights(
        DIFFUSERS, autoencoder=VAE, sampler="ddim", steps=2, batch_size=8, guidance_scale=2.0
    )
    assert trained.name == "dit_diffusers"
    assert trained.labels == [str(label) for label in range(10)]
    images = trained.draw([1, 2, 3], seed=1)
    assert images.shape == (3, 64, 64, 3)  # 8 x 8 latents, of an autoencoder of eight pixels each
    assert np.std(images) > 0
    np.testing.assert_array_equal(images[:2], trained.draw([1, 2], seed=1))
    (latents,) = trained.batches(np.array([1, 2, 3]), seed=1)
    np.testing.assert_array_equal(trained.decode(latents), images)


def test_a_sit_draws_what_eulers_method_on_its_own_time_gives():
    """Two steps of SiT's equation, dx/ds = v, from noise at s = 0 to data at s = 1."""
    options: dict[str, Any] = {"sit": True, "heads": 4, "autoencoder": VAE}
    trained = load_weights(OFFICIAL, **options, steps=2, guidance_scale=1.0)
    config = trained.config
    assert config.diffusion.process == "flow"
    assert trained.identity["sit"] is True
    assert load_weights(OFFICIAL, **options).config.sampling.guidance_channels == 3
    labels, keys = np.array([4]), jax.random.fold_in(jax.random.key(2), 0)[None]
    (latents,) = trained.batches(labels, seed=2)
    sampler = make_sampler("euler", config.diffusion.flow, 1)
    x = np.asarray(sample(sampler, lambda x, _: 0.0 * x, keys, (8, 8, 4)))
    sit = read_pretrained(OFFICIAL, heads=4)
    for s in (0.0, 0.5):
        x = x + 0.5 * network_output(sit, x, labels, s)[..., :4]
    np.testing.assert_allclose(latents, x, rtol=0, atol=1e-3 * np.abs(x).max())


def test_a_pipelines_autoencoder_is_found_beside(tmp_path):
    shutil.copytree(DIFFUSERS, tmp_path / "transformer")
    shutil.copytree(VAE, tmp_path / "vae")
    for path in (tmp_path, tmp_path / "transformer"):
        assert config_of(path).autoencoder.weights == str(tmp_path / "vae")
    assert config_of(tmp_path, autoencoder="sd-vae-ft-mse").autoencoder.weights == "sd-vae-ft-mse"


RUN = plain_config(
    diffusion={"flow": {"time_scale": 7.0}},
    sampling={"steps": 3, "guidance_scale": 2.5},
)


def test_an_export_of_ours_draws_what_its_run_draws(command, tmp_path):
    save_run(tmp_path / "run", RUN, step=3)
    code, _, errors = command(
        "dydilit_jax.convert", f"--workdir={tmp_path}/run", f"--out={tmp_path}/exported"
    )
    assert (code, errors) == (0, "")
    run, weights = load_run(tmp_path / "run"), load_weights(tmp_path / "exported")
    assert run.name == "step 3"
    assert weights.config.diffusion == RUN.diffusion
    assert weights.config.sampling == run.config.sampling == RUN.sampling
    labels = np.array([0, 9])
    np.testing.assert_allclose(run.draw(labels), weights.draw(labels), rtol=1e-4, atol=1e-4)
    other = load_run(tmp_path / "run", steps=2, sampler="heun")
    assert other.config.sampling == dataclasses.replace(RUN.sampling, steps=2, sampler="heun")
    fields = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert fields["sampling"]["guidance_scale"] == 2.5
    assert fields["autoencoder"] == dataclasses.asdict(RUN.autoencoder)


def mistakes(tmp_path):
    """What may be wrong with weights: arguments of load_weights, and what the line must hold."""
    parameters = random_parameters(Network.create(RUN))

    def own(name, extra):
        save_pretrained(tmp_path / name, RUN.model, parameters, extra)
        return tmp_path / name

    flow = {"diffusion": {"process": "flow"}}
    return {
        "latents undecoded": ((OFFICIAL, {"heads": 4}), "draws latents of 4 channels: say what"),
        "another autoencoder": (
            (OFFICIAL, {"heads": 4, "autoencoder": str(AUTOENCODERS / "dc")}),
            "decodes latents of 8 channels, the network draws 4",
        ),
        "no process": ((own("silent", {}), {}), "has no section diffusion"),
        "another process": (
            (own("wrong", {"diffusion": {"process": "gaussian"}}), {}),
            "puts out 1 channels, its process gaussian wants 2",
        ),
        "unknown process": (
            (own("unknown", {"diffusion": {"process": "flaw"}}), {}),
            "process 'flaw': did you mean 'flow'",
        ),
        "unknown field": (
            (own("field", {"diffusion": {"proces": "flow"}}), {}),
            "beside .*field/model.safetensors': unknown config field 'diffusion.proces'",
        ),
        "a flow as SiT": ((own("flow", flow), {"sit": True}), "leave out --sit"),
        "sampler": ((own("sampler", flow), {"sampler": "ddpm"}), "is not for a RectifiedFlow"),
        "steps": ((tmp_path / "sampler", {"steps": 0}), "sampling.steps must be at least 1"),
        "missing": ((tmp_path / "missing.pt", {}), "does not exist"),
    }


def test_mistakes_in_weights_are_told(tmp_path):
    for name, ((path, options), message) in mistakes(tmp_path).items():
        with pytest.raises(UserError, match=message) as error:
            load_weights(path, **options).decode  # noqa: B018
        assert "\n" not in str(error.value), name
