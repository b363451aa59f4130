"""Files of weights that are damaged, or of another network: told in one line, all of it by name."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dydilit_jax.errors import UserError
from dydilit_jax.models.pretrained import read_pretrained, save_pretrained
from dydilit_jax.models.pretrained.files import OWN_FILE, read_tensors
from tests.models.test_pretrained import DIFFUSERS, OFFICIAL, SMALL, random_tree, student

WEIGHTS = "diffusion_pytorch_model.safetensors"


def assert_refused(path, says, **options):
    with pytest.raises(UserError, match=says) as error:
        read_pretrained(path, **options)
    assert "\n" not in str(error.value)


# Safetensors and folders.


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_safetensors_file(tmp_path, share):
    data = (DIFFUSERS / WEIGHTS).read_bytes()
    path = tmp_path / WEIGHTS
    path.write_bytes(data[: int(share * len(data))])
    assert_refused(tmp_path, "is truncated, or no safetensors file .*fetch it again")


def test_safetensors_of_whole_numbers_are_no_weights(tmp_path):
    save_file({"w": np.arange(3)}, tmp_path / "w.safetensors")
    assert_refused(tmp_path / "w.safetensors", "tensor w has dtype I64, expected one of F32, F16")


def test_half_precision_is_read(tmp_path):
    numbers = np.linspace(-2, 2, 8)
    kinds = (np.float16, ml_dtypes.bfloat16, np.float64)
    tensors = {str(i): numbers.astype(kind) for i, kind in enumerate(kinds)}
    save_file(tensors, tmp_path / "w.safetensors")
    for name, array in read_tensors(tmp_path / "w.safetensors").items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, tensors[name].astype(np.float32))


def test_nothing_there(tmp_path):
    assert_refused(tmp_path / "missing", "missing' does not exist")
    assert_refused(tmp_path, "holds no weights; expected one of model.safetensors")
    (tmp_path / f"{WEIGHTS}.index.json").write_text("{}")
    assert_refused(tmp_path, f"weights in several files: save them as one, {WEIGHTS}")


def test_a_pipelines_folder_has_its_network_in_transformer(tmp_path):
    shutil.copytree(DIFFUSERS, tmp_path / "transformer")
    assert read_pretrained(tmp_path).layout == "diffusers"


def test_a_folder_that_cannot_be_written(tmp_path):
    parameters = random_tree(SMALL)
    (tmp_path / "file").write_text("precious")
    with pytest.raises(UserError, match="is a file: weights are written to a folder"):
        save_pretrained(tmp_path / "file", SMALL, parameters)
    with pytest.raises(UserError, match=r"cannot write .*: Not a directory"):
        save_pretrained(tmp_path / "file" / "a", SMALL, parameters)
    with pytest.raises(UserError, match="is not empty: choose another, or --overwrite"):
        save_pretrained(tmp_path, SMALL, parameters)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "precious"


def test_overwriting_leaves_one_network_and_other_files(tmp_path):
    first, second = random_tree(SMALL, seed=1), random_tree(SMALL, seed=2)
    save_pretrained(tmp_path / "a", SMALL, first, layout="diffusers")
    (tmp_path / "a" / "README.md").write_text("mine")
    save_pretrained(tmp_path / "a", SMALL, second, overwrite=True)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["README.md", "config.json", OWN_FILE]
    back = read_pretrained(tmp_path / "a").parameters
    np.testing.assert_array_equal(
        back["final"]["linear"]["bias"], second["final"]["linear"]["bias"]
    )
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_weights_are_as_readable_as_their_config(tmp_path):
    save_pretrained(tmp_path / "a", SMALL, random_tree(SMALL))
    weights, config = (tmp_path / "a" / name for name in (OWN_FILE, "config.json"))
    assert weights.stat().st_mode == config.stat().st_mode


def test_what_is_not_to_be_written(tmp_path):
    parameters = random_tree(SMALL)
    with pytest.raises(UserError, match="unknown layout 'diffuser': did you mean 'diffusers'"):
        save_pretrained(tmp_path / "a", SMALL, parameters, layout="diffuser")
    config = student()
    for layout in ("diffusers", "dit"):
        says = rf"layout {layout} holds a DiT alone.*attention.kind 'dydila' \(not 'softmax'\)"
        with pytest.raises(UserError, match=says):
            save_pretrained(tmp_path / "a", config, random_tree(config), layout=layout)
    parameters["final"]["linear"]["bias"][1] = np.nan
    with pytest.raises(UserError, match=r"cannot be written: .* not finite, in final/linear/bias"):
        save_pretrained(tmp_path / "a", SMALL, parameters)
    assert not any(tmp_path.iterdir())


# Tensors that are not the network's. A change takes tensors and fields of config.json.


def changed(tmp_path, layout, change):
    """The fixture in a layout, with `change` made to its tensors and config; its path."""
    if layout == "dit":
        tensors, fields = read_tensors(OFFICIAL), {}
    elif layout == "diffusers":
        tensors = load_file(DIFFUSERS / WEIGHTS)
        fields = json.loads((DIFFUSERS / "config.json").read_text())
    else:
        save_pretrained(tmp_path / "own", SMALL, random_tree(SMALL))
        tensors = load_file(tmp_path / "own" / OWN_FILE)
        fields = json.loads((tmp_path / "own" / "config.json").read_text())
    change(tensors, fields)
    folder = tmp_path / "changed"
    folder.mkdir()
    name = WEIGHTS if layout == "diffusers" else OWN_FILE
    save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, folder / name)
    if fields:
        (folder / "config.json").write_text(json.dumps(fields))
    return folder


def setting(**fields):
    return lambda tensors, config: config.update(fields)


def without(name):
    return lambda tensors, config: (tensors.pop(name, None), config.pop(name, None))


def tensor(name, function):
    return lambda tensors, config: tensors.update({name: function(tensors.get(name))})


def several(tensors, config):
    """One missing, one too much, one of another shape, and eleven more too much."""
    del tensors["blocks.1.mlp.fc2.bias"]
    tensors["blocks.0.attn.qkv.bias"] = tensors["blocks.0.attn.qkv.bias"][:-1]
    tensors |= {f"extra.{i:02d}": np.zeros(1, np.float32) for i in range(12)}


def model_field(name, value):
    return lambda tensors, config: config["model"].update({name: value})


def nan_in(array):
    array = np.array(array)
    array.reshape(-1)[3] = np.nan
    return array


TABLE = "blocks.0.adaLN_modulation.1.weight"
MISFITS = {
    "missing, surplus, misshapen": (
        "dit",
        several,
        r"missing: blocks\.1\.mlp\.fc2\.bias; surplus: extra\.00, .*extra\.09 and 2 more; "
        r"misshapen: blocks\.0\.attn\.qkv\.bias \(95,\) \(expected \(96,\)\)",
    ),
    "surplus": (
        "dit",
        tensor("extra", lambda _: np.zeros(1, np.float32)),
        "does not hold the tensors of its network; surplus: extra$",
    ),
    "own surplus": (
        "own",
        tensor("blocks/extra", lambda _: np.zeros(1, np.float32)),
        "does not hold the tensors of its network; surplus: blocks/extra$",
    ),
    "own missing": ("own", without("final/linear/bias"), "missing: final/linear/bias$"),
    "a telling one missing": (
        "dit",
        without("t_embedder.mlp.2.bias"),
        r"does not hold the tensors of its network; missing: t_embedder\.mlp\.2\.bias$",
    ),
    "no position table": ("dit", without("pos_embed"), "missing: pos_embed$"),
    "another table": ("dit", tensor("pos_embed", lambda a: a[..., ::-1]), "is not the sine-cosine"),
    "table of no square": ("dit", tensor("pos_embed", lambda a: a[:, :15]), "with N a square"),
    "not finite": ("dit", tensor(TABLE, nan_in), f"not finite, in {TABLE}"),
    "axes": (
        "dit",
        tensor("x_embedder.proj.weight", lambda a: a.reshape(32, -1)),
        r"x_embedder.proj.weight has shape \(32, 16\), expected 4 axes",
    ),
    "pixels of a patch": (
        "dit",
        tensor("final_layer.linear.bias", lambda a: a[:31]),
        "expected a multiple of the 4 pixels of a patch",
    ),
    "own misshapen": (
        "own",
        tensor("final/linear/bias", lambda a: a[:4]),
        r"misshapen: final/linear/bias \(4,\) \(expected \(12,\)\)",
    ),
    "own of another size": (
        "own",
        model_field("depth", 2),
        "holds a network of depth 3, width 24, its config.json says depth 2, width 24",
    ),
    "own without config": ("own", lambda tensors, config: config.clear(), "needs the config.json"),
    "own without model": ("own", without("model"), "has no section model"),
    "own model no section": ("own", setting(model=5), "model must be a section of fields, got 5"),
    "own outputs": ("own", setting(out_channels="6"), "out_channels .* expects int, got '6'"),
    "own unknown field": ("own", model_field("widht", 3), "'widht': did you mean 'width'"),
    "own wrong type": ("own", model_field("width", "24"), "model.width expects int, got '24'"),
    "no DiT": (
        "own",
        lambda tensors, config: (tensors.clear(), tensors.update(w=np.ones(2, np.float32))),
        "holds no DiT: none of its 1 tensors has a name of the layouts own, dit, diffusers",
    ),
    "no config": ("diffusers", lambda tensors, config: config.clear(), "needs diffusers' config"),
    "no heads in it": ("diffusers", without("num_attention_heads"), "needs diffusers' config.json"),
    "no number": ("diffusers", setting(sample_size="8"), "sample_size .* expects int, got '8'"),
    "another activation": (
        "diffusers",
        setting(activation_fn="geglu"),
        "has activation_fn 'geglu', a DiT has 'gelu-approximate'",
    ),
    "another size": (
        "diffusers",
        setting(num_layers=28, attention_head_dim=72),
        "holds a network of depth 2, width 32, its config.json says depth 28, width 288",
    ),
    "another number of classes": (
        "diffusers",
        setting(num_embeds_ada_norm=1000),
        "width 32, classes 10, its config.json says depth 2, width 32, classes 1000",
    ),
    "an embedding for each block": (
        "diffusers",
        tensor(
            "transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.bias", lambda a: a + 1e-3
        ),
        "has one embedding of time and label for all blocks",
    ),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_tensors_that_are_not_the_networks(tmp_path, misfit):
    layout, change, says = MISFITS[misfit]
    heads = 4 if layout == "dit" else None
    assert_refused(changed(tmp_path, layout, change), says, heads=heads)


def test_unchanged_fixtures_are_read(tmp_path):
    for layout in ("dit", "diffusers", "own"):
        folder = changed(tmp_path, layout, lambda tensors, config: None)
        assert read_pretrained(folder, heads=4 if layout == "dit" else None).layout == layout
        shutil.rmtree(folder)


def test_heads_that_nothing_tells_are_asked_for():
    assert_refused(OFFICIAL, "has width 32, of none of DiT's sizes: give its --heads")


@pytest.mark.parametrize(
    ("text", "says"), [("{", "is not valid JSON"), ("[]", "must hold a JSON object, got list")]
)
def test_a_config_that_is_none(tmp_path, text, says):
    shutil.copytree(DIFFUSERS, tmp_path / "a")
    (tmp_path / "a" / "config.json").write_text(text)
    assert_refused(tmp_path / "a", says)
