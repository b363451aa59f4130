"""Checkpoints that are damaged, unfinished, someone else's, or that the storage did not take."""

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest

from dydilit_jax.errors import UserError
from dydilit_jax.training import checkpoint as checkpoint_module
from dydilit_jax.training.checkpoint import Checkpointer, has_checkpoint, open_workdir
from dydilit_jax.training.lock import WorkdirLock
from dydilit_jax.training.loop import train
from dydilit_jax.training.state import Network, abstract_state
from dydilit_jax.training.writers import read_metrics
from tests.tiny import mesh_of, plain_config, random_state, state_arrays

CONFIG = plain_config(train={"steps": 2})
NETWORK = Network.create(CONFIG)


def at_step(step):
    state = random_state(NETWORK, mesh_of(1), seed=step)
    return jax.tree.map(lambda leaf: leaf, state.__class__(**{**vars(state), "step": step}))


def save(workdir, steps, **options):
    checkpointer = Checkpointer(workdir, **options)
    for step in steps:
        checkpointer.save(at_step(np.int32(step)), {"position": step})
    checkpointer.close()


@pytest.fixture(scope="module")
def abstract():
    return abstract_state(NETWORK, mesh_of(1))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A workdir with checkpoints 10, 20 and 30."""
    workdir = tmp_path_factory.mktemp("saved")
    open_workdir(workdir, CONFIG)
    save(workdir, (10, 20, 30))
    return workdir


@pytest.fixture
def workdir(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run")


def cut_short(path):
    os.truncate(path, path.stat().st_size - 1)


def emptied(path):
    os.truncate(path, 0)


def deleted(path):
    path.unlink()


def one_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def file_of(folder, item):
    """The largest file of an item; for `-` one beside all items."""
    below = folder if item == "-" else folder / item
    files = [p for p in (below.iterdir() if item == "-" else below.rglob("*")) if p.is_file()]
    files = [p for p in files if p.name != "manifest.json" and p.stat().st_size]
    return max(files, key=lambda path: (path.stat().st_size, path.name))


@pytest.mark.parametrize("how", [cut_short, emptied, deleted, one_bit])
@pytest.mark.parametrize("item", ["state", "ema", "data", "-"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    workdir, abstract, capsys, item, how
):
    path = file_of(workdir / "checkpoints" / "30", item)
    how(path)
    state, data = Checkpointer(workdir).restore(abstract)
    assert (int(state.step), data) == (20, {"position": 20})
    expected = state_arrays(at_step(np.int32(20)))
    for name, value in state_arrays(state).items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)
    (line,) = capsys.readouterr().err.splitlines()
    name = str(path.relative_to(workdir / "checkpoints" / "30"))
    assert "checkpoint 30 of" in line
    assert "damaged and skipped" in line
    assert name in line
    # A reader of the average alone does not mind what it does not read.
    step, ema = Checkpointer(workdir).restore_ema(abstract)
    assert step == (20 if item in ("ema", "-") else 30)
    reference = at_step(np.int32(step)).ema
    for one, other in zip(jax.tree.leaves(ema), jax.tree.leaves(reference), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("how", [cut_short, emptied, one_bit])
def test_a_damaged_record_makes_no_checkpoint(workdir, abstract, capsys, how):
    how(workdir / "checkpoints" / "30" / "manifest.json")
    state, _ = Checkpointer(workdir).restore(abstract)
    assert int(state.step) == 20
    assert "checkpoint 30 of" in capsys.readouterr().err


def test_several_damaged_ones_are_passed_over(workdir, abstract, capsys):
    cut_short(file_of(workdir / "checkpoints" / "30", "state"))
    deleted(file_of(workdir / "checkpoints" / "20", "ema"))
    state, _ = Checkpointer(workdir).restore(abstract)
    assert int(state.step) == 10
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_when_all_are_damaged_nothing_starts_over_unasked(workdir, abstract):
    for step in (10, 20, 30):
        cut_short(file_of(workdir / "checkpoints" / str(step), "state"))
    with pytest.raises(UserError, match=r"no checkpoint of .* is whole") as error:
        Checkpointer(workdir).restore(abstract)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"no checkpoint of .* is whole"):
        train(CONFIG, workdir)
    assert (workdir / "checkpoints" / "30").is_dir()


def test_an_unfinished_one_is_named_skipped_and_removed_by_the_next_run(workdir, abstract, capsys):
    folder = workdir / "checkpoints"
    (folder / "30" / "manifest.json").unlink()
    (folder / "40.orbax-checkpoint-tmp").mkdir()
    checkpointer = Checkpointer(workdir, keep=3)
    state, _ = checkpointer.restore(abstract)
    assert int(state.step) == 20
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    for line, step in zip(lines, (30, 40), strict=True):
        assert f"checkpoint {step} of {workdir} was not finished and is skipped" in line
    checkpointer.discard_unfinished()
    assert sorted(path.name for path in folder.iterdir()) == ["10", "20"]
    assert checkpointer.latest_step() == 20
    (folder / "10" / "manifest.json").unlink()
    (folder / "20" / "manifest.json").unlink()
    assert not has_checkpoint(workdir)
    assert Checkpointer(workdir).resume(abstract) is None


def test_a_damaged_one_is_replaced_when_its_step_comes_again(workdir, abstract):
    cut_short(file_of(workdir / "checkpoints" / "30", "state"))
    checkpointer = Checkpointer(workdir, keep=3)
    state, _ = checkpointer.restore(abstract)
    assert int(state.step) == 20
    checkpointer.save(at_step(np.int32(30)), {"position": 31})
    checkpointer.close()
    state, data = Checkpointer(workdir).restore(abstract)
    assert (int(state.step), data["position"]) == (30, 31)


def test_the_newest_and_every_nth_are_kept(tmp_path):
    open_workdir(tmp_path, CONFIG)
    save(tmp_path, range(10, 90, 10), keep=2, keep_every=30)
    names = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert names == [30, 60, 70, 80]


def test_the_newest_that_a_rollback_may_return_to_is_kept(tmp_path, abstract):
    open_workdir(tmp_path, CONFIG)
    checkpointer = Checkpointer(tmp_path, keep=1)
    for step, scheduled in ((10, True), (20, True), (25, False), (27, False)):
        checkpointer.save(at_step(np.int32(step)), {"position": step}, scheduled)
    checkpointer.close()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["20", "27"]
    assert int(Checkpointer(tmp_path).restore(abstract)[0].step) == 27
    restored = Checkpointer(tmp_path).resume(abstract, scheduled=True)
    assert restored is not None
    assert int(restored[0].step) == 20


def test_a_checkpoint_of_another_model_is_one_line(workdir):
    for changed, part in (
        ({"model": {"width": 32}}, r"is float32\[.*16.*\] there, float32\[.*32"),
        ({"model": {"depth": 2}}, r"\(\d+ more\)"),
        ({"optimizer": {"clip_norm": 1.0}}, "is missing there|absent in the config"),
    ):
        network = Network.create(plain_config(**changed))
        other = abstract_state(network, mesh_of(1))
        with pytest.raises(UserError, match=r"checkpoint 30 of .* by another model: ") as error:
            Checkpointer(workdir).restore(other)
        line = str(error.value)
        assert "\n" not in line
        assert re.search(part, line), line
    wide = abstract_state(Network.create(plain_config(model={"width": 32})), mesh_of(1))
    with pytest.raises(UserError, match="by another model: ema/"):
        Checkpointer(workdir).restore_ema(wide)


@pytest.fixture
def as_nobody():
    """Permission bits bind everyone but the superuser."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    yield
    os.seteuid(user)


