"""`train --dry_run`: a page whose every number is found in another way."""

import math
import re

import jax
import pytest

from dydilit_jax.config import Config
from dydilit_jax.models.pretrained import save_pretrained
from dydilit_jax.origins import field_origins
from dydilit_jax.training.checkpoint import open_workdir
from dydilit_jax.training.dry_run import describe
from dydilit_jax.training.state import Network
from tests.commands import assert_one_line
from tests.tiny import flatten_fields, plain_config, random_parameters, save_run, tiny_config

TRAIN = "dydilit_jax.train"
UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def sections(text):
    """Lines by section, whose heading is a line that is not indented."""
    found = {}
    for block in text.rstrip("\n").split("\n\n"):
        heading, *lines = block.split("\n")
        found[heading] = lines
    return found


def value(lines, name):
    """What a line of two columns says, after its name."""
    line = next(line for line in lines if re.match(rf" *{re.escape(name)}  ", line))
    return line.strip()[len(name) :].strip()


def close_to(text, expected):
    """Whether `1.23 MiB`, or `2.5 G`, is a number to the digits that it shows."""
    number, unit = text.replace(",", "").split()[:2]
    scale = UNITS.get(unit) or {"M": 1e6, "G": 1e9, "T": 1e12}[unit]
    return abs(float(number) * scale - expected) <= 0.00501 * scale


@pytest.fixture(scope="module")
def page(command, tmp_path_factory):
    """What the command prints for DyDi-LiT on a mesh of 4 x 2, over every kind of origin."""
    root = tmp_path_factory.mktemp("dry_run")
    code, output, errors = command(
        TRAIN,
        "--config=configs/digits.py:attention=dydila,size=S",
        "--config.train.steps=77",
        "--config.model.depth=2",
        "--config.mesh.fsdp=2",
        f"--workdir={root}/run",
        "--dry_run",
    )
    assert (code, errors) == (0, "")
    assert list(root.iterdir()) == []
    return output


def test_every_field_is_there_with_its_origin(page):
    lines = sections(page)["config: configs/digits.py:attention=dydila,size=S"]
    assert [line.split()[0] for line in lines[1:]] == list(flatten_fields(Config()))
    assert value(lines, "train.steps").split(maxsplit=1) == ["77", "flag (file's 1400)"]
    assert value(lines, "model.depth").split(maxsplit=1) == ["2", "flag (argument's 12)"]
    assert value(lines, "model.width").split(maxsplit=1) == ["384", "argument (file's 64)"]
    assert value(lines, "data.batch_size").split(maxsplit=1) == ["128", "file (256)"]
    assert value(lines, "optimizer.b2").split(maxsplit=1) == ["0.999", "default"]


def test_parameters_add_up_and_are_cut_as_they_say(page):
    lines = sections(page)["parameters"]
    group, total, local, rows = "", 0, 0, {}
    for line in lines[1:-2]:
        cells = re.split(r" {2,}", line.strip())
        if len(cells) == 1:
            group = cells[0]
            continue
        name, shape, count, part = cells
        sizes = [int(cut.split("/")[0]) for cut in shape.split()]
        halves = shape.count("/fsdp")
        assert int(count.replace(",", "")) == math.prod(sizes)
        assert close_to(part, math.prod(sizes) * 4 / 2**halves)
        total, local = total + math.prod(sizes), local + math.prod(sizes) * 4 // 2**halves
        rows[group + name] = shape
    assert lines[-2].split()[:2] == ["total", f"{total:,}"]
    assert close_to(" ".join(lines[-2].split()[2:]), local)
    assert rows["blocks/attention/query_bank/kernel"] == "2 3 384/fsdp 384"
    assert rows["blocks/attention/exponents/bank"] == "2 4 9"
    memory = sections(page)["memory on each device"]
    assert close_to(value(memory, "parameters"), local)
    assert close_to(value(memory, "average (EMA)"), local)
    assert close_to(value(memory, "optimizer"), 2 * local)
    # Four copies of the parameters, four counters and a key, on disk.
    written = next(lines for name, lines in sections(page).items() if name.startswith("written"))
    each = re.search(r"the newest 3 kept, (.*) each", "\n".join(written))
    assert each
    assert close_to(each[1], 4 * 4 * total)


def test_batch_mesh_and_data_are_told(page):
    found = sections(page)
    assert value(found["mesh"], "axes") == "data 4, fsdp 2, tensor 1, sequence 1"
    assert value(found["mesh"], "devices") == "8 of cpu (cpu)"
    assert value(found["batch"], "images in a step") == "128"
    assert value(found["batch"], "on each device") == "16"
    assert value(found["batch"], "accumulated over") == "1 parts, 16 at once"
    assert value(found["data"], "examples") == "1,797 of 10 classes"
    assert value(found["data"], "steps") == "77 of 128 images: 9,856 images"
    assert value(found["data"], "epochs") == f"{9856 / 1797:.2f}, {1797 / 128:.2f} steps each"
    assert value(found["data"], "first images") == "(128, 8, 8, 1) float32, -1 to 1"
    assert value(found["data"], "first labels") == "(128,) int32, 0 to 9"
    kernels = found["kernels, traced for cpu"]
    # 16 tokens are fewer than a head is wide, so Q K^T comes first.
    assert value(kernels, "attention core") == "reference"
    assert value(kernels, "routed projection") == "blocks"
    assert value(kernels, "depthwise convolution") == "shifted"


