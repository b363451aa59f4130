import importlib
import json

import numpy as np

from dydilit_jax.training.writers import (
    METRICS_FILE,
    JsonLines,
    Writers,
    read_metrics,
    truncate_metrics,
)


def test_lines_are_read_back(tmp_path):
    lines = JsonLines(tmp_path)
    lines.write(1, {"loss": 0.5, "usage": np.array([[0.25, 0.75]])})
    lines.write(2, {"loss": float("nan")})
    assert read_metrics(tmp_path) == [
        {"step": 1, "loss": 0.5, "usage": [[0.25, 0.75]]},
        {"step": 2, "loss": None},
    ]
    # Valid JSON, which NaN is not.
    assert "NaN" not in (tmp_path / METRICS_FILE).read_text()


def test_steps_that_will_come_again_are_dropped(tmp_path):
    lines = JsonLines(tmp_path)
    for step in range(1, 6):
        lines.write(step, {"loss": step / 2})
    truncate_metrics(tmp_path, 3)
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3]
    truncate_metrics(tmp_path, 0)
    assert read_metrics(tmp_path) == []


def test_a_line_cut_short_spoils_no_other(tmp_path):
    lines = JsonLines(tmp_path)
    lines.write(1, {"loss": 1.0})
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"step": 2, "lo')
    assert [record["step"] for record in read_metrics(tmp_path)] == [1]
    truncate_metrics(tmp_path, 1)
    lines.write(2, {"loss": 2.0})
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]


def test_no_file_is_no_metrics(tmp_path):
    assert read_metrics(tmp_path) == []
    truncate_metrics(tmp_path, 3)
    assert not (tmp_path / METRICS_FILE).exists()


def test_tensorboard_gets_scalars_routers_and_pictures(tmp_path):
    writers = Writers(tmp_path)
    writers.scalars(3, {"loss": 0.5}, {"usage/query": np.array([[0.25, 0.75], [0.75, 0.25]])})
    writers.image(3, "samples", np.zeros((4, 5, 3), np.uint8))
    writers.close()
    import tensorflow as tf

    accumulators = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    events = accumulators.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["tensors"]) >= {"loss", "usage/query/0", "usage/query/1", "samples"}
    assert [event.step for event in events.Tensors("loss")] == [3]
    share = tf.make_ndarray(events.Tensors("usage/query/0")[0].tensor_proto)
    assert share == 0.5
    assert json.loads((tmp_path / METRICS_FILE).read_text())["usage/query"][0] == [0.25, 0.75]
