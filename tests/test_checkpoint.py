"""A checkpoint is there whole or not at all, and what is damaged is never loaded."""

from __future__ import annotations

import json
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file

from hvdlm import cli
from hvdlm.checkpoints import load
from hvdlm.checkpoints.merge import convert
from hvdlm.errors import HvdlmError, RankError
from hvdlm.parallel.flat_layout import Shard, whole
from hvdlm_backends.local import LocalWorld

STATE = {
    "parameters/w": np.arange(6, dtype=np.float32).reshape(2, 3),
    "optimizer/momentum/w": np.ones((2, 3), np.float32),
    "carry/0.0": np.arange(8, dtype=np.float32).reshape(4, 2),
}


WANTED = {name: whole(array.shape) for name, array in STATE.items()}
W = WANTED["parameters/w"]


class Ranks:
    """Ranks that are threads of this process."""

    def __init__(self, size: int) -> None:
        self.size, self._said = size, [None] * size
        self._barrier = threading.Barrier(size, timeout=20)

    def world(self, rank: int) -> Any:
        """Return the world as ``rank`` sees it."""
        world = LocalWorld()
        world.rank, world.size = rank, self.size  # type: ignore[misc]
        world.gather_objects = lambda value: self._gather(rank, value)  # type: ignore[method-assign]
        world.broadcast_object = lambda value, root=0: self._gather(rank, value)[root]  # type: ignore[method-assign]
        world.broadcast_bytes = lambda data, root: self._gather(rank, data or b"")[root]  # type: ignore[method-assign]
        world.any = lambda flag: any(self._gather(rank, flag))  # type: ignore[method-assign]
        return world

    def _gather(self, rank: int, value: Any) -> list[Any]:
        self._said[rank] = value if isinstance(value, bytes) else json.loads(json.dumps(value))
        self._barrier.wait()
        said = list(self._said)
        self._barrier.wait()
        return said

    def run(self, action: Callable[[Any], Any]) -> list[Any]:
        """Return what ``action(world)`` returned or raised on every rank."""

        def guarded(rank: int) -> Any:
            try:
                return action(self.world(rank))
            except (RankError, HvdlmError) as error:
                return error
            except BaseException:
                self._barrier.abort()
                raise

        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(guarded, range(self.size)))


def cut(array: np.ndarray, shard: Shard) -> np.ndarray:
    box = array[(..., *shard.slices)]
    return box if shard.flat is None else box.reshape(-1)[slice(*shard.flat)]


def save(folder: Path, step: int = 5) -> Path:
    return load.save(folder, step, STATE, {"tokenizer": "t"}, LocalWorld())


def save_cut(folder: Path, arrays: dict[str, np.ndarray], cuts: list[dict[str, Shard]]) -> Path:
    """Save ``arrays`` from as many ranks as there are ``cuts``, each with its pieces."""

    def action(world: Any) -> Path:
        shards = cuts[world.rank]
        state = {name: cut(arrays[name], shard) for name, shard in shards.items()}
        return load.save(folder, 5, state, {}, world, shards)

    return Ranks(len(cuts)).run(action)[0]


def rows(shape: tuple[int, ...], first: int, last: int) -> Shard:
    return Shard(shape, (first, 0), (last - first, shape[1]))


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


def test_what_is_saved_is_loaded_bit_for_bit(tmp_path: Path) -> None:
    found = load.open_checkpoint(save(tmp_path))
    loaded = load.load(found, WANTED, 0, 1)
    assert found.step == 5 and found.manifest["tokenizer"] == "t" and loaded.keys() == STATE.keys()
    for name, array in STATE.items():
        np.testing.assert_array_equal(loaded[name], array)
    assert not list(tmp_path.glob(".*")) and (tmp_path / "latest").read_text() == "step-00000005"


def test_carried_state_is_dealt_out_anew_on_another_number_of_ranks(tmp_path: Path) -> None:
    found = load.open_checkpoint(save(tmp_path))
    wanted = [{"carry/0.0": rows((4, 2), 2 * rank, 2 * rank + 2)} for rank in range(2)]
    parts = [load.load(found, wanted[rank], rank, 2)["carry/0.0"] for rank in range(2)]
    np.testing.assert_array_equal(np.concatenate(parts), STATE["carry/0.0"])


@st.composite
def boxes(draw: st.DrawFn, shape: tuple[int, ...]) -> list[Shard]:
    """Return pieces that together are an array of ``shape``: boxes, some of them cut again into flat ranges."""
    found = [whole(shape)]
    for _ in range(draw(st.integers(0, 4))):
        shard = found.pop(draw(st.integers(0, len(found) - 1)))
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
        found += halves
    return list(dict.fromkeys(found))


