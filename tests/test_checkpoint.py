"""Checkpoints are loaded bit for bit in any sharding; damaged and foreign ones are refused."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file

from builders import (
    STATE,
    STATE_SHARDS,
    ThreadRanks,
    edit_json,
    flip_last_bit,
    row_shard,
    save_checkpoint,
    save_state,
    take_shard,
)
from hvdlm import cli
from hvdlm.checkpoints import discovery, load
from hvdlm.errors import HvdlmError
from hvdlm.parallel.flat_layout import Shard, whole
from hvdlm_backends.local import LocalWorld
from hvdlm_tools.merge import convert


def edit_slice(path: Path, **entries: Any) -> None:
    """Change entries of the only slice of parameters/w in a manifest."""
    edit_json(path / "manifest.json", lambda manifest: manifest["tensors"]["parameters/w"][0].update(entries))


def save_shards(folder: Path, arrays: dict[str, np.ndarray], shards: list[dict[str, Shard]]) -> Path:
    """Save ``arrays`` from as many ranks as there are ``shards``; return the checkpoint."""

    def action(world: Any) -> Path:
        state = {name: take_shard(arrays[name], shard) for name, shard in shards[world.rank].items()}
        return save_checkpoint(folder, 5, state, {}, world, shards[world.rank])

    return ThreadRanks(len(shards)).run(action)[0]


def test_a_checkpoint_loads_bit_for_bit(tmp_path: Path) -> None:
    opened = load.open_checkpoint(save_state(tmp_path))
    loaded = load.read_state(opened, STATE_SHARDS, 0, 1)
    assert opened.step == 5 and opened.manifest["tokenizer"] == "t" and loaded.keys() == STATE.keys()
    for name, array in STATE.items():
        np.testing.assert_array_equal(loaded[name], array)
    assert not list(tmp_path.glob(".*")) and (tmp_path / "latest").read_text() == "step-00000005"


def test_carried_state_is_redistributed_for_a_new_world_size(tmp_path: Path) -> None:
    opened = load.open_checkpoint(save_state(tmp_path))
    wanted = [{"carry/0.0": row_shard((4, 2), 2 * rank, 2 * rank + 2)} for rank in range(2)]
    shards = [load.read_state(opened, wanted[rank], rank, 2)["carry/0.0"] for rank in range(2)]
    np.testing.assert_array_equal(np.concatenate(shards), STATE["carry/0.0"])


@st.composite
def shardings(draw: st.DrawFn, shape: tuple[int, ...]) -> list[Shard]:
    """Return shards that cover an array of ``shape``: boxes, some of them divided into flat ranges."""
    shards = [whole(shape)]
    for _ in range(draw(st.integers(0, 4))):
        shard = shards.pop(draw(st.integers(0, len(shards) - 1)))
        size = int(np.prod(shard.extent))
        if not shape or shard.flat or draw(st.booleans()):
            low, high = shard.flat or (0, size)
            middle = draw(st.integers(low, high))
            halves = [Shard(shape, shard.start, shard.extent, flat) for flat in ((low, middle), (middle, high))]
        else:
            axis = draw(st.integers(0, len(shape) - 1))
            middle = draw(st.integers(0, shard.extent[axis]))
            halves = []
            for begin, end in ((0, middle), (middle, shard.extent[axis])):
                start, extent = list(shard.start), list(shard.extent)
                start[axis], extent[axis] = start[axis] + begin, end - begin
                halves.append(Shard(shape, tuple(start), tuple(extent)))
        shards += halves
    return list(dict.fromkeys(shards))


@st.composite
def saved_and_wanted(draw: st.DrawFn) -> tuple[tuple[int, ...], list[dict[str, Shard]], list[Shard]]:
    """Return a shape, the shards of three arrays of that shape on every rank, and another sharding."""
    shape = tuple(draw(st.lists(st.integers(0, 6), max_size=3)))
    size = draw(st.integers(1, 3))
    ranks: list[dict[str, Shard]] = [{} for _ in range(size)]
    # A rank holds one shard of a tensor: further shards go to further ranks.
    for name in ("parameters/a", "optimizer/m/a", "carry/a"):
        for number, shard in enumerate(draw(st.permutations(draw(shardings(shape))))):
            if number == len(ranks):
                ranks.append({})
            ranks[number][name] = shard
    for rank in ranks:  # some shards are replicated
        for name in ("parameters/a", "optimizer/m/a", "carry/a"):
            if name not in rank and draw(st.booleans()):
                rank[name] = draw(st.sampled_from([other[name] for other in ranks if name in other]))
    return shape, ranks, draw(shardings(shape))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(saved_and_wanted(), st.sampled_from(["float32", "float64", "int64"]))
def test_any_sharding_loads_into_any_other_bit_for_bit(
    case: tuple[tuple[int, ...], list[dict[str, Shard]], list[Shard]], dtype: str
) -> None:
    shape, ranks, wanted = case
    bits = np.random.default_rng(1).integers(0, 2**60, shape, "int64")
    arrays = {name: np.asarray(bits + i).astype(dtype) for i, name in enumerate(("parameters/a", "optimizer/m/a"))}
    arrays["carry/a"] = arrays["parameters/a"] * 2
    with tempfile.TemporaryDirectory() as folder:
        opened = load.open_checkpoint(save_shards(Path(folder), arrays, ranks))
        for shard in wanted:
            loaded = load.read_state(opened, dict.fromkeys(arrays, shard), 0, 9)
            for name, array in arrays.items():
                assert loaded[name].shape == shard.held and loaded[name].dtype == array.dtype
                assert loaded[name].tobytes() == take_shard(array, shard).tobytes()
        assert convert(opened, Path(folder) / "merged") == bits.size
        merged = load_file(Path(folder) / "merged")
        assert merged["a"].shape == shape and merged["a"].tobytes() == arrays["parameters/a"].tobytes()


def test_replicated_shards_are_written_by_the_lowest_rank(tmp_path: Path) -> None:
    shape = (4, 3)
    array = np.arange(12, dtype=np.float32).reshape(shape)
    shards = [{"parameters/w": row_shard(shape, 2 * (r // 2), 2 * (r // 2) + 2), "optimizer/m/w": whole(shape)}
            for r in range(4)]  # fmt: skip
    path = save_shards(tmp_path, {"parameters/w": array, "optimizer/m/w": array}, shards)
    names = {p.name for p in path.iterdir()}
    assert names == {
        "manifest.json",
        "model-0000.safetensors",
        "model-0002.safetensors",
        "optimizer.safetensors",
    }
    with safe_open(str(path / "model-0002.safetensors"), framework="numpy") as file:
        np.testing.assert_array_equal(file.get_tensor("w"), array[2:])


def test_per_rank_state_needs_the_same_world_size(tmp_path: Path) -> None:
    def action(world: Any) -> Path:
        rank_state = {"exchange/error": np.full(2, world.rank, np.float32), "optimizer/loss_scale": np.float32(8)}
        return save_checkpoint(tmp_path, 5, STATE | {k: np.asarray(v) for k, v in rank_state.items()}, {}, world)

    opened = load.open_checkpoint(ThreadRanks(2).run(action)[0])
    for rank in range(2):
        loaded = load.read_state(opened, {"parameters/w": STATE_SHARDS["parameters/w"]}, rank, 2)
        assert loaded["exchange/error"].tolist() == [rank, rank]
        assert loaded["optimizer/loss_scale"].shape == () and loaded["optimizer/loss_scale"] == 8
    assert "exchange/error" not in load.read_state(opened, {"parameters/w": STATE_SHARDS["parameters/w"]}, 0, 1)


def test_only_overlapping_files_are_read(tmp_path: Path) -> None:
    shape = (4, 3)
    array = np.arange(12, dtype=np.float32).reshape(shape)
    path = save_shards(
        tmp_path, {"parameters/w": array}, [{"parameters/w": row_shard(shape, 2 * r, 2 * r + 2)} for r in (0, 1)]
    )
    flip_last_bit(path / "model-0001.safetensors")
    opened = load.open_checkpoint(path)
    loaded = load.read_state(opened, {"parameters/w": row_shard(shape, 1, 2)}, 0, 2)
    np.testing.assert_array_equal(loaded["parameters/w"], array[1:2])
    loaded["parameters/w"] += 1  # the array is writable
    with pytest.raises(HvdlmError, match=r"model-0001\.safetensors has another SHA-256"):
        load.read_state(opened, {"parameters/w": row_shard(shape, 1, 3)}, 0, 2)


def test_mismatched_model_settings_are_named(tmp_path: Path) -> None:
    opened = load.open_checkpoint(save_state(tmp_path))
    with pytest.raises(HvdlmError, match=r"parameters/v is missing, expected \[2\]\. Use the model settings"):
        load.read_state(opened, {"parameters/v": whole((2,))}, 0, 1)
    with pytest.raises(HvdlmError, match=r"parameters/w has shape \[2, 3\], expected \[3, 3\]"):
        load.read_state(opened, {"parameters/w": whole((3, 3))}, 0, 1)
    afresh = {"optimizer/second/w": STATE_SHARDS["parameters/w"], "carry/0.0": whole((6, 2))}
    assert load.read_state(opened, afresh, 0, 1) == {}


def test_a_missing_slice_is_an_error(tmp_path: Path) -> None:
    path = save_shards(
        tmp_path, {n: STATE[n] for n in STATE_SHARDS}, [{n: row_shard(p.shape, 0, 1) for n, p in STATE_SHARDS.items()}]
    )
    opened = load.open_checkpoint(path)
    with pytest.raises(
        HvdlmError, match=f"checkpoint {path} is damaged or foreign: a slice of parameters/w is missing"
    ):
        load.read_state(opened, {"parameters/w": STATE_SHARDS["parameters/w"]}, 0, 1)
    assert load.read_state(opened, {"carry/0.0": STATE_SHARDS["carry/0.0"]}, 0, 1) == {}
    with pytest.raises(HvdlmError, match=r"a slice of parameters/w is missing"):
        convert(opened, tmp_path / "merged")
    assert not list(tmp_path.glob("*merged*"))


def test_auto_selects_the_newest_complete_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "checkpoints"
    assert discovery.find(tmp_path, "auto") is None
    save_state(folder, 10)
    save_state(folder, 20)
    (folder / "step-00000030").mkdir()
    (folder / ".step-00000040.partial").mkdir()
    assert discovery.find(tmp_path, "auto").step == 20  # type: ignore[union-attr]
    assert discovery.find(tmp_path, str(folder / "step-00000010")).step == 10  # type: ignore[union-attr]
    assert discovery.find(tmp_path / "elsewhere", str(tmp_path)).step == 20  # type: ignore[union-attr]
    path = folder / "step-00000030"
    assert (
        capsys.readouterr().err == f"hvdlm: checkpoint {path} is damaged (it has no manifest.json): it is skipped\n" * 2
    )
    for step in (10, 20):
        (folder / f"step-{step:08d}" / "model.safetensors").unlink()
    with pytest.raises(HvdlmError, match="holds damaged checkpoints only, the newest because it has no manifest"):
        discovery.find(tmp_path, "auto")


def test_saving_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    save_state(tmp_path)
    save_checkpoint(tmp_path, 5, {"parameters/w": np.zeros(1, np.float32)}, {}, LocalWorld())
    opened = load.open_checkpoint(tmp_path / "step-00000005")
    loaded = load.read_state(opened, {"parameters/w": whole((1,))}, 0, 1)
    assert list(loaded) == ["parameters/w"] and loaded["parameters/w"].tolist() == [0]


def test_a_flipped_bit_is_detected_before_loading(tmp_path: Path) -> None:
    path = save_state(tmp_path)
    flip_last_bit(path / "model.safetensors")
    with pytest.raises(HvdlmError, match=r"model\.safetensors has another SHA-256"):
        load.read_state(load.open_checkpoint(path), STATE_SHARDS, 0, 1)


@pytest.mark.parametrize(
    "content",
    ["{", "[]", '{"format": "other"}', '{"format": "hvdlm-checkpoint-1"}', '{"format": "hvdlm-checkpoint-2"}', "\x00"]
    + ["[" * 100_000],
)
def test_a_damaged_manifest_is_refused_with_its_path(tmp_path: Path, content: str) -> None:
    path = save_state(tmp_path)
    (path / "manifest.json").write_text(content)
    with pytest.raises(HvdlmError, match=f"checkpoint {path} is damaged or foreign"):
        load.open_checkpoint(path)


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"file": "other.safetensors"}, "is claimed to be in"),
        ({"file": "optimizer.safetensors"}, "is claimed to be in"),
        ({"file": ["model.safetensors"]}, "unhashable"),
        ({"dtype": "F33"}, "dtype"),
        ({"start": [1, 0]}, "outside"),
        ({"start": [-1, 0]}, "is cut at"),
        ({"start": [False, 0]}, "is cut at"),
        ({"start": [0]}, "outside"),
        ({"extent": [2, 2.0]}, "is cut at"),
        ({"flat": [0, 7]}, "outside"),
        ({"flat": [3, 2]}, "outside"),
        ({"flat": [3]}, "unpack"),
        ({"shape": [10**9, 10**9], "extent": [10**9, 10**9]}, "too small"),
        ({"shape": None}, "is cut at"),
    ],
)
def test_a_manifest_with_a_wrong_slice_is_refused(tmp_path: Path, change: dict[str, Any], expected: str) -> None:
    path = save_state(tmp_path)
    edit_slice(path, **change)
    with pytest.raises(HvdlmError, match=f"damaged or foreign: .*{expected}"):
        load.open_checkpoint(path)


@pytest.mark.parametrize("tensors", [[], {"w": []}, {"parameters/w": []}, {"parameters/w": [{}]}, {"carry/a": 1}])
def test_a_manifest_with_malformed_tensors_is_refused(tmp_path: Path, tensors: Any) -> None:
    path = save_state(tmp_path)
    edit_json(path / "manifest.json", lambda manifest: manifest.update(tensors=tensors))
    with pytest.raises(HvdlmError, match="is damaged or foreign"):
        load.open_checkpoint(path)


def test_a_manifest_larger_than_its_file_allocates_nothing(tmp_path: Path) -> None:
    path = save_state(tmp_path)
    edit_slice(path, shape=[10**9, 10**9])
    with pytest.raises(HvdlmError, match="a slice of parameters/w is missing"):
        convert(load.open_checkpoint(path), tmp_path / "merged")
    edit_slice(path, shape=[3, 2], extent=[3, 2])
    with pytest.raises(HvdlmError, match=r"parameters/w in model\.safetensors is not what the manifest says"):
        convert(load.open_checkpoint(path), tmp_path / "merged")


def test_the_manifest_is_plain_json_and_names_every_file(tmp_path: Path) -> None:
    path = save_state(tmp_path)
    manifest = json.loads((path / "manifest.json").read_text())
    assert set(manifest["files"]) == {p.name for p in path.iterdir()} - {"manifest.json"}
    for name, array in STATE.items():
        (entry,) = manifest["tensors"][name]
        assert (entry["shape"], entry["start"], entry["extent"]) == ([*array.shape], [0, 0], [*array.shape])
        assert entry["dtype"] == "F32" and manifest["files"][entry["file"]]["bytes"] > array.nbytes


def write_sharded_run(folder: Path) -> dict[str, np.ndarray]:
    """Write a run with a checkpoint of four ranks; return its parameters."""
    (folder / "run").mkdir()
    (folder / "run" / "config.yaml").write_text("train: {steps: 5}\n")
    arrays = {
        "parameters/w": np.random.default_rng(1).normal(size=(8, 6)).astype(np.float32),
        "parameters/norm": np.arange(6.0),
        "parameters/scale": np.asarray(np.float32(3)),
    }
    shards = [
        {name: whole(array.shape) for name, array in arrays.items()}
        | {"parameters/w": Shard((8, 6), (0, 3 * (r % 2)), (8, 3), (12 * (r // 2), 12 * (r // 2) + 12))}
        for r in range(4)
    ]
    save_shards(folder / "run" / "checkpoints", arrays, shards)
    return {name.removeprefix("parameters/"): array for name, array in arrays.items()}


def test_convert_merges_the_shards_of_all_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = write_sharded_run(tmp_path)
    output = tmp_path / "merged.safetensors"
    output.write_text("something older")
    assert cli.main(["convert", "--run", str(tmp_path / "run"), "--output", str(output)]) == 0
    assert "55 parameters" in capsys.readouterr().out
    merged = load_file(output)
    assert merged.keys() == expected.keys()
    for name, array in expected.items():
        assert merged[name].dtype == array.dtype and merged[name].shape == array.shape
        np.testing.assert_array_equal(merged[name], array)
    with safe_open(str(output), framework="numpy") as file:
        assert file.metadata() == {"format": "hvdlm", "step": "5"}
    step = tmp_path / "run" / "checkpoints" / "step-00000005"
    assert cli.main(["convert", "--checkpoint", str(step), "--output", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again").read_bytes() == output.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "merged.safetensors", "run"]


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--run", "no", "--output", "x"], "--run no: there is no run"),
        (["--run", "run"], "--output: the value is missing"),
        (["--run", "run", "--output", "no/x"], "--output no/x: No such file or directory"),
        (["--run", "run", "--output", "run"], "--output run: it is a folder, expected the name of a file"),
        (["--run", "run", "--output", "."], "--output .: "),
        (["--run", "empty", "--output", "x"], "empty holds no checkpoint yet"),
        (["--checkpoint", "no", "--output", "x"], "no is no hvdlm checkpoint"),
    ],
)
def test_convert_refuses_bad_arguments_in_one_sentence(
    tmp_path: Path,
    arguments: list[str],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_sharded_run(Path("."))
    Path("empty").mkdir()
    Path("empty/config.yaml").write_text("train: {steps: 5}\n")
    assert cli.main(["convert", *arguments]) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1, error
    assert sorted(p.name for p in Path(".").iterdir()) == ["empty", "run"]
