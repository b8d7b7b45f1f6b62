"""What others may have written is read or refused with a sentence: no crash, no hang, no memory beyond its size."""

from __future__ import annotations

import base64
import gzip
import io
import json
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import hostile
import numpy as np
import pytest
from hostile import CORPUS, TARGETS, TEXT, described
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hvdlm import cli
from hvdlm.checkpoints import manifest
from hvdlm.config import DataConfig
from hvdlm.configuration import parsing
from hvdlm.data import preparation, sources, token_files, tokenizers
from hvdlm.errors import HvdlmError
from hvdlm.io import untrusted_input
from launching import environment

KEPT = sorted(path for name in TARGETS for path in (CORPUS / name).glob("*"))
FRAGMENTS = (
    *("model", "train", "data", ": ", "\n", "  ", "- ", "&a ", "*a", "<<: ", "!!int ", "!!binary ", "? ", "{", "}"),
    *("[", "]", ",", "'", '"', "|\n", ">\n", "1:60", "0x", "9" * 99, "2026-99-99", "\x00", "\ud7ff", "#", "%YAML"),
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: tmp_path_factory.mktemp(name) for name in TARGETS}


@pytest.mark.parametrize("name", TARGETS)
def test_what_was_written_properly_is_taken(name: str, place: dict[str, Path]) -> None:
    for data in TARGETS[name].seeds()[:1]:
        TARGETS[name].read(data, place[name])


