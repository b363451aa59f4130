"""Weights that a run starts from, and a teacher that it learns from."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dydilit_jax.config import DistillationConfig, InheritanceConfig
from dydilit_jax.data.load import load_data
from dydilit_jax.errors import UserError
from dydilit_jax.models.config import AttentionConfig, FeedForwardConfig
from dydilit_jax.models.pretrained import save_pretrained
from dydilit_jax.training.inheritance import inherited_state, load_teacher
from dydilit_jax.training.loop import to_mesh, train
from dydilit_jax.training.state import Network, create_state
from dydilit_jax.training.step import compile_step, training_loss
from tests.tiny import mesh_of, random_parameters, tiny_config


def dit_config(process: str = "flow"):
    config = tiny_config()
    attention = AttentionConfig(kind="softmax", heads=2, depthwise=0)
    model = dataclasses.replace(
        config.model, attention=attention, feedforward=FeedForwardConfig(kind="mlp")
    )
    diffusion = dataclasses.replace(config.diffusion, process=process)
    return dataclasses.replace(config, model=model, diffusion=diffusion)


@pytest.fixture(scope="module")
def dit(tmp_path_factory):
    """A DiT with random weights on disk: folder, config, parameters."""
    config = dit_config()
    parameters = random_parameters(Network.create(config), seed=3)
    folder = tmp_path_factory.mktemp("dit") / "weights"
    save_pretrained(folder, config.model, parameters, {})
    return folder, config, parameters


def student_config(**sections):
    config = tiny_config()
    model = dataclasses.replace(config.model, feedforward=FeedForwardConfig(kind="mlp"))
    return dataclasses.replace(config, model=model, **sections)


def test_a_run_starts_from_the_weights_it_inherits(dit):
    folder, _, parameters = dit
    network = Network.create(student_config())
    fresh = create_state(network, mesh_of(1, 1))
    state = inherited_state(network, fresh, str(folder))
    attention = state.parameters["blocks"]["attention"]
    np.testing.assert_array_equal(
        attention["qkv"]["kernel"], parameters["blocks"]["attention"]["qkv"]["kernel"]
    )
    np.testing.assert_array_equal(
        state.parameters["blocks"]["feedforward"]["hidden"]["kernel"],
        parameters["blocks"]["feedforward"]["hidden"]["kernel"],
    )
    np.testing.assert_array_equal(
        state.parameters["final"]["linear"]["kernel"], parameters["final"]["linear"]["kernel"]
    )
    for part in ("query_bank", "lambdas", "exponents", "depthwise"):
        jax.tree.map(
            np.testing.assert_array_equal,
            attention[part],
            fresh.parameters["blocks"]["attention"][part],
        )


def test_a_dit_that_inherits_its_own_weights_has_its_loss(dit, tmp_path, capsys):
    """Through the run's own path: config, state, first logged loss."""
    folder, config, parameters = dit
    config = dataclasses.replace(config, inheritance=InheritanceConfig(checkpoint=str(folder)))
    train(config, tmp_path / "run", stop_step=1)
    assert "inherited" in capsys.readouterr().out
    network = Network.create(config)
    _, batches = load_data(config)
    batch = {name: jnp.asarray(value) for name, value in next(batches).items()}
    state = create_state(network, mesh_of(1, 1))
    key = jax.random.fold_in(state.key, 0)
    expected, _ = training_loss(network, parameters, batch, key)
    logged = (tmp_path / "run" / "metrics.jsonl").read_text()
    np.testing.assert_allclose(
        float(logged.split('"loss": ')[1].split(",")[0]), expected, rtol=1e-5
    )


def test_distillation_adds_the_weighted_differences_to_the_teacher(dit):
    folder, dit_run, teacher_parameters = dit
    distillation = DistillationConfig(teacher=str(folder), prediction_weight=0.7)
    config = student_config(distillation=distillation)
    network, mesh = Network.create(config), mesh_of(1, 1)
    teacher = load_teacher(network, mesh)
    assert teacher is not None
    parameters = random_parameters(network, seed=5)
    _, batches = load_data(config)
    batch = jax.tree.map(jnp.asarray, next(batches))
    key = jax.random.key(9)
    plain, _ = training_loss(network, parameters, batch, key)
    total, metrics = training_loss(network, parameters, batch, key, teacher, teacher.parameters)

    # By hand: both networks on the x_t that the process made of this key.
    seen = {}

    def record(x, time):
        seen["x"], seen["time"] = x, time
        return jnp.zeros_like(x)

    label_key, process_key, router_key = jax.random.split(key, 3)
    network.process.loss(record, batch["image"], process_key)
    from dydilit_jax.training.step import drop_labels

    labels = drop_labels(batch["label"], label_key, config.model.label_dropout, 10)
    theirs = Network.create(dit_run).module(teacher_parameters)(seen["x"], seen["time"], labels)[0]
    ours = network.module(parameters)(seen["x"], seen["time"], labels, key=router_key)[0]
    difference = np.mean((np.asarray(ours, np.float64) - np.asarray(theirs, np.float64)) ** 2)
    np.testing.assert_allclose(metrics["distilled_prediction"], difference, rtol=1e-4)
    np.testing.assert_allclose(total - plain, 0.7 * difference, rtol=1e-3)


