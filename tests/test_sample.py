"""What the sampling command makes of its flags."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from dydilit_jax import sample
from dydilit_jax.config import Config, DiffusionConfig, SamplingConfig
from dydilit_jax.diffusion.samplers import DDIM, DDPM, SAMPLERS, Euler
from dydilit_jax.errors import UserError
from dydilit_jax.sample import output_format
from dydilit_jax.sampling_flags import parse_interval, parse_labels
from dydilit_jax.training import request
from dydilit_jax.training.generation import generate_images
from dydilit_jax.training.state import Network, configured_sampler
from dydilit_jax.training.trained import mesh_for
from tests.tiny import mesh_of, plain_config, random_parameters, save_run, tiny_config

FLOW, GAUSSIAN = DiffusionConfig(), DiffusionConfig(process="gaussian")


def test_each_process_has_its_own_sampler():
    assert isinstance(configured_sampler(SamplingConfig(), FLOW), Euler)
    assert isinstance(configured_sampler(SamplingConfig(), GAUSSIAN), DDPM)


def test_options_reach_the_sampler():
    config = SamplingConfig(
        sampler="ddim", options="eta=0.5, dynamic_threshold=99.5,spacing=ddim50"
    )
    sampler = configured_sampler(config, GAUSSIAN)
    assert isinstance(sampler, DDIM)
    assert (sampler.eta, sampler.dynamic_threshold, sampler.spacing) == (0.5, 99.5, "ddim50")


BAD_SAMPLERS = [
    (SamplingConfig(sampler="eular"), FLOW, "did you mean 'euler'"),
    (SamplingConfig(sampler="ddpm"), FLOW, "use euler, heun, euler_maruyama"),
    (SamplingConfig(sampler="heun"), GAUSSIAN, "use ddpm, ddim, dpm_solver_pp"),
    (SamplingConfig(sampler="ddim", steps=1001), GAUSSIAN, "1000"),
    (SamplingConfig(sampler="ddim", options="etta=1"), GAUSSIAN, "did you mean 'eta'"),
    (SamplingConfig(sampler="ddim", options="eta"), GAUSSIAN, "name=value"),
    (SamplingConfig(sampler="ddim", options="eta=high"), GAUSSIAN, "eta"),
    (SamplingConfig(options="dynamic_threshold=120"), FLOW, "percentile"),
]


@pytest.mark.parametrize(("sampling", "diffusion", "message"), BAD_SAMPLERS)
def test_wrong_samplers_are_told_before_anything_runs(sampling, diffusion, message):
    with pytest.raises(UserError, match=message) as error:
        configured_sampler(sampling, diffusion)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("interval", [(-0.1, 1.0), (0.0, 1.1), (0.7, 0.3)])
def test_an_interval_outside_zero_and_one_is_refused(interval):
    sampling = SamplingConfig(guidance_low=interval[0], guidance_high=interval[1])
    with pytest.raises(UserError, match="guidance interval must be"):
        Config(sampling=sampling)


def test_flags_are_parsed_or_refused(tmp_path):
    assert parse_interval("0.1,0.9") == (0.1, 0.9)
    for text in ("0.1", "a,b", "0,1,2"):
        with pytest.raises(UserError, match="expects two numbers"):
            parse_interval(text)
    np.testing.assert_array_equal(parse_labels("2,0", 3), [2, 0])
    np.testing.assert_array_equal(parse_labels("", 3), [0, 1, 2])
    with pytest.raises(UserError, match="outside the classes 0 to 2"):
        parse_labels("3", 3)
    assert output_format(tmp_path / "a.npz", None) == "npz"
    assert output_format(tmp_path / "a", "png") == "png"
    for out, form in (("a.png", "npz"), ("a.npz", "png"), ("a.png", "jpg"), ("no/a.png", None)):
        with pytest.raises(UserError):
            output_format(tmp_path / out, form)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_draws_the_same_image_in_any_batch_and_from_any_start(sampler):
    """Two devices against one, five images against the last two of them."""
    process = "flow" if sampler in ("euler", "heun", "euler_maruyama") else "gaussian"
    config = tiny_config()
    sampling = dataclasses.replace(
        config.sampling, sampler=sampler, steps=3, guidance_scale=2.0, guidance_high=0.8
    )
    config = dataclasses.replace(
        config,
        diffusion=dataclasses.replace(config.diffusion, process=process),
        sampling=sampling,
    )
    network = Network.create(config)
    parameters = random_parameters(network, seed=2)
    labels = np.asarray([3, 1, 4, 1, 5])

    def draw(mesh, batch_size, first):
        chosen = dataclasses.replace(sampling, batch_size=batch_size)
        images = generate_images(
            network, parameters, labels, seed=7, config=chosen, mesh=mesh, first=first
        )
        return np.concatenate(list(images))

    whole = draw(mesh_of(1, 1), 5, 0)
    assert whole.shape == (5, 8, 8, 1)
    assert np.all(np.isfinite(whole))
    assert np.abs(whole[1] - whole[3]).max() > 1e-3  # one label, two images
    tail = draw(mesh_of(2, 1), 2, 3)
    np.testing.assert_allclose(tail, whole[3:], rtol=1e-4, atol=1e-4 * np.abs(whole).max())


def test_a_file_and_a_folder_are_not_mistaken_for_each_other(tmp_path):
    with pytest.raises(UserError, match="is neither"):
        output_format(Path("a.jpg"), "png")
    (tmp_path / "a.npz").mkdir()
    with pytest.raises(UserError, match=r"a\.npz is a folder"):
        output_format(tmp_path / "a.npz", None)
    (tmp_path / "file").write_text("precious")
    with pytest.raises(UserError, match="file is a file"):
        output_format(tmp_path / "file", None)
    (tmp_path / "folder").mkdir()
    assert output_format(tmp_path / "folder", None) == "png"
    (tmp_path / "folder" / "000000.png").write_text("precious")
    with pytest.raises(UserError, match="folder is not empty: choose another"):
        output_format(tmp_path / "folder", None)
    # Of a request that was stopped while it wrote them.
    (tmp_path / "folder.parts").mkdir()
    assert output_format(tmp_path / "folder", None) == "png"


def test_a_request_stops_at_ctrl_c_and_goes_on(tmp_path, monkeypatch, capsys):
    """The second time the first part is read, not drawn: what lies there is what comes out."""
    save_run(tmp_path / "run", plain_config())
    flags.FLAGS.mark_as_parsed()

    def draw(name):
        out = str(tmp_path / name)
        with flagsaver.flagsaver(
            workdir=str(tmp_path / "run"), num=40, batch_size=16, steps=2, seed=3, out=out
        ):
            sample.main()

    draw("whole.npz")
    add = request.Parts.add

    def stop_at_the_second(parts, first, images):
        if first:
            raise KeyboardInterrupt
        add(parts, first, images)

    with monkeypatch.context() as patch:
        patch.setattr(request.Parts, "add", stop_at_the_second)
        with pytest.raises(SystemExit) as stopped:
            draw("parts.npz")
    assert stopped.value.code == 130
    assert "stopped at 16 of 40 images; run again to go on" in capsys.readouterr().out
    assert not (tmp_path / "parts.npz").exists()
    np.save(tmp_path / "parts.npz.parts" / "00000000.npy", np.full((16, 8, 8, 1), 99, np.uint8))
    draw("parts.npz")
    assert "16 of 40 images are there already" in capsys.readouterr().out
    with np.load(tmp_path / "parts.npz") as parts, np.load(tmp_path / "whole.npz") as whole:
        np.testing.assert_array_equal(whole["arr_1"], np.arange(40) % 10)
        np.testing.assert_array_equal(parts["arr_1"], whole["arr_1"])
        assert np.all(parts["arr_0"][:16] == 99)
        np.testing.assert_array_equal(parts["arr_0"][16:], whole["arr_0"][16:])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts.npz", "run", "whole.npz"]


def test_a_run_of_another_mesh_is_drawn_on_the_devices_there_are():
    config = tiny_config(mesh={"data": 4, "fsdp": 64})
    assert dict(mesh_for(config).shape) == {"data": 8, "fsdp": 1, "tensor": 1, "sequence": 1}
    config = tiny_config(mesh={"data": 2, "fsdp": 4})
    assert mesh_for(config).shape["fsdp"] == 4