@pytest.mark.parametrize("path", KEPT, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_what_fuzzers_found_stays_mended(path: Path, place: dict[str, Path]) -> None:
    hostile.check(TARGETS[path.parent.name], path.read_bytes(), place[path.parent.name])


def test_every_target_has_a_corpus() -> None:
    assert {path.parent.name for path in KEPT} == set(TARGETS)
    assert sum(path.stat().st_size for path in KEPT) < 200_000


@pytest.mark.parametrize("name", ["manifest", "shard", "header", "journal", "tokenizer"])
@given(seed=st.integers(0, 2**32), which=st.integers(0, 99))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_changed_parts_of_a_proper_file(name: str, seed: int, which: int, place: dict[str, Path]) -> None:
    seeds = SEEDS[name]
    hostile.check(TARGETS[name], hostile.mutated(name, seeds[which % len(seeds)], Random(seed)), place[name])


SEEDS = {name: target.seeds() for name, target in TARGETS.items()}


@pytest.mark.parametrize("name", TARGETS)
@given(cut=st.floats(0, 1), noise=st.binary(max_size=30), which=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_noise_in_a_proper_file(name: str, cut: float, noise: bytes, which: int, place: dict[str, Path]) -> None:
    data = SEEDS[name][which % len(SEEDS[name])]
    at = int(cut * len(data))
    hostile.check(TARGETS[name], data[:at] + noise + data[at + len(noise) :], place[name])


@given(st.lists(st.sampled_from(FRAGMENTS), max_size=40).map("".join))
@settings(max_examples=150, deadline=None)
def test_fragments_of_yaml(place: dict[str, Path], text: str) -> None:
    hostile.check(TARGETS["yaml"], text.encode(), place["yaml"])


def test_native_code_takes_no_memory_either(tmp_path: Path) -> None:
    """What is handed to compiled libraries is not traced: the whole corpus again, in little address space."""
    program = """
import resource, sys
from pathlib import Path
import hostile
folder, own = Path(sys.argv[1]), lambda: int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
for name in ("shard", "tokenizer"):
    target = hostile.TARGETS[name]
    for data in target.seeds():
        target.read(data, folder)
    resource.setrlimit(resource.RLIMIT_AS, (own() + 2**26, resource.RLIM_INFINITY))
    for path in sorted((hostile.CORPUS / name).glob("*")):
        hostile._attempt(lambda: target.read(path.read_bytes(), folder))
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print("all read")
"""
    command = [sys.executable, "-c", program, str(tmp_path)]
    variables = environment(
        PYTHONPATH=str(CORPUS.parent), RUST_BACKTRACE="0", RAYON_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1"
    )
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout == "all read\n", done.stderr[-2000:]


def peak(action: Callable[[], Any]) -> int:
    """Return the most memory that ``action`` took, refusing or not."""
    tracemalloc.start()
    try:
        action()
    except HvdlmError:
        pass
    finally:
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return most


@pytest.mark.parametrize(
    "part", ["[],", "{},", "[0],", '{"a":0},', '"ab",', "1.5,", "300,", '["ab","cd"],', '"\U00010000",', '"%d",']
)
def test_json_of_many_small_parts_takes_ten_times_its_size_at_most(part: str, tmp_path: Path) -> None:
    text = "[" + "".join(part % i if "%" in part else part for i in range(2_000_000 // len(part))) + "0]"
    (tmp_path / "manifest.json").write_text(text, encoding="utf-8")
    size = (tmp_path / "manifest.json").stat().st_size
    assert peak(lambda: manifest.read_manifest(tmp_path)) <= untrusted_input.FACTOR * size + untrusted_input.SLACK


def test_a_manifest_of_a_large_model_is_taken(tmp_path: Path) -> None:
    """What the bound on memory must not refuse: 8,000 tensors, 2 MB of JSON."""
    entry = {
        "dtype": "F32",
        "extent": [0, 64],
        "file": "model.safetensors",
        "flat": None,
        "shape": [0, 64],
        "start": [0, 0],
    }
    said = hostile.manifest()
    said["tensors"] |= {f"parameters/blocks.{i}.weight": [entry] for i in range(8_000)}
    path = hostile._checkpoint(tmp_path)
    (path / "manifest.json").write_text(json.dumps(said, indent=1, sort_keys=True))
    size = (path / "manifest.json").stat().st_size
    assert size > 1_500_000
    found: list[Any] = []
    most = peak(lambda: found.append(manifest.read_manifest(path)))
    assert len(found[0][1]) == 8_003 and most <= untrusted_input.FACTOR * size + untrusted_input.SLACK


# Checkpoints


def checkpoint(folder: Path, change: Callable[[Any], Any] = lambda said: None) -> Path:
    path = hostile._checkpoint(folder)
    said = hostile.manifest()
    change(said)
    (path / "manifest.json").write_text(json.dumps(said))
    return path


def moved(path: Path, to: Path) -> None:
    """Leave a symbolic link to ``to`` in place of ``path``."""
    path.rename(to)
    path.symlink_to(to)


@pytest.mark.parametrize("name", ["manifest.json", "model.safetensors"])
def test_links_in_a_checkpoint_stay_in_it(name: str, tmp_path: Path) -> None:
    path = checkpoint(tmp_path)
    moved(path / name, path / "elsewhere")
    manifest.read_manifest(path)
    (path / name).unlink()
    (path / "elsewhere").rename(tmp_path / "outside")
    (path / name).symlink_to("../outside")
    with pytest.raises(HvdlmError, match=rf"{name} is a symbolic link that leads out of its folder\. Resume from"):
        manifest.read_manifest(path)


def test_a_checkpoint_that_is_a_link_to_elsewhere_is_refused(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "runs" if (tmp_path / "runs").mkdir() is None else tmp_path)
    moved(path, tmp_path / "outside")
    with pytest.raises(HvdlmError, match="step-00000005 is a symbolic link that leads out of its folder"):
        manifest.read_manifest(path)


def test_a_shard_that_became_a_link_after_the_manifest_was_read(tmp_path: Path) -> None:
    path = checkpoint(tmp_path)
    found, tensors = manifest.read_manifest(path)
    moved(path / "model.safetensors", tmp_path / "outside")
    reader = hostile.Reader(path, found["files"], tensors, verified=True)
    with pytest.raises(HvdlmError, match=r"model\.safetensors: .*leads out of its folder"):
        reader.shard("parameters/w", hostile.whole((2, 3)))


def test_a_shard_that_is_no_file_does_not_hang(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, lambda said: said["files"]["model.safetensors"].update(bytes=0))
    (path / "model.safetensors").unlink()
    os.mkfifo(path / "model.safetensors")
    with pytest.raises(HvdlmError, match=r"model\.safetensors is no regular file"):
        manifest.read_manifest(path)


def claim(said: dict[str, Any], **changes: Any) -> None:
    said["tensors"]["parameters/w"][0].update(changes)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda said: said.update(world_size=0), "its world_size is 0"),
        (lambda said: said.update(step=True), "its step is True"),
        (lambda said: said.update(step=10**30), "its step is 1000"),
        (lambda said: said.update(mesh="1"), "its mesh is 1"),
        (lambda said: said.update(mesh=[0]), r"its mesh is \[0\]"),
        (lambda said: said.update(metrics=[]), r"its metrics is \[\], not a mapping"),
        (lambda said: said.update(metrics={"a\n": "b"}), "its metric a is 'b'"),
        (lambda said: said.update(cursor=5), "its cursor is 5, not a mapping"),
        (lambda said: said.update(config=None), "its config is None"),
        (lambda said: said.update(versions={"a": 1}), "its version of a is 1"),
        (lambda said: said.update(vocab=-1), "its vocab is -1"),
        (lambda said: said["files"].update({"mo\u0664del-\u0664.safetensors": {}}), "it names a file"),
        (lambda said: said["files"]["model.safetensors"].update(sha256="ABC"), "it has no SHA-256"),
        (lambda said: said["files"]["model.safetensors"].update(bytes="9"), "the size of model.safetensors is '9'"),
        (lambda said: said["tensors"].update({"parameters/\x1b[2J": []}), r"it names a tensor 'parameters/\\x1b\[2J'"),
        (lambda said: claim(said, shape=[1] * 99, start=[0] * 99, extent=[1] * 99), "larger than any array"),
        (lambda said: claim(said, shape=[0, 2**60, 2**60], start=[0] * 3, extent=[0] * 3), "larger than any array"),
        (
            lambda said: said["tensors"]["parameters/w"].append(said["tensors"]["parameters/w"][0]),
            "too small|contradict",
        ),
    ],
)
def test_a_manifest_that_says_odd_things(change: Callable[[Any], Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(HvdlmError, match=f"damaged or foreign: .*{words}"):
        manifest.read_manifest(checkpoint(tmp_path, change))


def test_memory_claimed_many_times_over_is_not_given(tmp_path: Path) -> None:
    """Slices of one byte each, in boxes of a terabyte; and one file's bytes as if they were many slices'."""

    def boxes(said: dict[str, Any]) -> None:
        for entry, flat in zip(said["tensors"]["optimizer/m/w"], ([0, 1], [1, 2]), strict=True):
            entry.update(shape=[2, 2**40], extent=[2, 2**40], flat=flat)

    found, tensors = manifest.read_manifest(path := checkpoint(tmp_path, boxes))
    reader = hostile.Reader(path, found["files"], tensors)
    wanted = hostile.whole((2, 2**40))
    assert peak(lambda: reader.shard("optimizer/m/w", wanted)) < 2**20
    with pytest.raises(HvdlmError, match="a slice of optimizer/m/w is missing"):
        reader.shard("optimizer/m/w", wanted)

    def claims(said: dict[str, Any]) -> None:
        entry = said["tensors"]["parameters/w"][0]
        cuts = [{**entry, "shape": [2, 300], "start": [0, 3 * i]} for i in range(100)]
        said["tensors"]["parameters/w"] = cuts

    with pytest.raises(HvdlmError, match=r"model\.safetensors is too small for its slice of parameters/w"):
        manifest.read_manifest(checkpoint(tmp_path, claims))


def test_a_rank_s_own_file_brings_nothing_but_its_own(tmp_path: Path) -> None:
    data = hostile.to_bytes({"parameters/w": np.ones(3, np.float32)})
    (tmp_path / "rank-0000.safetensors").write_bytes(data)
    reader = hostile.Reader(tmp_path, {"rank-0000.safetensors": hostile.entry(data)}, {})
    with pytest.raises(HvdlmError, match=r"rank-0000\.safetensors holds 'parameters/w'"):
        reader.all("rank-0000.safetensors")


@pytest.mark.parametrize("length", [0, 93, 2**31, 2**63, 2**64 - 1])
def test_a_shard_s_header_is_as_long_as_its_file_at_most(length: int, tmp_path: Path) -> None:
    data = length.to_bytes(8, "little") + hostile.to_bytes({"exchange/e": np.ones(3, np.float32)})[8:]
    (tmp_path / "rank-0000.safetensors").write_bytes(data)
    reader = hostile.Reader(tmp_path, {"rank-0000.safetensors": hostile.entry(data)}, {})
    with pytest.raises(HvdlmError, match=f"its header is said to have {length:,} bytes"):
        reader.all("rank-0000.safetensors")


# Tokens and tokenizers


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    (tmp_path / "corpus.txt").write_text(TEXT * 20)
    data = DataConfig(path=str(tmp_path / "corpus.txt"), tokenizer="byte", cache=str(tmp_path / "cache"))
    return preparation.prepare(data, str(tmp_path / "tokens")).folder


@pytest.mark.parametrize("name", ["tokens.bin", "tokenizer.json", "header.json"])
def test_links_in_a_token_folder_stay_in_it(name: str, tokens: Path) -> None:
    moved(tokens / name, tokens.parent / "outside")
    with pytest.raises(HvdlmError, match=f"{name} is a symbolic link that leads out of its folder: delete it"):
        token_files.open_tokens(tokens)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"train": 1e999}, "its train is inf"),
        ({"train": -1}, "its train is -1"),
        ({"train": "30"}, "its train is '30'"),
        ({"validation_bytes": None}, "its validation_bytes is None"),
        ({"dtype": []}, r"\[\] is no dtype of tokens"),
        ({"sources": {"a": 1}}, "its sources are"),
    ],
)
def test_a_header_that_says_odd_things(change: dict[str, Any], words: str, tokens: Path) -> None:
    said = json.loads((tokens / "header.json").read_text())
    (tokens / "header.json").write_text(json.dumps(said | change))
    with pytest.raises(HvdlmError, match=f"damaged or foreign: {words}"):
        token_files.open_tokens(tokens)


