"""Checkpoints: whole or not there, checked, thinned out."""

import errno
import json
import logging
from pathlib import Path

import pytest
import torch

from ddpm_pipe.run.checkpoint import Checkpoints
from ddpm_pipe.run.files import CheckpointError, replace_folder
from ddpm_pipe.run.folder import Run


def weights(value: float) -> dict:
    return {"unet": {"w": torch.full((3,), value)}, "ema": {"w": torch.full((3,), -value)}}


def save(checkpoints: Checkpoints, step: int) -> None:
    checkpoints.save(step, weights(step), {"optimizer": {"state": {0: {"step": torch.tensor(step)}}}})


def assert_loads(checkpoints: Checkpoints, step: int) -> None:
    loaded_step, loaded, state = checkpoints.load()
    assert loaded_step == step
    assert torch.equal(loaded["unet"]["w"], torch.full((3,), float(step)))
    assert torch.equal(loaded["ema"]["w"], torch.full((3,), -float(step)))
    assert state["optimizer"]["state"][0]["step"] == step


def test_the_newest_is_loaded_bit_for_bit(tmp_path):
    checkpoints = Checkpoints(Run(tmp_path))
    assert checkpoints.load() is None
    for step in (5, 20, 100):  # 100 is before 20 in the order of letters, but for the zeros
        save(checkpoints, step)
    assert_loads(checkpoints, 100)


def test_last_k_and_every_nth_are_kept(tmp_path):
    checkpoints = Checkpoints(Run(tmp_path), keep_last=2, keep_every=30)
    for step in range(10, 101, 10):
        save(checkpoints, step)
    assert checkpoints.steps() == [30, 60, 90, 100]


def test_what_somebody_kept_beside_them_is_no_checkpoint(tmp_path):
    checkpoints = Checkpoints(Run(tmp_path))
    save(checkpoints, 1)
    checkpoints.run.checkpoint(1).with_name("step-00000009-copy").mkdir()
    assert checkpoints.steps() == [1]
    assert_loads(checkpoints, 1)


@pytest.mark.parametrize("damage", ["truncate", "flip", "missing", "no manifest", "empty folder"])
def test_an_unreadable_newest_is_reported_and_the_one_before_taken(tmp_path, damage, caplog):
    checkpoints = Checkpoints(Run(tmp_path))
    save(checkpoints, 1)
    save(checkpoints, 2)
    file = checkpoints.run.checkpoint(2) / "unet.safetensors"
    content = file.read_bytes()
    if damage == "truncate":
        file.write_bytes(content[:-4])
    elif damage == "flip":
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "missing":
        file.unlink()
    elif damage == "no manifest":
        (checkpoints.run.checkpoint(2) / "manifest.json").unlink()
    else:
        for path in checkpoints.run.checkpoint(2).iterdir():
            path.unlink()
    with caplog.at_level(logging.WARNING):
        assert_loads(checkpoints, 1)
    assert "step-00000002" in caplog.text


def test_it_is_an_error_when_none_can_be_read(tmp_path):
    checkpoints = Checkpoints(Run(tmp_path))
    save(checkpoints, 1)
    (checkpoints.run.checkpoint(1) / "state.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints"):
        checkpoints.load()


def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path, monkeypatch):
    checkpoints = Checkpoints(Run(tmp_path))
    save(checkpoints, 1)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(CheckpointError, match=r"step-00000002 could not be written.*No space left.*intact"):
        save(checkpoints, 2)
    assert checkpoints.steps() == [1]
    assert_loads(checkpoints, 1)
    assert not list(checkpoints.run.checkpoints.glob(".*")), "nothing half-written is left"


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    target = tmp_path / "pipeline"
    replace_folder(target, lambda folder: (folder / "a").write_text("1"))

    def fail(folder):
        (folder / "b").write_text("half")
        raise OSError("broken")

    with pytest.raises(CheckpointError, match="broken"):
        replace_folder(target, fail)
    assert [path.name for path in target.iterdir()] == ["a"]
    replace_folder(target, lambda folder: (folder / "c").write_text("2"))
    assert [path.name for path in target.iterdir()] == ["c"]


def write_value(value: str):
    return lambda folder: (folder / "value").write_text(value)


def fail_after_a_file(folder):
    (folder / "value").write_text("half")
    raise OSError("broken")


@pytest.fixture
def cut_short(tmp_path, monkeypatch):
    """A folder whose exchange was killed between its two renames: the last version and the next lie beside it."""
    target, rename = tmp_path / "pipeline", Path.rename

    def killed(path, to):
        if path.suffix == ".new":
            raise KeyboardInterrupt
        return rename(path, to)

    replace_folder(target, write_value("1"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", killed)
        replace_folder(target, write_value("2"))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".pipeline.new", ".pipeline.old"]
    return target


def assert_holds(target: Path, value: str) -> None:
    assert (target / "value").read_text() == value
    assert list(target.parent.iterdir()) == [target], "nothing is left beside it"


def test_an_exchange_that_was_cut_short_loses_nothing_when_the_next_write_fails(cut_short):
    with pytest.raises(CheckpointError, match="broken"):
        replace_folder(cut_short, fail_after_a_file)
    assert_holds(cut_short, "1")


def test_an_exchange_that_was_cut_short_is_ended_by_the_next_write(cut_short):
    replace_folder(cut_short, write_value("3"))
    assert_holds(cut_short, "3")


def test_a_failing_exchange_leaves_the_folder_as_it_was(tmp_path, monkeypatch):
    target, rename = tmp_path / "pipeline", Path.rename

    def fail(path, to):
        if path.suffix == ".new":
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, to)

    replace_folder(target, write_value("1"))
    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(CheckpointError, match=r"pipeline could not be written .*Input/output error.*intact"):
        replace_folder(target, write_value("2"))
    assert_holds(target, "1")


def test_a_version_that_was_half_deleted_is_never_put_back(tmp_path, monkeypatch):
    """Killed while it deletes the last version, and then the next one is moved away by hand."""
    target = tmp_path / "pipeline"
    replace_folder(target, write_value("1"))

    def killed(path, **_):
        for file in path.glob("*"):
            file.unlink()
        if path.exists():
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("shutil.rmtree", killed)
        replace_folder(target, write_value("2"))
    target.rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match="broken"):
        replace_folder(target, fail_after_a_file)
    assert [path.name for path in tmp_path.iterdir()] == ["moved"]


def test_what_a_killed_writer_left_is_ignored_and_cleaned(tmp_path):
    checkpoints = Checkpoints(Run(tmp_path))
    save(checkpoints, 1)
    half = checkpoints.run.checkpoints / ".step-00000002.new"
    half.mkdir()
    (half / "unet.safetensors").write_bytes(b"half")
    assert_loads(checkpoints, 1)
    save(checkpoints, 2)
    assert_loads(checkpoints, 2)
    assert not half.exists()


def test_the_manifest_describes_every_file(tmp_path):
    checkpoints = Checkpoints(Run(tmp_path))
    save(checkpoints, 3)
    manifest = json.loads((checkpoints.run.checkpoint(3) / "manifest.json").read_text())
    assert manifest["step"] == 3
    assert set(manifest["sha256"]) == {"unet.safetensors", "ema.safetensors", "state.pt"}