@st.composite
def saved_and_wanted(draw: st.DrawFn) -> tuple[tuple[int, ...], list[dict[str, Shard]], list[Shard]]:
    """Return a shape, which pieces of arrays of that shape each of some ranks holds, and other pieces."""
    shape = tuple(draw(st.lists(st.integers(0, 6), max_size=3)))
    size = draw(st.integers(1, 3))
    ranks: list[dict[str, Shard]] = [{} for _ in range(size)]
    # A rank holds one piece of a tensor: what is left over goes to further ranks.
    for name in ("parameters/a", "optimizer/m/a", "carry/a"):
        for number, shard in enumerate(draw(st.permutations(draw(boxes(shape))))):
            if number == len(ranks):
                ranks.append({})
            ranks[number][name] = shard
    for rank in ranks:  # and some hold what another holds too
        for name in ("parameters/a", "optimizer/m/a", "carry/a"):
            if name not in rank and draw(st.booleans()):
                rank[name] = draw(st.sampled_from([other[name] for other in ranks if name in other]))
    return shape, ranks, draw(boxes(shape))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(saved_and_wanted(), st.sampled_from(["float32", "float64", "int64"]))
def test_any_cut_of_an_array_is_loaded_in_any_other_bit_for_bit(
    case: tuple[tuple[int, ...], list[dict[str, Shard]], list[Shard]], dtype: str
) -> None:
    shape, ranks, wanted = case
    bits = np.random.default_rng(1).integers(0, 2**60, shape, "int64")
    arrays = {name: np.asarray(bits + i).astype(dtype) for i, name in enumerate(("parameters/a", "optimizer/m/a"))}
    arrays["carry/a"] = arrays["parameters/a"] * 2
    with tempfile.TemporaryDirectory() as folder:
        found = load.open_checkpoint(save_cut(Path(folder), arrays, ranks))
        for shard in wanted:
            loaded = load.load(found, dict.fromkeys(arrays, shard), 0, 9)
            for name, array in arrays.items():
                assert loaded[name].shape == shard.held and loaded[name].dtype == array.dtype
                assert loaded[name].tobytes() == cut(array, shard).tobytes()
        assert convert(found, Path(folder) / "merged") == bits.size
        merged = load_file(Path(folder) / "merged")
        assert merged["a"].shape == shape and merged["a"].tobytes() == arrays["parameters/a"].tobytes()


