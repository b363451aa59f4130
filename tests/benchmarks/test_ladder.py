"""The ladder's variants, budgets, resuming and tables."""

import json

import jax
import numpy as np
import pytest
from flax import nnx, traverse_util
from scipy import stats

from benchmarks import ladder, ladder_report
from benchmarks.ladder_variants import (
    ABLATIONS,
    ALL_VARIANTS,
    LADDER,
    TASKS,
    VARIANTS,
    Budget,
    make_config,
)
from dydilit_jax.diffusion.flow import RectifiedFlow
from dydilit_jax.models.attention.projections import Context
from dydilit_jax.models.attention.registry import ATTENTION_MODULES
from dydilit_jax.models.config import AttentionConfig, ModelConfig
from dydilit_jax.models.count import abstract_parameters
from dydilit_jax.training.state import Network

TINY = Budget(
    steps=4,
    points=2,
    draws=2,
    samples=16,
    depth=1,
    width=16,
    batch_size=8,
    warmup_steps=1,
)
FLAGS = [f"--{name}={value}" for name, value in vars(TINY).items()]


def shapes(variant: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the token mixer's parameters of one layer, by path."""
    model = make_config(TASKS["digits"], variant, 0, TINY, "").model
    tree = traverse_util.flatten_dict(abstract_parameters(model)["blocks"]["attention"], sep="/")
    return {path: leaf.shape[1:] for path, leaf in tree.items()}


# What each rung adds to or changes about the parameters of the one before; width 16.
RUNGS = [
    ("depthwise", {"depthwise/kernel": (5, 5, 16), "depthwise/bias": (16,)}),
    ("phi", {}),
    ("routed exponent", {"exponents/bank": (2, 9), "exponents/routers": (2, 16, 9)}),
    (
        "static differential",
        {
            "query_bank/kernel": (1, 16, 16),
            "key_bank/kernel": (1, 16, 16),
            "lambdas/bank": (1,),
            "exponents/bank": (4, 9),
            "exponents/routers": (4, 16, 9),
        },
    ),
    (
        "routed projectors",
        {
            "query_bank/kernel": (3, 16, 16),
            "key_bank/kernel": (3, 16, 16),
            "query_bank/router": (16, 3),
            "key_bank/router": (16, 3),
        },
    ),
    (
        "dydila",
        {"lambdas/bank": (9,), "lambdas/query_router": (32, 9), "lambdas/key_router": (32, 9)},
    ),
]


def test_each_rung_adds_the_parameters_of_its_idea():
    assert list(LADDER) == ["relu", *[name for name, _ in RUNGS]]
    below = shapes("relu")
    assert not any("depthwise" in path for path in below)
    for name, added in RUNGS:
        here = shapes(name)
        assert {path: shape for path, shape in here.items() if below.get(path) != shape} == added
        assert below.keys() <= here.keys()
        below = here


def test_the_top_rung_is_the_default_and_an_ablation_changes_the_fields_it_names():
    assert LADDER["dydila"] == AttentionConfig(heads=2)
    for name, attention in ABLATIONS.items():
        changed = [
            field
            for field, value in vars(attention).items()
            if value != getattr(LADDER["dydila"], field)
        ]
        assert len(changed) == len(name.split(", ")), name


def test_all_variants_differ_in_the_token_mixer_alone():
    first = make_config(TASKS["cifar10"], "relu", 3, TINY, "")
    for variant in VARIANTS:
        config = make_config(TASKS["cifar10"], variant, 3, TINY, "")
        fields = vars(config) | {"model": vars(config.model) | {"attention": None}}
        assert fields == vars(first) | {"model": vars(first.model) | {"attention": None}}


def test_the_rung_phi_is_focused_attention():
    x = jax.random.normal(jax.random.key(1), (2, 16, 16))
    outputs = []
    for attention in (LADDER["phi"], AttentionConfig(kind="focused", heads=2)):
        model = ModelConfig(image_size=8, patch_size=2, width=16, depth=1, attention=attention)
        mixer = ATTENTION_MODULES[attention.kind](model, rngs=nnx.Rngs(0))
        outputs.append(np.asarray(mixer(x, Context())[0]))
    np.testing.assert_array_equal(outputs[0], outputs[1])


def test_seconds_become_steps_by_the_cost_of_the_cheapest_rung():
    costs = {"relu": 0.02, "phi": 0.025, "dydila": 0.06, "normalizer none": 0.01}
    steps = {name: ladder.steps_in_seconds(costs, name, 300) for name in costs}
    assert steps == {"relu": 300, "phi": 240, "dydila": 100, "normalizer none": 300}


def test_the_loss_of_a_network_that_predicts_nothing_is_known():
    task = TASKS["digits"]
    train, held = ladder.load_split(task, "")
    assert len(train) + len(held) == 1797
    network = Network.create(make_config(task, "relu", 0, TINY, ""))
    start = network.initial_parameters(jax.random.key(0))  # its last layer is zero
    losses = ladder.held_out_loss(network, held, 3)(start)
    assert len(set(losses)) == 3
    # The velocity n - x of unit noise n: 1 + the mean square of the pixels, known to a per cent.
    np.testing.assert_allclose(losses, 1.0 + np.mean(held.images**2), rtol=0.03)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs of relu with two seeds, its seconds being half of its steps."""
    out = tmp_path_factory.mktemp("ladder")
    # As if softmax, which is not run, cost half as much.
    costs = {"seconds": {"relu": 0.02, "softmax": 0.01}}
    ladder.cost_path(out, "digits").write_text(json.dumps(costs))
    ladder.main([*FLAGS, f"--out={out}", "--seeds", "0", "1", "--variants", "relu"])
    return out


def test_the_budget_of_seconds_ends_as_a_run_of_as_many_steps(folder, tmp_path):
    costs = {"seconds": {"relu": 1.0}}
    ladder.cost_path(tmp_path, "digits").write_text(json.dumps(costs))
    ladder.main([*FLAGS, "--steps=2", f"--out={tmp_path}", "--seeds", "0", "--variants", "relu"])
    long = json.loads((folder / "digits-relu-0.json").read_text())["ends"]
    short = json.loads((tmp_path / "digits-relu-0.json").read_text())["ends"]
    assert (long["seconds"]["step"], long["steps"]["step"]) == (2, 4)
    assert short["steps"]["step"] == short["seconds"]["step"] == 2
    np.testing.assert_allclose(long["seconds"]["loss"], short["steps"]["loss"], rtol=1e-5)
    assert long["steps"]["loss"] != long["seconds"]["loss"]
    drawn = [np.load(each / "digits-relu-0.npz") for each in (folder, tmp_path)]
    np.testing.assert_allclose(
        drawn[0]["seconds"].astype(int), drawn[1]["steps"].astype(int), atol=1
    )


def test_what_is_done_is_skipped_and_what_is_not_is_made_up(folder, monkeypatch, capsys):
    (folder / "digits-relu-1.json").unlink()
    made = []
    run_job = ladder.run_job

    def noted(job, *rest):
        made.append(job)
        return run_job(job, *rest)

    monkeypatch.setattr(ladder, "run_job", noted)
    flags = [*FLAGS, f"--out={folder}", "--seeds", "0", "1", "--variants", "relu"]
    ladder.main(flags)
    assert made == [ladder.Job(task="digits", variant="relu", seed=1)]
    assert "digits-relu-1" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"digits-relu-0.json was made with another learning_rate"):
        ladder.main([*flags, "--learning_rate=0.1"])


def test_every_run_has_files_of_its_own(tmp_path):
    jobs = [
        ladder.Job(task=task, variant=variant, seed=seed)
        for task in TASKS
        for variant in ALL_VARIANTS
        for seed in (0, 1)
    ]
    assert len({job.path(tmp_path, ".json") for job in jobs}) == len(jobs)
    path = ladder.Job(task="digits", variant="lambda 0.2", seed=7).path(tmp_path, ".json")
    assert path.name == "digits-lambda_0.2-7.json"


def test_without_costs_it_says_what_to_run(tmp_path):
    with pytest.raises(SystemExit, match="--measure_cost"):
        ladder.main([*FLAGS, f"--out={tmp_path}"])


def test_costs_are_measured_in_turn(tmp_path):
    flags = [*FLAGS, f"--out={tmp_path}", "--variants", "relu", "--cost_seconds=0"]
    ladder.main([*flags, "--measure_cost"])
    costs = ladder.read_costs(tmp_path, "digits")
    assert list(costs) == ["relu"]
    assert 0 < costs["relu"] < 60


def test_the_report_has_a_row_for_each_run(folder, tmp_path, capsys):
    ladder_report.main(
        [f"--out={folder}", f"--json={tmp_path / 'l.json'}", f"--plot={tmp_path / 'l.png'}"]
    )
    record = json.loads((tmp_path / "l.json").read_text())
    found = {(run["variant"], run["seed"], run["budget"]) for run in record["runs"]}
    assert found == {("relu", seed, budget) for seed in (0, 1) for budget in ("steps", "seconds")}
    losses = [
        json.loads((folder / f"digits-relu-{seed}.json").read_text())["ends"]["steps"]["loss"]
        for seed in (0, 1)
    ]
    assert f"| relu | 2 | 4 | 20 | {np.mean(losses):.4f} ± " in capsys.readouterr().out
    assert record["held_out_images"]["digits"]["agreement"] > 0.9
    assert (tmp_path / "l.png").stat().st_size > 10_000


def test_standard_errors_and_paired_differences():
    values = [0.3, 0.7, 0.4, 0.9]
    mean, error = ladder_report.mean_and_error(values)
    assert mean == pytest.approx(np.mean(values))
    assert error == pytest.approx(stats.sem(values))
    assert np.isnan(ladder_report.mean_and_error([1.0])[1])
    # A seed that only one of them has counts for neither.
    rows = {("a", 0): {"loss": 1.0}, ("a", 1): {"loss": 5.0}, ("a", 2): {"loss": 0.0}}
    rows |= {("b", 1): {"loss": 3.0}, ("b", 0): {"loss": 0.5}}
    assert ladder_report.paired(rows, "a", "b", "loss") == [0.5, 2.0]
    assert ladder_report.with_error([0.5, 2.0], 2, sign=True) == "+1.25 ± 0.75"


def test_losses_by_step_are_compared_at_the_steps_that_all_runs_have():
    curves = {
        ("depthwise", 0): {"10": 1.0, "15": 9.0, "20": 0.5},
        ("depthwise", 1): {"10": 3.0, "15": 9.0, "20": 0.7},
        ("dydila", 0): {"10": 2.0, "20": 0.4},
        ("dydila", 1): {"10": 7.0, "20": 0.4},
    }
    lines = ladder_report.curve_table(
        {key: {"curve": curve} for key, curve in curves.items()}, "depthwise"
    ).splitlines()
    assert lines[0] == "| variant | 10 steps | 20 steps |"
    assert lines[2] == "| depthwise, loss | 2.0000 ± 1.0000 | 0.6000 ± 0.1000 |"
    assert lines[3] == "| dydila | +2.5000 ± 1.5000 | -0.2000 ± 0.1000 |"


def test_scores_know_real_images_from_noise():
    scorer = ladder_report.Scorer("digits", "")
    _, held = ladder.load_split(TASKS["digits"], "")
    noise = np.asarray(jax.random.uniform(jax.random.key(0), held.images.shape, minval=-1))
    assert scorer.held["agreement"] > 0.95
    worse = scorer.score(noise, held.labels)
    assert worse["frechet"] > 10 * scorer.held["frechet"]
    assert worse["agreement"] < 0.3


def test_images_are_averaged_over_squares():
    images = np.arange(2 * 16 * 16 * 3, dtype=np.float32).reshape(2, 16, 16, 3)
    expected = images[:, 2:4, 4:6, 1].mean(axis=(1, 2))
    np.testing.assert_allclose(
        ladder_report.vectors(images).reshape(2, 8, 8, 3)[:, 1, 2, 1], expected
    )


def test_noise_and_times_are_those_of_the_flow():
    # oversmoothing.py mixes images and noise by itself: the process the ladder trains is this one.
    assert make_config(TASKS["digits"], "relu", 0, TINY, "").diffusion.flow == RectifiedFlow()