def test_multiply_adds_are_those_of_the_shapes(page):
    """N D^2 and the like by hand: width 384, 16 tokens, two blocks, routed projectors once."""
    n, d, h, hidden = 16, 384, 2, 960
    attention = 4 * n * d * d + 25 * n * d + 2 * n * d * (d // h) + n * d  # qkv, out, V, core
    attention += 4 * n * d * 9 + 2 * n * d * d + 2 * n * d * 3 + 2 * n * 2 * d * 9  # the dynamic
    feedforward = n * (3 * d * hidden + 9 * 2 * hidden)
    rest = n * 4 * d + (256 + d) * d + (2 * 6 + 2) * d * d + n * d * 4
    image = 2 * (attention + feedforward) + rest
    lines = sections(page)["computation"]
    assert close_to(value(lines, "multiply-adds of an image, forward"), image)
    assert close_to(value(lines, "of a step, forward and backward"), 3 * 128 * image)
    assert close_to(value(lines, "of the run"), 3 * 128 * 77 * image)


def test_the_page_fits_a_terminal(page):
    # The heading of `written` has the workdir, which may be of any length.
    long = [line for line in page.splitlines() if len(line) > 80 and not line.startswith("written")]
    assert [line for line in long if "run is made" not in line] == []


def test_nothing_is_allocated():
    before = {id(array) for array in jax.live_arrays()}
    config = tiny_config()
    told = describe(config, origins=field_origins(config, "configs/digits.py", {}))
    assert told.problems == []
    new = [array for array in jax.live_arrays() if id(array) not in before]
    assert sum(array.nbytes for array in new) < 1024
    assert sections(told.text)["start"] == ["  no --workdir is given"]


def test_a_run_that_would_go_on_is_told_from_a_new_one(tmp_path):
    config = plain_config()
    open_workdir(tmp_path / "untrained", config)
    told = describe(config, workdir=tmp_path / "untrained")
    assert sections(told.text)["start"] == [f"  afresh: {tmp_path}/untrained holds no checkpoint"]
    save_run(tmp_path / "run", config, step=3)
    told = describe(plain_config(train={"steps": 9}), workdir=tmp_path / "run")
    assert sections(told.text)["start"] == [
        f"  resumes {tmp_path}/run at step 3: 6 of 9 steps are left",
        "    train.steps: 4 -> 9 since",
    ]
    told = describe(plain_config(train={"steps": 3}), workdir=tmp_path / "run")
    assert sections(told.text)["start"][0] == f"  {tmp_path}/run is finished: 3 steps"
    told = describe(plain_config(seed=5), workdir=tmp_path / "run")
    assert sections(told.text)["start"] == ["  refused, see the error below"]
    (problem,) = told.problems
    assert "another config; differing fields: seed: 0 -> 5" in problem


def test_weights_that_a_run_takes_and_learns_from_are_told(tmp_path):
    config = plain_config(model={"attention": {"kind": "softmax"}})
    parameters = random_parameters(Network.create(config))
    save_pretrained(tmp_path / "dit", config.model, parameters)
    weights = str(tmp_path / "dit")
    student = plain_config(
        model={"attention": {"kind": "relu", "depthwise": 3}},
        inheritance={"checkpoint": weights},
        distillation={"teacher": weights},
        mesh={"fsdp": 2},
    )
    found = sections(describe(student).text)
    new = ["blocks/attention/depthwise/bias", "blocks/attention/depthwise/kernel"]
    taken = len(jax.tree.leaves(parameters))
    assert found["start"][1:] == [
        f"  step 0 inherits {taken} arrays of {weights}, 2 start anew:",
        *(f"    {path}" for path in new),
        f"  learns from {weights}",
    ]
    halves = {"kernel", "embedding"}  # what the axis fsdp cuts
    bytes_ = sum(
        leaf.nbytes // (2 if path[-1].key in halves else 1)
        for path, leaf in jax.tree_util.tree_flatten_with_path(parameters)[0]
    )
    assert close_to(value(found["memory on each device"], "teacher"), bytes_)
    assert value(found["computation"], "of the teacher, forward")


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--config.data.source=cifar10", "--config.data.data_dir=T"], ["'cifar10' is not in"]),
        (["--workdir=/dev/null/x"], ["cannot write workdir '/dev/null/x'", "is a file"]),
    ],
)
def test_a_run_that_would_not_start_is_told_in_full_and_refused(command, tmp_path, flags, parts):
    flags = [flag.replace("=T", f"={tmp_path}") for flag in flags]
    small = ["--config.model.depth=1", "--config.model.width=16"]
    code, output, errors = command(TRAIN, "--config=configs/digits.py", *small, *flags, "--dry_run")
    assert_one_line(code, errors, *parts)
    assert "see the error below" in output
    assert "memory on each device" in output
    assert list(tmp_path.iterdir()) == []


def test_the_compilers_account_is_asked_for(command):
    small = ["--config.model.depth=1", "--config.model.width=16", "--config.model.patch_size=4"]
    attention = "--config=configs/digits.py:attention=relu,feedforward=mlp"
    code, output, errors = command(TRAIN, attention, *small, "--dry_run", "--compile")
    assert (code, errors) == (0, "")
    lines = sections(output)["memory on each device"]
    planned = lines[lines.index("  compiled, as XLA plans it:") :]
    assert value(planned, "arguments").endswith("iB")
    assert value(planned, "temporary").endswith("iB")