def test_what_several_ranks_hold_the_lowest_writes_alone(tmp_path: Path) -> None:
    shape = (4, 3)
    array = np.arange(12, dtype=np.float32).reshape(shape)
    cuts = [{"parameters/w": rows(shape, 2 * (r // 2), 2 * (r // 2) + 2), "optimizer/m/w": whole(shape)}
            for r in range(4)]  # fmt: skip
    path = save_cut(tmp_path, {"parameters/w": array, "optimizer/m/w": array}, cuts)
    names = {p.name for p in path.iterdir()}
    assert names == {
        "manifest.json",
        "model-0000.safetensors",
        "model-0002.safetensors",
        "optimizer.safetensors",
    }
    with safe_open(str(path / "model-0002.safetensors"), framework="numpy") as file:
        np.testing.assert_array_equal(file.get_tensor("w"), array[2:])


def test_what_a_rank_alone_knows_goes_back_to_it_and_to_no_other_number_of_ranks(tmp_path: Path) -> None:
    def action(world: Any) -> Path:
        mine = {"exchange/error": np.full(2, world.rank, np.float32), "optimizer/loss_scale": np.float32(8)}
        return load.save(tmp_path, 5, STATE | {k: np.asarray(v) for k, v in mine.items()}, {}, world)

    found = load.open_checkpoint(Ranks(2).run(action)[0])
    for rank in range(2):
        loaded = load.load(found, {"parameters/w": W}, rank, 2)
        assert loaded["exchange/error"].tolist() == [rank, rank]
        assert loaded["optimizer/loss_scale"].shape == () and loaded["optimizer/loss_scale"] == 8
    assert "exchange/error" not in load.load(found, {"parameters/w": W}, 0, 1)


def test_only_files_that_overlap_are_read(tmp_path: Path) -> None:
    shape = (4, 3)
    array = np.arange(12, dtype=np.float32).reshape(shape)
    path = save_cut(
        tmp_path, {"parameters/w": array}, [{"parameters/w": rows(shape, 2 * r, 2 * r + 2)} for r in (0, 1)]
    )
    flip(path / "model-0001.safetensors")
    found = load.open_checkpoint(path)
    loaded = load.load(found, {"parameters/w": rows(shape, 1, 2)}, 0, 2)
    np.testing.assert_array_equal(loaded["parameters/w"], array[1:2])
    loaded["parameters/w"] += 1  # it is the caller's own
    with pytest.raises(HvdlmError, match=r"model-0001\.safetensors has another SHA-256"):
        load.load(found, {"parameters/w": rows(shape, 1, 3)}, 0, 2)


def test_a_model_of_other_settings_is_told_what_does_not_fit(tmp_path: Path) -> None:
    found = load.open_checkpoint(save(tmp_path))
    with pytest.raises(HvdlmError, match=r"parameters/v is missing, expected \[2\]\. Use the model settings"):
        load.load(found, {"parameters/v": whole((2,))}, 0, 1)
    with pytest.raises(HvdlmError, match=r"parameters/w has shape \[2, 3\], expected \[3, 3\]"):
        load.load(found, {"parameters/w": whole((3, 3))}, 0, 1)
    afresh = {"optimizer/second/w": W, "carry/0.0": whole((6, 2))}
    assert load.load(found, afresh, 0, 1) == {}


def test_a_missing_slice_is_told(tmp_path: Path) -> None:
    path = save_cut(tmp_path, {n: STATE[n] for n in WANTED}, [{n: rows(p.shape, 0, 1) for n, p in WANTED.items()}])
    found = load.open_checkpoint(path)
    with pytest.raises(HvdlmError, match=f"checkpoint {path} is damaged: a slice of parameters/w is missing"):
        load.load(found, {"parameters/w": W}, 0, 1)
    assert load.load(found, {"carry/0.0": WANTED["carry/0.0"]}, 0, 1) == {}
    with pytest.raises(HvdlmError, match=r"a slice of parameters/w is missing"):
        convert(found, tmp_path / "merged")
    assert not list(tmp_path.glob("*merged*"))


def test_auto_takes_the_newest_whole_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "checkpoints"
    assert load.find(tmp_path, "auto") is None
    save(folder, 10)
    save(folder, 20)
    (folder / "step-00000030").mkdir()
    (folder / ".step-00000040.partial").mkdir()
    assert load.find(tmp_path, "auto").step == 20  # type: ignore[union-attr]
    assert load.find(tmp_path, str(folder / "step-00000010")).step == 10  # type: ignore[union-attr]
    assert load.find(tmp_path / "elsewhere", str(tmp_path)).step == 20  # type: ignore[union-attr]
    path = folder / "step-00000030"
    assert (
        capsys.readouterr().err == f"hvdlm: checkpoint {path} is damaged (it has no manifest.json): it is skipped\n" * 2
    )
    for step in (10, 20):
        (folder / f"step-{step:08d}" / "model.safetensors").unlink()
    with pytest.raises(HvdlmError, match="holds damaged checkpoints only, the newest because it has no manifest"):
        load.find(tmp_path, "auto")


def test_saving_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path)
    load.save(tmp_path, 5, {"parameters/w": np.zeros(1, np.float32)}, {}, LocalWorld())
    found = load.open_checkpoint(tmp_path / "step-00000005")
    loaded = load.load(found, {"parameters/w": whole((1,))}, 0, 1)
    assert list(loaded) == ["parameters/w"] and loaded["parameters/w"].tolist() == [0]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_a_flipped_bit_is_noticed_before_anything_is_loaded(tmp_path: Path) -> None:
    path = save(tmp_path)
    flip(path / "model.safetensors")
    with pytest.raises(HvdlmError, match=r"model\.safetensors has another SHA-256"):
        load.load(load.open_checkpoint(path), WANTED, 0, 1)


@pytest.mark.parametrize(
    "content",
    ["{", "[]", '{"format": "other"}', '{"format": "hvdlm-checkpoint-1"}', '{"format": "hvdlm-checkpoint-2"}', "\x00"]
    + ["[" * 100_000],
)
def test_a_damaged_manifest_is_refused_with_its_path(tmp_path: Path, content: str) -> None:
    path = save(tmp_path)
    (path / "manifest.json").write_text(content)
    with pytest.raises(HvdlmError, match=f"checkpoint {path} is damaged or foreign"):
        load.open_checkpoint(path)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"file": "other.safetensors"}, "is said to be in"),
        ({"file": "optimizer.safetensors"}, "is said to be in"),
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
def test_a_manifest_that_lies_about_a_slice_is_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    path = save(tmp_path)
    edit(path, lambda manifest: manifest["tensors"]["parameters/w"][0].update(change))
    with pytest.raises(HvdlmError, match=f"damaged or foreign: .*{said}"):
        load.open_checkpoint(path)