@pytest.mark.parametrize(
    "value, words",
    [
        ([], "damaged or foreign"),
        ({"kind": "chars"}, "of no known kind: 'chars'"),
        ({"kind": "char", "characters": ""}, "one at least"),
        ({"kind": "char", "characters": "aba"}, "every character once"),
        ({"kind": "char", "characters": "\ud800"}, "surrogates"),
        ({"kind": "word", "words": ["a"]}, "every word once, and <unk>"),
        ({"kind": "word", "words": ["<unk>", "a", "a"]}, "every word once, and <unk>"),
        ({"kind": "word", "words": {"<unk>": 1}}, "of no known kind"),
        ({"kind": "bpe", "description": {}}, "no Hugging Face tokenizer.json"),
    ],
)
def test_a_tokenizer_that_says_odd_things(value: Any, words: str) -> None:
    with pytest.raises(HvdlmError, match=words):
        tokenizers.from_json(value)


def test_a_vocabulary_of_one_far_character_takes_no_table_of_all() -> None:
    assert peak(lambda: tokenizers.CharTokenizer("\U0010ffff")) < 20_000
    tokenizer = tokenizers.CharTokenizer("\U0010ffffa\U00010000\uffff")
    assert tokenizer.encode("a\U00010000\uffff\U0010ffffa").tolist() == [1, 2, 3, 0, 1]
    for stranger in ("b", "\U00010001", "\ufffe"):
        with pytest.raises(HvdlmError, match="is not among the 4"):
            tokenizer.encode(f"a{stranger}")