def test_a_student_learns_from_its_teacher_and_the_teacher_stays(dit):
    folder, _, _ = dit
    config = student_config(
        distillation=DistillationConfig(teacher=str(folder), prediction_weight=10.0)
    )
    network, mesh = Network.create(config), mesh_of(2, 4)
    teacher = load_teacher(network, mesh)
    assert teacher is not None
    before = jax.tree.map(np.array, teacher.parameters)
    state = create_state(network, mesh)
    step = compile_step(network, mesh, teacher)
    _, batches = load_data(config)
    batch = to_mesh(next(batches), mesh)
    for _ in range(3):
        state, metrics = step(state, batch)
        assert np.isfinite(float(metrics["distilled_prediction"]))
    jax.tree.map(np.testing.assert_array_equal, before, teacher.parameters)


def test_variance_has_its_own_term(tmp_path):
    config = dit_config("gaussian")
    network = Network.create(config)
    parameters = random_parameters(network, seed=1)
    save_pretrained(tmp_path / "weights", config.model, parameters, {})
    student = dataclasses.replace(
        student_config(distillation=DistillationConfig(teacher=str(tmp_path / "weights"))),
        diffusion=config.diffusion,
    )
    network = Network.create(student)
    teacher = load_teacher(network, mesh_of(1, 1))
    assert teacher is not None
    x = jax.random.normal(jax.random.key(0), (3, 8, 8, 1))
    output = jax.random.normal(jax.random.key(1), (3, 8, 8, 2))
    time, labels = jnp.asarray([1.0, 5.0, 9.0]), jnp.asarray([0, 1, 2])
    terms = teacher.terms(teacher.parameters, output, x, time, labels)
    wanted = Network.create(config).module(parameters)(x, time, labels)[0]
    squares = (np.asarray(output) - np.asarray(wanted)) ** 2
    np.testing.assert_allclose(
        terms["distilled_prediction"], squares[..., :1].mean((1, 2, 3)), rtol=1e-5
    )
    np.testing.assert_allclose(
        terms["distilled_variance"], squares[..., 1:].mean((1, 2, 3)), rtol=1e-5
    )
    expected = 0.5 * terms["distilled_prediction"] + 0.05 * terms["distilled_variance"]
    np.testing.assert_allclose(teacher.loss(terms), expected, rtol=1e-6)


def test_a_teacher_of_another_process_or_shape_is_refused(dit):
    folder, _, _ = dit
    distillation = DistillationConfig(teacher=str(folder))
    config = student_config(distillation=distillation)
    gaussian = dataclasses.replace(
        config, diffusion=dataclasses.replace(config.diffusion, process="gaussian")
    )
    with pytest.raises(UserError, match="it was trained for another process"):
        load_teacher(Network.create(gaussian), mesh_of(1, 1))
    classes = dataclasses.replace(config, model=dataclasses.replace(config.model, num_classes=7))
    with pytest.raises(UserError, match="num_classes 10, the student 7"):
        load_teacher(Network.create(classes), mesh_of(1, 1))
    deeper = dataclasses.replace(config, model=dataclasses.replace(config.model, depth=3))
    network = Network.create(deeper)
    with pytest.raises(UserError, match="depth 2"):
        inherited_state(network, create_state(network, mesh_of(1, 1)), str(folder))


def test_weights_that_know_time_on_another_scale_are_refused(dit, tmp_path):
    """As a SiT's, whose times end at 1."""
    _, config, parameters = dit
    flow = {"process": "flow", "flow": {"time_scale": 1.0}}
    save_pretrained(tmp_path / "sit", config.model, parameters, {"diffusion": flow})
    student = student_config(distillation=DistillationConfig(teacher=str(tmp_path / "sit")))
    network, mesh = Network.create(student), mesh_of(1, 1)
    says = r"time_scale 1\.0, this run has 1000\.0: set it to the same"
    with pytest.raises(UserError, match=says):
        load_teacher(network, mesh)
    with pytest.raises(UserError, match=says):
        inherited_state(network, create_state(network, mesh), str(tmp_path / "sit"))
    process = dataclasses.replace(student.diffusion.flow, time_scale=1.0)
    diffusion = dataclasses.replace(student.diffusion, flow=process)
    network = Network.create(dataclasses.replace(student, diffusion=diffusion))
    assert load_teacher(network, mesh) is not None