@pytest.mark.parametrize("tensors", [[], {"w": []}, {"parameters/w": []}, {"parameters/w": [{}]}, {"carry/a": 1}])
def test_a_manifest_without_proper_tensors_is_refused(tmp_path: Path, tensors: Any) -> None:
    path = save(tmp_path)
    edit(path, lambda manifest: manifest.update(tensors=tensors))
    with pytest.raises(HvdlmError, match="is damaged or foreign"):
        load.open_checkpoint(path)


def test_a_manifest_that_promises_more_than_the_file_holds_takes_no_memory(tmp_path: Path) -> None:
    path = save(tmp_path)
    edit(path, lambda manifest: manifest["tensors"]["parameters/w"][0].update(shape=[10**9, 10**9]))
    with pytest.raises(HvdlmError, match="a slice of parameters/w is missing"):
        convert(load.open_checkpoint(path), tmp_path / "merged")
    edit(path, lambda manifest: manifest["tensors"]["parameters/w"][0].update(shape=[3, 2], extent=[3, 2]))
    with pytest.raises(HvdlmError, match=r"parameters/w in model\.safetensors is not what the manifest says"):
        convert(load.open_checkpoint(path), tmp_path / "merged")


def test_the_manifest_is_plain_json_and_names_every_file(tmp_path: Path) -> None:
    path = save(tmp_path)
    manifest = json.loads((path / "manifest.json").read_text())
    assert set(manifest["files"]) == {p.name for p in path.iterdir()} - {"manifest.json"}
    for name, array in STATE.items():
        (entry,) = manifest["tensors"][name]
        assert (entry["shape"], entry["start"], entry["extent"]) == ([*array.shape], [0, 0], [*array.shape])
        assert entry["dtype"] == "F32" and manifest["files"][entry["file"]]["bytes"] > array.nbytes


def cut_run(folder: Path) -> dict[str, np.ndarray]:
    """Write a run whose checkpoint four ranks cut; return its parameters."""
    (folder / "run").mkdir()
    (folder / "run" / "config.yaml").write_text("train: {steps: 5}\n")
    arrays = {
        "parameters/w": np.random.default_rng(1).normal(size=(8, 6)).astype(np.float32),
        "parameters/norm": np.arange(6.0),
        "parameters/scale": np.asarray(np.float32(3)),
    }
    cuts = [
        {name: whole(array.shape) for name, array in arrays.items()}
        | {"parameters/w": Shard((8, 6), (0, 3 * (r % 2)), (8, 3), (12 * (r // 2), 12 * (r // 2) + 12))}
        for r in range(4)
    ]
    save_cut(folder / "run" / "checkpoints", arrays, cuts)
    return {name.removeprefix("parameters/"): array for name, array in arrays.items()}


def test_convert_merges_what_many_ranks_wrote_into_one_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = cut_run(tmp_path)
    output = tmp_path / "merged.safetensors"
    output.write_text("something older")
    assert cli.main(["convert", "--run", str(tmp_path / "run"), "--output", str(output)]) == 0
    assert "55 parameters" in capsys.readouterr().out
    found = load_file(output)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape
        np.testing.assert_array_equal(found[name], array)
    with safe_open(str(output), framework="numpy") as file:
        assert file.metadata() == {"format": "hvdlm", "step": "5"}
    step = tmp_path / "run" / "checkpoints" / "step-00000005"
    assert cli.main(["convert", "--checkpoint", str(step), "--output", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again").read_bytes() == output.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "merged.safetensors", "run"]


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--run", "no", "--output", "x"], "--run no: there is no run"),
        (["--run", "run"], "--output: the value is missing"),
        (["--run", "run", "--output", "no/x"], "--output no/x: No such file or directory"),
        (["--run", "run", "--output", "run"], "--output run: Is a directory"),
        (["--run", "run", "--output", "."], "--output .: "),
        (["--run", "empty", "--output", "x"], "empty holds no checkpoint yet"),
        (["--checkpoint", "no", "--output", "x"], "no is no hvdlm checkpoint"),
    ],
)
def test_convert_refuses_with_a_sentence(
    tmp_path: Path,
    arguments: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    cut_run(Path("."))
    Path("empty").mkdir()
    Path("empty/config.yaml").write_text("train: {steps: 5}\n")
    assert cli.main(["convert", *arguments]) == 2
    told = capsys.readouterr().err
    assert said in told and told.count("\n") == 1, told
    assert sorted(p.name for p in Path(".").iterdir()) == ["empty", "run"]