def test_what_a_description_says_of_batches_is_left_out() -> None:
    """A truncation would cut a corpus off, a padding could fill memory."""
    padding = {"strategy": {"Fixed": 10**6}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
               "pad_type_id": 0, "pad_token": "u"}  # fmt: skip
    truncation = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    tokenizer = tokenizers.BPETokenizer(described(padding=padding, truncation=truncation))
    assert 100 < len(tokenizer.encode("ab " * 50)) < 1000


BOMB = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
CHARSMAP = base64.b64encode(bytes(4) + b"x" * 999).decode()


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"normalizer": {"type": "Sequence", "normalizers": [BOMB] * 60}}, "256 times longer"),
        ({"decoder": {"type": "Sequence", "decoders": [BOMB] * 60}}, "256 times longer"),
        ({"normalizer": {"type": "Prepend", "prepend": "x" * 999}}, "256 times longer"),
        ({"normalizer": {"type": "Replace", "pattern": {"Regex": "b*"}, "content": "x" * 999}}, "256 times longer"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": CHARSMAP}}, "no Hugging Face|256 times longer"),
        ({"added_tokens": [], "model": {"type": "WordLevel", "unk_token": "u", "vocab": {"u": 2**32 - 1}}},
         "1 entries and the id 4294967295"),
    ],
)  # fmt: skip
def test_a_description_that_would_grow_without_bounds(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(HvdlmError, match=words):
        tokenizers.BPETokenizer(described(**changes))


EXPLODES = {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated", "invert": False}
PREFIXED = {**hostile._MODELS[0], "continuing_subword_prefix": "#" * 99}


def test_panics_of_the_library_are_told_like_other_faults() -> None:
    with pytest.raises(HvdlmError, match="no Hugging Face tokenizer"):
        tokenizers.BPETokenizer(described(model=PREFIXED))
    tokenizer = tokenizers.BPETokenizer(described(normalizer=None, pre_tokenizer=EXPLODES))
    with pytest.raises(HvdlmError, match=r"the tokenizer fails \(.*retry-limit.*use another"):
        tokenizer.encode("x" * 99)


def test_a_vocabulary_with_gaps_is_as_large_as_its_highest_id() -> None:
    tokenizer = tokenizers.BPETokenizer(described())
    assert tokenizer.vocab == 5 and tokenizer.encode("ab").max() == 4


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[" * 10**5, b'{"a":' * 10**5, b"{}", b""])
def test_a_tokenizer_file_that_is_none(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "t.json").write_bytes(content)
    with pytest.raises(HvdlmError, match=r"Hugging Face tokenizer\.json"):
        tokenizers.train(str(tmp_path / "t.json"), None, [])


# Corpora


def test_a_decompression_bomb_ends_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"the same line\n" * 10**6))
    assert sum(map(len, sources.chunks(str(tmp_path / "a.gz")))) == 14 * 10**6  # far below the least that is a bomb
    monkeypatch.setattr(untrusted_input, "_UNPACKED", 10**6)
    given = []
    with pytest.raises(HvdlmError, match=r"unpacks to more than 100 times its size.*unpack it with gunzip"):
        given += [len(chunk) for chunk in sources.chunks(str(tmp_path / "a.gz"))]
    assert sum(given) <= 100 * (tmp_path / "a.gz").stat().st_size + 2**20


def test_what_never_ends_is_no_corpus(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in ("/dev/zero", str(tmp_path / "pipe")):
        with pytest.raises(HvdlmError, match=f"data.path {path}: is no regular file.*--data.path -"):
            sources.expand([path])


def test_standard_input_that_fills_the_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Endless(io.RawIOBase):
        reads = 0

        def readable(self) -> bool:
            return True

        def read(self, size: int = -1) -> bytes:
            self.reads += 1
            if self.reads > 3:
                raise OSError(28, "No space left on device")
            return b"x" * 10

    monkeypatch.setattr(sys, "stdin", type("Stdin", (), {"buffer": Endless(), "isatty": lambda self: False})())
    with pytest.raises(HvdlmError, match=r"standard input can't be kept in .*No space left"):
        sources.spool(tmp_path)
    assert not list(tmp_path.iterdir())


# Configurations

LAUGHS = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefghijklm", "bcdefghijklmn", strict=True)
)


@pytest.mark.parametrize(
    "text, words",
    [
        (LAUGHS, r"aliases \(\*a\) are not taken"),
        ("model: &a {layers: *a}", r"aliases \(\*a\) are not taken"),
        (f"framework: {json.dumps(LAUGHS)}", r"aliases \(\*a\) are not taken"),
        ("model: {layers: !!int ''}", r"tags \(.*int\) are not taken"),
        ("model: {layers: '!!int \"\"'}", r"tags \(.*int\) are not taken"),
        ("model: !foo {}", "is no valid YAML"),
        ("[" * 10**5, "more than 32 in each other"),
        (f"framework: '{'[' * 10**4}'", "more than 32 in each other"),
        ("plugins: [" + "a, " * 30_000 + "]", "more than 20000 parts"),
        ("#" * 300_000, "larger than 262,144 bytes"),
        ("1: 2", "a name is no text: 1"),
        ("model: {layers: " + "9" * 5000 + "}", "is no valid YAML"),
        ("model: {layers: " + "9" * 50 + "}", "neither text nor a figure"),
        ("a: !!python/name:os.system", "are not taken|is no valid YAML"),
        ("\x00", "is no valid YAML"),
    ],
)
def test_a_configuration_that_is_none(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(text)
    for read in (lambda: parsing.parse_config(["--config", str(tmp_path / "a.yaml")], {}), lambda: run(tmp_path)):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(HvdlmError, match=words) as caught:
            read()
        assert len(str(caught.value)) < 600


def run(folder: Path) -> None:
    parsing.run_config(str(folder), [])


def test_what_a_configuration_may_hold_is_taken(tmp_path: Path) -> None:
    text = "log: {run: 2026-11-24, sample_prompt: '*ROMEO*: [ & {'}\ntrain: {learning_rate: 1e-3}\n"
    (tmp_path / "a.yaml").write_text(text + "data: {path: [a*.txt, 'b&c']}\n")
    found = parsing.parse_config(["--config", str(tmp_path / "a.yaml")], {})
    assert found.log.run == "2026-11-24" and found.log.sample_prompt == "*ROMEO*: [ & {"
    assert found.train.learning_rate == 1e-3 and found.data.paths == ["a*.txt", "b&c"]


def test_a_configuration_that_is_a_device_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--config", "/dev/zero"]) == 2
    assert "zero is no regular file" in capsys.readouterr().err
