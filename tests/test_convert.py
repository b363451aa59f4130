"""The command that brings weights in and out, from end to end."""

import json

import jax
import numpy as np
import pytest

from dydilit_jax.errors import UserError
from dydilit_jax.models.pretrained import read_pretrained
from dydilit_jax.models.pretrained.sit import from_sit
from dydilit_jax.training.checkpoint import open_workdir
from dydilit_jax.training.state import Network
from tests.commands import assert_one_line
from tests.models.test_pretrained import DIFFUSERS, OFFICIAL, assert_same_bits, output
from tests.tiny import random_parameters, save_run, tiny_config

CONVERT = "dydilit_jax.convert"
CONFIG = tiny_config(diffusion={"process": "gaussian"}, optimizer={"ema_decay": 0.9})


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """What a user may point at: a run of DyDi-LiT at step 3, one without a checkpoint, a file."""
    root = tmp_path_factory.mktemp("folders")
    open_workdir(root / "untrained", CONFIG)
    save_run(root / "run", CONFIG, step=3)
    (root / "full").mkdir()
    (root / "full" / "precious").write_text("mine")
    return root


def test_official_weights_become_a_folder_of_ours(command, tmp_path):
    out = tmp_path / "dit"
    code, output, errors = command(CONVERT, f"--source={OFFICIAL}", "--heads=4", f"--out={out}")
    assert (code, errors) == (0, "")
    assert output == (
        f"wrote {OFFICIAL} (layout dit) to {out}: softmax attention, depth 2, width 32, 4 heads, "
        "patches of 2, 8 x 8 x 4, 10 classes; layout own\n"
    )
    ours, theirs = read_pretrained(out), read_pretrained(OFFICIAL, heads=4)
    assert (ours.layout, ours.config, ours.out_channels) == ("own", theirs.config, 8)
    assert ours.extra == {"source": str(OFFICIAL)}
    assert_same_bits(ours.parameters, theirs.parameters)


def test_there_and_back_through_every_layout(command, tmp_path):
    source = DIFFUSERS
    for layout in ("dit", "own", "diffusers"):
        out = tmp_path / layout
        code, _, errors = command(CONVERT, f"--source={source}", f"--out={out}", "--layout", layout)
        assert code == 0
        # These weights were trained with the frequencies of diffusers.
        assert ("note: the official DiT embeds time" in errors) == (layout == "dit")
        source = out
    assert_same_bits(read_pretrained(source).parameters, read_pretrained(DIFFUSERS).parameters)
    theirs, ours = (json.loads((each / "config.json").read_text()) for each in (DIFFUSERS, source))
    shared = theirs.keys() & ours.keys()
    assert {"sample_size", "num_attention_heads", "num_layers", "norm_type"} <= shared
    assert {name: ours[name] for name in shared} == {name: theirs[name] for name in shared}


def test_the_frequencies_the_weights_were_trained_with(command, tmp_path):
    """An official file trained with diffusers' code; exported to diffusers, nothing is to do."""
    asked = [f"--source={OFFICIAL}", "--heads=4", "--layout=diffusers"]
    code, _, errors = command(CONVERT, *asked, f"--out={tmp_path}/a", "--time_frequency_shift=1")
    assert (code, errors) == (0, "")
    assert read_pretrained(tmp_path / "a").config.time_frequency_shift == 1
    code, _, errors = command(CONVERT, *asked, f"--out={tmp_path}/b")
    assert code == 0
    assert "set block.norm1.emb.time_proj.downscale_freq_shift = 0" in errors
    assert read_pretrained(tmp_path / "b").config.time_frequency_shift == 0


