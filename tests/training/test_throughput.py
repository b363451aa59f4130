"""Rates, shares of time, goodput, traces: against clocks and devices that say what they should."""

import json
import os
import signal
from typing import Any, NamedTuple

import jax
import pytest

from dydilit_jax.models.config import ModelConfig, size_fields
from dydilit_jax.models.count import multiply_adds
from dydilit_jax.training import throughput
from dydilit_jax.training.chips import peak_flops
from dydilit_jax.training.loop import train
from dydilit_jax.training.throughput import Clock, Goodput, Profiler, Throughput
from dydilit_jax.training.writers import read_metrics
from tests.tiny import plain_config


class Time:
    """A clock that the test turns."""

    def __init__(self):
        self.seconds = 1000.0

    def __call__(self):
        return self.seconds


class FakeDevice(NamedTuple):
    device_kind: str
    stats: dict[str, int] | None = None

    def memory_stats(self) -> dict[str, int] | None:
        return self.stats


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("TPU7x", 1153.5e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", None),
        ("TPU v4 lite", None),
        ("TPU v3", None),
        ("cpu", None),
    ],
)
def test_peaks(kind, peak):
    assert peak_flops(kind) == peak


def test_shares_of_time_add_up():
    now = Time()
    clock = Clock(now)
    for part, seconds in (("data", 1.0), ("dispatch", 2.0), ("data", 3.0)):
        with clock.measure(part):
            now.seconds += seconds
    now.seconds += 4.0
    assert clock.read() == (10.0, {"data": 4.0, "dispatch": 2.0, "other": 4.0})
    now.seconds += 1.0
    assert clock.read() == (1.0, {"other": 1.0})


def test_rates_and_utilisation_of_dit_xl_on_eight_chips(tmp_path, monkeypatch):
    now = Time()
    monkeypatch.setattr(throughput.time, "perf_counter", now)
    monkeypatch.setattr(Clock.__init__, "__defaults__", (now,))
    model = ModelConfig(**size_fields("XL", "softmax", "mlp"))
    macs = sum(multiply_adds(model, 8).values())
    assert macs == pytest.approx(118.6e9, rel=0.01)  # DiT's paper, table 4
    devices: list[Any] = [FakeDevice("TPU v5p")] * 8
    meter = Throughput(tmp_path, 0, batch_size=256, multiply_adds=macs, devices=devices)
    now.seconds += 60.0
    assert meter.report(1) == {}  # the compilation is no part of any rate
    meter.compiled(1)
    with meter.measure("data"):
        now.seconds += 1.0
    with meter.measure("device"):
        now.seconds += 4.0
    with meter.measure("checkpoint"):
        now.seconds += 5.0
    report = meter.report(11)
    assert report["throughput/images_per_second"] == pytest.approx(10 * 256 / 5.0)
    assert report["throughput/images_per_second_per_device"] == pytest.approx(64.0)
    assert report["throughput/mfu"] == pytest.approx(6 * 118.6e9 * 64.0 / 459e12, rel=0.01)
    assert report["time/data"] == pytest.approx(0.1)
    assert report["time/checkpoint"] == pytest.approx(0.5)
    assert report["time/other"] == pytest.approx(0.0)


def test_memory_is_the_fullest_devices():
    devices = [
        FakeDevice("a", {"bytes_in_use": 2**30, "peak_bytes_in_use": 3 * 2**30}),
        FakeDevice("a", {"bytes_in_use": 2 * 2**30, "peak_bytes_in_use": 2 * 2**30}),
    ]
    expected = {"memory/in_use_gib": 2.0, "memory/peak_gib": 3.0}
    assert throughput.memory_in_use(devices) == expected
    assert throughput.memory_in_use([FakeDevice("cpu")]) == {}


def test_goodput_forgets_steps_that_a_restart_repeats(tmp_path):
    now = Time()
    first = Goodput(tmp_path, 0, writes=True, now=now)
    now.seconds += 10.0
    assert first.add(10, 8.0) == pytest.approx(0.8)
    now.seconds += 10.0
    assert first.add(20, 10.0) == pytest.approx(0.9)
    # It dies; the checkpoint is of step 12, and half a minute passes.
    now.seconds += 30.0
    second = Goodput(tmp_path, 12, writes=True, now=now)
    now.seconds += 10.0
    assert second.add(20, 8.0) == pytest.approx(16.0 / 60.0)
    # A process that does not write changes nothing; a damaged file starts anew.
    before = (tmp_path / "goodput.json").read_text()
    Goodput(tmp_path, 20, writes=False, now=now).add(30, 1.0)
    assert (tmp_path / "goodput.json").read_text() == before
    (tmp_path / "goodput.json").write_text(before[:-5])
    now.seconds += 1.0
    third = Goodput(tmp_path, 20, writes=True, now=now)
    now.seconds += 2.0
    assert third.add(21, 1.0) == pytest.approx(0.5)


@pytest.fixture
def traces(monkeypatch):
    """What the profiler was asked to do."""
    calls: list[str] = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    return calls


def steps_of(profiler, calls, numbers, before=lambda step: None):
    for step in numbers:
        before(step)
        profiler.before_step(step)
        calls.append(str(step))
        profiler.after_step(step, None)


def test_a_trace_holds_the_steps_it_was_asked_for(tmp_path, traces):
    previous = signal.getsignal(signal.SIGUSR1)
    profiler = Profiler(tmp_path, 2, 2)
    steps_of(profiler, traces, range(1, 5))
    assert traces == ["1", "start", "2", "3", "stop", "4"]
    traces.clear()
    steps_of(
        profiler,
        traces,
        range(5, 9),
        lambda step: os.kill(os.getpid(), signal.SIGUSR1) if step == 6 else None,
    )
    assert traces == ["5", "start", "6", "7", "stop", "8"]
    os.kill(os.getpid(), signal.SIGUSR1)
    profiler.before_step(9)
    profiler.close()
    assert traces[-2:] == ["start", "stop"]
    assert signal.getsignal(signal.SIGUSR1) is previous


def test_a_run_logs_them_and_writes_a_trace(tmp_path):
    config = plain_config(train={"steps": 5, "profile_at": 2, "profile_steps": 1})
    train(config, tmp_path)
    records = read_metrics(tmp_path)
    assert "throughput/images_per_second" not in records[0]
    for record in records[1:]:
        shares = [value for name, value in record.items() if name.startswith("time/")]
        assert sum(shares) - record["time/goodput"] == pytest.approx(1.0, abs=1e-5)
        assert 0.0 < record["time/goodput"] <= 1.0
        rate = record["throughput/images_per_second"]
        assert rate == pytest.approx(8 * record["throughput/images_per_second_per_device"])
        assert "throughput/mfu" not in record  # a CPU's peak is not known
    assert list((tmp_path / "profiles").rglob("*.xplane.pb"))
    saved = json.loads((tmp_path / "goodput.json").read_text())
    assert [step for step, _ in saved["useful_seconds"]] == [0, 2, 3, 4, 5]