def refused(call, *arguments):
    with pytest.raises(UserError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def forbidden(saved, tmp_path):
    """Workdirs that may not be written, be entered, or whose checkpoint may not be read."""
    names = ("locked", "closed", "unreadable", "hidden")
    locked, closed, unreadable, hidden = (tmp_path / name for name in names)
    for folder in (locked, unreadable, hidden):
        shutil.copytree(saved, folder)
        folder.chmod(0o755)
    closed.mkdir()
    for path in (tmp_path, *tmp_path.parents):
        if path == Path(tempfile.gettempdir()):
            break
        path.chmod(0o755)
    locked.chmod(0o777)
    (locked / "checkpoints").chmod(0o555)
    closed.chmod(0o555)
    file_of(unreadable / "checkpoints" / "30", "state").chmod(0o000)
    (hidden / "checkpoints").chmod(0o000)
    return locked, closed, unreadable, hidden


def test_a_folder_without_permission_is_one_line(forbidden, abstract, as_nobody):
    locked, closed, unreadable, hidden = forbidden
    line = refused(open_workdir, locked, CONFIG)
    assert f"cannot write workdir '{locked}': Permission denied in {locked / 'checkpoints'}" in line
    assert f"cannot write workdir '{closed}': Permission denied" in refused(WorkdirLock, closed)
    line = refused(Checkpointer(unreadable).restore, abstract)
    assert f"checkpoint 30 of '{unreadable}' cannot be read: no permission for" in line
    line = refused(Checkpointer(hidden).restore, abstract)
    assert f"checkpoints of '{hidden}' cannot be read: no permission for" in line


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one megabyte, and a function that fills what is left of it."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True
    ).returncode:
        pytest.skip("mounting needs the superuser")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(disk):
    with (disk / "filler").open("wb", buffering=0) as file:
        for size in (4096, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue


def test_a_full_disk_is_told_once_and_the_last_good_checkpoint_stays(small_disk, abstract, capsys):
    run = small_disk / "run"
    open_workdir(run, CONFIG)
    checkpointer = Checkpointer(run, keep=1)
    checkpointer.save(at_step(np.int32(10)), {"position": 10})
    checkpointer.wait()
    assert checkpointer.failed_step is None
    fill(small_disk)
    checkpointer.save(at_step(np.int32(20)), {"position": 20})
    checkpointer.wait()
    assert checkpointer.failed_step == 20
    (line,) = capsys.readouterr().err.splitlines()
    assert "checkpoint 20 could not be written, training goes on; checkpoint 10 is kept" in line
    assert "No space left" in line
    assert int(Checkpointer(run).restore(abstract)[0].step) == 10
    (small_disk / "filler").unlink()
    checkpointer.save(at_step(np.int32(30)), {"position": 30})
    checkpointer.close()
    assert checkpointer.failed_step is None
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["30"]
    assert int(Checkpointer(run).restore(abstract)[0].step) == 30


def test_training_goes_on_when_the_storage_fails_and_tries_again(tmp_path, monkeypatch, capsys):
    config = plain_config(
        train={"steps": 9, "checkpoint_every": 4, "log_every": 3, "keep_checkpoints": 9}
    )
    real, calls = checkpoint_module.write_manifest, []

    def failing(folder, arrays, **options):
        calls.append(int(folder.name))
        if len(calls) in (1, 2):
            raise OSError(28, "No space left on device")
        real(folder, arrays, **options)

    monkeypatch.setattr(checkpoint_module, "write_manifest", failing)
    state = train(config, tmp_path).state
    assert int(state.step) == 9
    errors = capsys.readouterr().err
    assert errors.count("could not be written") == 2
    assert "No space left on device" in errors
    # Failed at 4, tried again before 8, and at the end the last step is there.
    assert calls[0] == 4
    assert calls[1] in (5, 6, 7, 8)
    kept = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert kept[-1] == 9
    assert 4 not in kept
    assert [record["step"] for record in read_metrics(tmp_path)] == [3, 6, 9]


def test_a_last_checkpoint_that_cannot_be_written_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("dydilit_jax.training.loop.RETRY_SECONDS", 0.01)
    config = plain_config(train={"steps": 3, "checkpoint_every": 2})
    real = checkpoint_module.write_manifest

    def failing(folder, arrays, **options):
        if folder.name == "3":
            raise OSError(5, "Input/output error")
        real(folder, arrays, **options)

    monkeypatch.setattr(checkpoint_module, "write_manifest", failing)
    with pytest.raises(UserError, match=r"checkpoint of step 3 could not .* is that of step 2"):
        train(config, tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["2"]


def test_metrics_that_the_disk_does_not_take_end_nothing(tmp_path, monkeypatch, capsys):
    from dydilit_jax.training.writers import JsonLines

    real = JsonLines.write

    def failing(self, step, values):
        if step == 2:
            raise OSError(28, "No space left on device")
        real(self, step, values)

    monkeypatch.setattr(JsonLines, "write", failing)
    train(plain_config(train={"steps": 3}), tmp_path)
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 3]
    assert "metrics of step 2 could not be written, training goes on" in capsys.readouterr().err


def test_a_program_error_while_saving_is_not_taken_for_the_storages(tmp_path, monkeypatch):
    def broken(folder, arrays, **options):
        raise TypeError("a mistake of ours")

    monkeypatch.setattr(checkpoint_module, "write_manifest", broken)
    with pytest.raises(TypeError, match="a mistake of ours"):
        train(plain_config(train={"steps": 2}), tmp_path)