def test_a_sit_runs_its_time_the_other_way(command, tmp_path):
    """At 1 - t it predicts -v: the fixture's weights, taken for a SiT's, and what convert makes."""
    asked = [f"--source={OFFICIAL}", "--heads=4", "--sit", f"--out={tmp_path}/sit"]
    code, _, errors = command(CONVERT, *asked)
    assert (code, errors) == (0, "")
    sit, ours = read_pretrained(OFFICIAL, heads=4), read_pretrained(tmp_path / "sit")
    assert (ours.config, ours.out_channels) == (sit.config, 4)
    assert ours.extra["diffusion"] == {"process": "flow", "flow": {"time_scale": 1.0}}
    time = np.array([0.1, 0.5, 0.97], np.float32)
    theirs = output(sit.config, sit.parameters, time=1 - time)[..., :4]
    velocity = output(ours.config, ours.parameters, 4, time=time)
    np.testing.assert_allclose(velocity, -theirs, atol=1e-4)
    turned = output(ours.config, ours.parameters, 4, time=1 - time)
    assert np.abs(turned + theirs).max() > 1e-2
    with pytest.raises(UserError, match="is no SiT: it puts out 5 channels for 4"):
        from_sit(sit._replace(out_channels=5), "x.pt")


def test_a_runs_average_is_exported(command, folders, tmp_path):
    out = tmp_path / "exported"
    code, output, errors = command(CONVERT, f"--workdir={folders}/run", f"--out={out}")
    assert (code, errors) == (0, "")
    assert output.startswith(f"wrote the average of step 3 of {folders}/run to {out}: dydila")
    back = read_pretrained(out)
    assert (back.config, back.out_channels) == (CONFIG.model, 2)
    assert back.extra["step"] == 3
    assert back.extra["diffusion"]["process"] == "gaussian"
    expected = random_parameters(Network.create(CONFIG))
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7),
        back.parameters,
        expected,
    )


# Arguments, and what the one line must hold. W is the folder of folders, T the test's own.
MISTAKES = {
    "no out": (["--workdir=W/run"], ["--out is missing"]),
    "nothing to read": (["--out=T/a"], ["give either --source", "or --workdir"]),
    "two to read": (["--source=x", "--workdir=W/run", "--out=T/a"], ["give either --source"]),
    "heads of a run": (["--workdir=W/run", "--heads=2", "--out=T/a"], ["are for --source"]),
    "a run of SiT": (["--workdir=W/run", "--sit", "--out=T/a"], ["--sit are for --source"]),
    "frequencies of a run": (
        ["--workdir=W/run", "--time_frequency_shift=0", "--out=T/a"],
        ["are for --source"],
    ),
    "unknown layout": (
        ["--workdir=W/run", "--layout=difusers", "--out=T/a"],
        ["layout 'difusers': did you mean 'diffusers'? Known: own, dit, diffusers"],
    ),
    "not empty": (["--workdir=W/run", "--out=W/full"], ["is not empty", "--overwrite"]),
    "no source": (["--source=T/missing.pt", "--out=T/a"], ["missing.pt' does not exist"]),
    "no workdir": (["--workdir=T/missing", "--out=T/a"], ["is not a workdir"]),
    "untrained": (["--workdir=W/untrained", "--out=T/a"], ["has no checkpoint yet: train first"]),
    "no DiT": (
        ["--workdir=W/run", "--layout=diffusers", "--out=T/a"],
        ["holds a DiT alone", "attention.kind 'dydila'", "write it in the layout own"],
    ),
    "unknown width": ([f"--source={OFFICIAL}", "--out=T/a"], ["width 32", "give its --heads"]),
    "heads that do not fit": (
        [f"--source={OFFICIAL}", "--heads=5", "--out=T/a"],
        ["model.width 32 is not divisible by model.attention.heads 5"],
    ),
    "no frequencies": (
        [f"--source={DIFFUSERS}", "--time_frequency_shift=2", "--out=T/a"],
        ["model.time_frequency_shift must be 0 or 1, got 2"],
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(command, folders, tmp_path, mistake):
    arguments, parts = MISTAKES[mistake]
    arguments = [
        argument.replace("=W/", f"={folders}/").replace("=T/", f"={tmp_path}/")
        for argument in arguments
    ]
    code, output, errors = command(CONVERT, *arguments)
    assert_one_line(code, errors, *parts)
    assert output == ""
    assert list(tmp_path.iterdir()) == []
    assert [path.name for path in (folders / "full").iterdir()] == ["precious"]


def test_overwrite_replaces_the_weights_alone(command, tmp_path):
    (tmp_path / "precious").write_text("mine")
    code, _, errors = command(CONVERT, f"--source={DIFFUSERS}", f"--out={tmp_path}", "--overwrite")
    assert (code, errors) == (0, "")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"precious", "model.safetensors", "config.json"}
