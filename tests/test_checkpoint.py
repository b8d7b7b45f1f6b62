"""A checkpoint is there whole or not at all, and what is damaged is never loaded."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from hvdlm import checkpoint
from hvdlm.interfaces import HvdlmError, RankError
from hvdlm_backends.local import LocalWorld

STATE = {
    "parameters/w": np.arange(6, dtype=np.float32).reshape(2, 3),
    "optimizer/momentum/w": np.ones((2, 3), np.float32),
    "carry/0.0": np.arange(8, dtype=np.float32).reshape(4, 2),
}


class OneOfTwo(LocalWorld):
    """Rank ``rank`` of two, whose other rank says the same, with its own files."""

    size = 2

    def __init__(self, rank: int, other: dict | None = None) -> None:
        self.rank, self._other = rank, other  # type: ignore[misc]

    def gather_objects(self, value):  # type: ignore[no-untyped-def]
        """Return both ranks' values."""
        other = self._other if isinstance(value, dict) and self._other else value
        return [value, other] if self.rank == 0 else [other, value]


def save(folder: Path, step: int = 5) -> Path:
    return checkpoint.save(folder, step, STATE, {"tokenizer": "t"}, LocalWorld())


def test_what_is_saved_is_loaded_bit_for_bit(tmp_path: Path) -> None:
    found = checkpoint.open_checkpoint(save(tmp_path))
    loaded = checkpoint.load(found, 0, 1)
    assert found.step == 5 and found.manifest["tokenizer"] == "t" and loaded.keys() == STATE.keys()
    for name, array in STATE.items():
        np.testing.assert_array_equal(loaded[name], array)
    assert not list(tmp_path.glob(".*"))


def test_carried_state_is_dealt_out_anew_on_another_number_of_ranks(tmp_path: Path) -> None:
    found = checkpoint.open_checkpoint(save(tmp_path))
    parts = [checkpoint.load(found, rank, 2)["carry/0.0"] for rank in range(2)]
    np.testing.assert_array_equal(np.concatenate(parts), STATE["carry/0.0"])


def test_auto_takes_the_newest_whole_one(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    assert checkpoint.find(tmp_path, "auto") is None
    save(folder, 10)
    save(folder, 20)
    (folder / "step-00000030").mkdir()  # without a manifest: a rank was killed
    (folder / ".step-00000040.partial").mkdir()
    assert checkpoint.find(tmp_path, "auto").step == 20  # type: ignore[union-attr]
    assert checkpoint.find(tmp_path, str(folder / "step-00000010")).step == 10  # type: ignore[union-attr]
    assert checkpoint.find(tmp_path / "elsewhere", str(tmp_path)).step == 20  # type: ignore[union-attr]


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    checkpoint.prune(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000003", "step-00000004"]


def test_saving_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path)
    checkpoint.save(tmp_path, 5, {"parameters/w": np.zeros(1, np.float32)}, {}, LocalWorld())
    loaded = checkpoint.load(checkpoint.open_checkpoint(tmp_path / "step-00000005"), 0, 1)
    assert list(loaded) == ["parameters/w"] and loaded["parameters/w"].tolist() == [0]


def test_a_flipped_bit_is_noticed_before_anything_is_loaded(tmp_path: Path) -> None:
    path = save(tmp_path)
    data = bytearray((path / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "model.safetensors").write_bytes(data)
    with pytest.raises(HvdlmError, match=r"model\.safetensors has another SHA-256"):
        checkpoint.load(checkpoint.open_checkpoint(path), 0, 1)


@pytest.mark.parametrize("content", ["{", "[]", '{"format": "other"}', '{"format": "hvdlm-checkpoint-1"}', "\x00"])
def test_a_damaged_manifest_is_refused_with_its_path(tmp_path: Path, content: str) -> None:
    path = save(tmp_path)
    (path / "manifest.json").write_text(content)
    with pytest.raises(HvdlmError, match=f"checkpoint {path} is damaged or foreign"):
        checkpoint.open_checkpoint(path)


@pytest.mark.parametrize("failing", ["model.safetensors", "manifest.json"])
def test_a_full_disk_leaves_the_earlier_checkpoint(
    tmp_path: Path, failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = save(tmp_path, 5)
    real = checkpoint._write_synced

    def full(path: Path, data: bytes) -> None:
        if path.name == failing:
            raise OSError(28, "No space left on device", str(path))
        real(path, data)

    monkeypatch.setattr(checkpoint, "_write_synced", full)
    with pytest.raises(RankError, match=r"rank 0 could not (write|publish) .*No space left on device.*untouched"):
        save(tmp_path, 10)
    monkeypatch.undo()
    assert checkpoint.find(tmp_path.parent / "none", str(before)).step == 5  # type: ignore[union-attr]
    assert not (tmp_path / "step-00000010").exists()


def test_another_ranks_failure_is_told_on_this_one(tmp_path: Path) -> None:
    other = {"error": "No space left on device (x)", "files": {}}
    with pytest.raises(RankError, match="rank 1 could not write the checkpoint"):
        checkpoint.save(tmp_path, 5, STATE, {}, OneOfTwo(0, other))
    assert not list(tmp_path.glob("step-*"))


def test_the_manifest_is_plain_json_and_names_every_file(tmp_path: Path) -> None:
    path = save(tmp_path)
    manifest = json.loads((path / "manifest.json").read_text())
    assert set(manifest["files"]) == {p.name for p in path.iterdir()} - {"manifest.json"}
