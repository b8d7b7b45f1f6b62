"""Untrusted files are read, or refused in one sentence: no crash, no hang, and no memory beyond their size."""

from __future__ import annotations

import base64
import gzip
import io
import json
import os
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fuzz_targets
from fuzz_targets import CORPUS, TARGETS, TEXT, huggingface_tokenizer
from hvdlm import cli
from hvdlm.checkpoints import manifest
from hvdlm.config import DataConfig
from hvdlm.configuration import parsing
from hvdlm.data import token_files
from hvdlm.errors import HvdlmError
from hvdlm.io import untrusted_input
from hvdlm_corpora import compression, documents, preparation, sources, tokenizers
from hvdlm_inference import trained_run
from launching import run_python

SEEDS = {name: target.seeds() for name, target in TARGETS.items()}
KEPT = sorted(path for name in TARGETS for path in (CORPUS / name).glob("*"))
FRAGMENTS = (
    *("model", "train", "data", ": ", "\n", "  ", "- ", "&a ", "*a", "<<: ", "!!int ", "!!binary ", "? ", "{", "}"),
    *("[", "]", ",", "'", '"', "|\n", ">\n", "1:60", "0x", "9" * 99, "2026-99-99", "\x00", "\ud7ff", "#", "%YAML"),
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: tmp_path_factory.mktemp(name) for name in TARGETS}


# How many values of every seed can be read: tensors and their last slices, each in two ways; files; tokenizers as
# hvdlm's and as Hugging Face's.
READABLE_COUNTS = {
    "manifest": [13, 13],
    "shard": [8, 0, 0, 1, 0],
    "header": [1, 1],
    "journal": [1],
    "tokenizer": [2, 2, 2, 2, 0, 1, 1, 1, 1, 1],
    "folder": [24, 21, 16, 14],
    "yaml": [1, 1, 1, 1],
    "doctor": [5],
    "report": [1],
    "resume": [1],
    "speech": [2],
    "digits": [2, 2],
    "tokens": [2] * 5,
    "arrow": [1] * 6,
    "parquet": [1] * 8,
    "hardware": [1] * 4,
    "conditions": [1],
    "scaling": [1],
}


@pytest.mark.parametrize("name", TARGETS)
def test_valid_files_are_read_completely(name: str, folders: dict[str, Path]) -> None:
    expected = READABLE_COUNTS[name]
    assert [TARGETS[name].read(data, folders[name]) for data in SEEDS[name][: len(expected)]] == expected


@pytest.mark.parametrize("path", KEPT, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_inputs_found_by_fuzzing_are_handled(path: Path, folders: dict[str, Path]) -> None:
    fuzz_targets.check_input(TARGETS[path.parent.name], path.read_bytes(), folders[path.parent.name])


def test_every_target_has_a_corpus() -> None:
    assert {path.parent.name for path in KEPT} == set(TARGETS)
    assert sum(path.stat().st_size for path in KEPT) < 300_000


@pytest.mark.parametrize("name", sorted(TARGETS.keys() - {"yaml"}))
@given(seed=st.integers(0, 2**32), which=st.integers(0, 99))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_mutated_json_is_read_or_refused(name: str, seed: int, which: int, folders: dict[str, Path]) -> None:
    data = SEEDS[name][which % len(SEEDS[name])]
    fuzz_targets.check_input(TARGETS[name], fuzz_targets.mutate(name, data, Random(seed)), folders[name])


@pytest.mark.parametrize("name", TARGETS)
@given(cut=st.floats(0, 1), noise=st.binary(max_size=30), which=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_files_with_noise_are_read_or_refused(
    name: str, cut: float, noise: bytes, which: int, folders: dict[str, Path]
) -> None:
    data = SEEDS[name][which % len(SEEDS[name])]
    at = int(cut * len(data))
    fuzz_targets.check_input(TARGETS[name], data[:at] + noise + data[at + len(noise) :], folders[name])


@given(st.lists(st.sampled_from(FRAGMENTS), max_size=40).map("".join))
@settings(max_examples=150, deadline=None)
def test_yaml_fragments_are_read_or_refused(folders: dict[str, Path], text: str) -> None:
    fuzz_targets.check_input(TARGETS["yaml"], text.encode(), folders["yaml"])


def test_compiled_readers_stay_within_an_address_limit(tmp_path: Path) -> None:
    """Memory of compiled libraries is not traced: the whole corpus is read again in a small address space."""
    program = """
import resource, sys
from pathlib import Path
import fuzz_targets
folder, used = Path(sys.argv[1]), lambda: int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
for name in ("shard", "tokenizer"):
    target = fuzz_targets.TARGETS[name]
    for data in target.seeds():
        target.read(data, folder)
    resource.setrlimit(resource.RLIMIT_AS, (used() + 2**26, resource.RLIM_INFINITY))
    for path in sorted((fuzz_targets.CORPUS / name).glob("*")):
        fuzz_targets.succeeds(lambda: target.read(path.read_bytes(), folder))
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print("all read")
"""
    variables = {"PYTHONPATH": str(CORPUS.parent), "RUST_BACKTRACE": "0"}
    variables |= {"RAYON_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = run_python(["-c", program, str(tmp_path)], timeout=60, **variables)
    assert done.returncode == 0 and done.stdout == "all read\n", done.stderr[-2000:]


def peak(action: Callable[[], Any]) -> int:
    """Return the peak of memory of ``action``, which may refuse its input."""
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
    "element", ["[],", "{},", "[0],", '{"a":0},', '"ab",', "1.5,", "300,", '["ab","cd"],', '"\U00010000",', '"%d",']
)
def test_json_takes_at_most_ten_times_its_size_in_memory(element: str, tmp_path: Path) -> None:
    text = "[" + "".join(element % i if "%" in element else element for i in range(2_000_000 // len(element))) + "0]"
    (tmp_path / "manifest.json").write_text(text, encoding="utf-8")
    size = (tmp_path / "manifest.json").stat().st_size
    assert peak(lambda: manifest.read_manifest(tmp_path)) <= untrusted_input.FACTOR * size + untrusted_input.SLACK


def test_a_large_models_manifest_is_accepted(tmp_path: Path) -> None:
    """The bound on memory must not refuse 8,000 tensors in 2 MB of JSON."""
    entry = {
        "dtype": "F32",
        "extent": [0, 64],
        "file": "model.safetensors",
        "flat": None,
        "shape": [0, 64],
        "start": [0, 0],
    }
    content = fuzz_targets.manifest()
    content["tensors"] |= {f"parameters/blocks.{i}.weight": [entry] for i in range(8_000)}
    path = fuzz_targets.write_checkpoint_files(tmp_path)
    (path / "manifest.json").write_text(json.dumps(content, indent=1, sort_keys=True))
    size = (path / "manifest.json").stat().st_size
    assert size > 1_500_000
    results: list[Any] = []
    most = peak(lambda: results.append(manifest.read_manifest(path)))
    assert len(results[0][1]) == 8_003 and most <= untrusted_input.FACTOR * size + untrusted_input.SLACK


# Checkpoints


def write_checkpoint(folder: Path, change: Callable[[Any], Any] = lambda content: None) -> Path:
    path = fuzz_targets.write_checkpoint_files(folder)
    content = fuzz_targets.manifest()
    change(content)
    (path / "manifest.json").write_text(json.dumps(content))
    return path


def move_and_link(path: Path, to: Path) -> None:
    """Leave a symbolic link to ``to`` in place of ``path``."""
    path.rename(to)
    path.symlink_to(to)


@pytest.mark.parametrize("name", ["manifest.json", "model.safetensors"])
def test_links_out_of_a_checkpoint_are_refused(name: str, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path)
    move_and_link(path / name, path / "elsewhere")
    manifest.read_manifest(path)
    (path / name).unlink()
    (path / "elsewhere").rename(tmp_path / "outside")
    (path / name).symlink_to("../outside")
    with pytest.raises(HvdlmError, match=rf"{name} is a symbolic link that leads out of its folder\. Resume from"):
        manifest.read_manifest(path)


def test_a_checkpoint_that_is_an_outside_link_is_refused(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "runs" if (tmp_path / "runs").mkdir() is None else tmp_path)
    move_and_link(path, tmp_path / "outside")
    with pytest.raises(HvdlmError, match="step-00000005 is a symbolic link that leads out of its folder"):
        manifest.read_manifest(path)


def test_a_shard_replaced_by_a_link_is_refused(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path)
    content, tensors = manifest.read_manifest(path)
    move_and_link(path / "model.safetensors", tmp_path / "outside")
    reader = fuzz_targets.Reader(path, content["files"], tensors, verified=True)
    with pytest.raises(HvdlmError, match=r"model\.safetensors: .*leads out of its folder"):
        reader.read("parameters/w", fuzz_targets.whole((2, 3)))


def test_a_shard_that_is_a_pipe_is_refused(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, lambda m: m["files"]["model.safetensors"].update(bytes=0))
    (path / "model.safetensors").unlink()
    os.mkfifo(path / "model.safetensors")
    with pytest.raises(HvdlmError, match=r"model\.safetensors is not a regular file"):
        manifest.read_manifest(path)


def change_slice(content: dict[str, Any], **changes: Any) -> None:
    content["tensors"]["parameters/w"][0].update(changes)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda content: content.update(world_size=0), "its world_size is 0"),
        (lambda content: content.update(step=True), "its step is True"),
        (lambda content: content.update(step=10**30), "its step is 1000"),
        (lambda content: content.update(mesh="1"), "its mesh is '1'"),
        (lambda content: content.update(mesh=[0]), r"its mesh\[\] is 0"),
        (lambda content: content.update(metrics=[]), r"its metrics is \[\], expected a mapping"),
        (lambda content: content.update(metrics={"a\n": "b"}), "its metrics.a is 'b'"),
        (lambda content: content.update(cursor=5), "its cursor is 5, expected a mapping"),
        (lambda content: content.update(config=None), "its config is None"),
        (lambda content: content.update(versions={"a": 1}), "its versions.a is 1"),
        (lambda content: content.update(vocab=-1), "its vocab is -1"),
        (
            lambda content: content["files"].update({"mo\u0664del.safetensors": {"bytes": 0, "sha256": ""}}),
            "it names a file",
        ),
        (lambda content: content.update(guard=[1]), r"its guard is \[1\], expected a mapping"),
        (lambda content: content["guard"].update(mean_norm="x"), "its guard.mean_norm is 'x', expected a number"),
        (lambda content: content["guard"].update(mean_norm=float("nan")), "its guard.mean_norm is nan"),
        (lambda content: content["guard"].update(steps=10**400), "its guard.steps is 1000"),
        (lambda content: content["cursor"].update(rows=10**30), "its cursor.rows is 1000"),
        (lambda content: content["cursor"].update(batch_size="x"), "its cursor.batch_size is 'x'"),
        (lambda content: content["cursor"].update(left_out=[[0, 10**18]]), r"its cursor.left_out\[\]\[\] is 1000"),
        (lambda content: content["cursor"].update(left_out=[[1]]), r"its cursor.left_out\[\] is \[1\]"),
        (lambda content: content["cursor"].pop("rows"), "it has no cursor.rows"),
        (lambda content: content.update(base={"weights": 1, "factor": 1}), "its base.weights is 1, expected text"),
        (lambda content: content["files"]["model.safetensors"].update(sha256="ABC"), "it has no SHA-256"),
        (
            lambda content: content["files"]["model.safetensors"].update(bytes="9"),
            "its files.model.safetensors.bytes is '9'",
        ),
        (
            lambda content: content["tensors"].update({"parameters/\x1b[2J": []}),
            r"it names a tensor 'parameters/\\x1b\[2J'",
        ),
        (
            lambda content: change_slice(content, shape=[1] * 99, start=[0] * 99, extent=[1] * 99),
            "larger than any array",
        ),
        (
            lambda content: change_slice(content, shape=[0, 2**60, 2**60], start=[0] * 3, extent=[0] * 3),
            "larger than any array",
        ),
        (
            lambda content: content["tensors"]["parameters/w"].append(content["tensors"]["parameters/w"][0]),
            "too small|contradict",
        ),
    ],
)
def test_malformed_manifests_are_refused(change: Callable[[Any], Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(HvdlmError, match=f"damaged or foreign: .*{words}"):
        manifest.read_manifest(write_checkpoint(tmp_path, change))


def test_false_sizes_in_a_manifest_allocate_no_memory(tmp_path: Path) -> None:
    """Slices of one byte in boxes of a terabyte; and many slices that claim the same bytes of a file."""

    def boxes(content: dict[str, Any]) -> None:
        for entry, flat in zip(content["tensors"]["optimizer/m/w"], ([0, 1], [1, 2]), strict=True):
            entry.update(shape=[2, 2**40], extent=[2, 2**40], flat=flat)

    content, tensors = manifest.read_manifest(path := write_checkpoint(tmp_path, boxes))
    reader = fuzz_targets.Reader(path, content["files"], tensors)
    wanted = fuzz_targets.whole((2, 2**40))
    assert peak(lambda: reader.read("optimizer/m/w", wanted)) < 2**20
    with pytest.raises(HvdlmError, match="a slice of optimizer/m/w is missing"):
        reader.read("optimizer/m/w", wanted)

    def claims(content: dict[str, Any]) -> None:
        entry = content["tensors"]["parameters/w"][0]
        cuts = [{**entry, "shape": [2, 300], "start": [0, 3 * i]} for i in range(100)]
        content["tensors"]["parameters/w"] = cuts

    with pytest.raises(HvdlmError, match=r"model\.safetensors is too small for its slice of parameters/w"):
        manifest.read_manifest(write_checkpoint(tmp_path, claims))


def test_a_rank_file_may_not_hold_parameters(tmp_path: Path) -> None:
    data = fuzz_targets.to_bytes({"parameters/w": np.ones(3, np.float32)})
    (tmp_path / "rank-0000.safetensors").write_bytes(data)
    reader = fuzz_targets.Reader(tmp_path, {"rank-0000.safetensors": fuzz_targets.file_entry(data)}, {})
    with pytest.raises(HvdlmError, match=r"rank-0000\.safetensors holds 'parameters/w'"):
        reader.read_rank_file("rank-0000.safetensors")


@pytest.mark.parametrize("length", [0, 93, 2**31, 2**63, 2**64 - 1])
def test_a_shard_header_longer_than_its_file_is_refused(length: int, tmp_path: Path) -> None:
    data = length.to_bytes(8, "little") + fuzz_targets.to_bytes({"exchange/e": np.ones(3, np.float32)})[8:]
    (tmp_path / "rank-0000.safetensors").write_bytes(data)
    reader = fuzz_targets.Reader(tmp_path, {"rank-0000.safetensors": fuzz_targets.file_entry(data)}, {})
    with pytest.raises(HvdlmError, match=f"its header claims to have {length:,} bytes"):
        reader.read_rank_file("rank-0000.safetensors")


# Tokens and tokenizers


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    (tmp_path / "corpus.txt").write_text(TEXT * 20)
    data = DataConfig(path=str(tmp_path / "corpus.txt"), tokenizer="byte", cache=str(tmp_path / "cache"))
    return preparation.prepare(data, str(tmp_path / "tokens")).folder


@pytest.mark.parametrize("name", ["tokens.bin", "tokenizer.json", "header.json"])
def test_links_out_of_a_token_folder_are_refused(name: str, tokens: Path) -> None:
    move_and_link(tokens / name, tokens.parent / "outside")
    with pytest.raises(HvdlmError, match=f"{name} is a symbolic link that leads out of its folder: delete it"):
        token_files.open_tokens(tokens)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"train": 1e999}, "its train is inf"),
        ({"train": -1}, "its train is -1"),
        ({"train": "30"}, "its train is '30'"),
        ({"validation_bytes": None}, "its validation_bytes is None"),
        ({"dtype": []}, r"\[\] is not a dtype of tokens"),
        ({"sources": {"a": 1}}, "its sources are"),
    ],
)
def test_malformed_token_headers_are_refused(change: dict[str, Any], words: str, tokens: Path) -> None:
    header = json.loads((tokens / "header.json").read_text())
    (tokens / "header.json").write_text(json.dumps(header | change))
    with pytest.raises(HvdlmError, match=f"damaged or foreign: {words}"):
        token_files.open_tokens(tokens)


@pytest.mark.parametrize(
    "value, words",
    [
        ([], "damaged or foreign"),
        ({"kind": "chars"}, "of no known kind: 'chars'"),
        ({"kind": "char", "characters": ""}, "at least one character"),
        ({"kind": "char", "characters": "aba"}, "each once"),
        ({"kind": "char", "characters": "\ud800"}, "surrogates"),
        ({"kind": "word", "words": ["a"]}, "every word once, and <unk>"),
        ({"kind": "word", "words": ["<unk>", "a", "a"]}, "every word once, and <unk>"),
        ({"kind": "word", "words": {"<unk>": 1}}, "of no known kind"),
        ({"kind": "bpe", "description": {}}, "not a Hugging Face tokenizer.json"),
    ],
)
def test_malformed_tokenizers_are_refused(value: Any, words: str) -> None:
    with pytest.raises(HvdlmError, match=words):
        tokenizers.from_json(value)


def test_a_high_code_point_needs_no_large_table() -> None:
    assert peak(lambda: tokenizers.CharTokenizer("\U0010ffff")) < 20_000
    tokenizer = tokenizers.CharTokenizer("\U0010ffffa\U00010000\uffff")
    assert tokenizer.encode("a\U00010000\uffff\U0010ffffa").tolist() == [1, 2, 3, 0, 1]
    for stranger in ("b", "\U00010001", "\ufffe"):
        with pytest.raises(HvdlmError, match="is not among the 4"):
            tokenizer.encode(f"a{stranger}")


def test_truncation_and_padding_settings_are_ignored() -> None:
    """A truncation would cut a corpus short, a padding could fill memory."""
    padding = {"strategy": {"Fixed": 10**6}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
               "pad_type_id": 0, "pad_token": "u"}  # fmt: skip
    truncation = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    tokenizer = tokenizers.BPETokenizer(huggingface_tokenizer(padding=padding, truncation=truncation))
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
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": CHARSMAP}}, "not a Hugging Face|256 times"),
        ({"added_tokens": [], "model": {"type": "WordLevel", "unk_token": "u", "vocab": {"u": 2**32 - 1}}},
         "1 entries and the id 4294967295"),
    ],
)  # fmt: skip
def test_expanding_tokenizers_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(HvdlmError, match=words):
        tokenizers.BPETokenizer(huggingface_tokenizer(**changes))


EXPLODES = {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated", "invert": False}
PREFIXED = {**fuzz_targets._MODELS[0], "continuing_subword_prefix": "#" * 99}


def test_panics_of_the_tokenizer_library_become_errors() -> None:
    with pytest.raises(HvdlmError, match="not a Hugging Face tokenizer"):
        tokenizers.BPETokenizer(huggingface_tokenizer(model=PREFIXED))
    tokenizer = tokenizers.BPETokenizer(huggingface_tokenizer(normalizer=None, pre_tokenizer=EXPLODES))
    with pytest.raises(HvdlmError, match=r"the tokenizer fails \(.*retry-limit.*use another"):
        tokenizer.encode("x" * 99)


def test_a_vocabulary_with_gaps_is_as_large_as_its_highest_id() -> None:
    tokenizer = tokenizers.BPETokenizer(huggingface_tokenizer())
    assert tokenizer.vocab == 5 and tokenizer.encode("ab").max() == 4


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[" * 10**5, b'{"a":' * 10**5, b"{}", b""])
def test_invalid_tokenizer_files_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "t.json").write_bytes(content)
    with pytest.raises(HvdlmError, match=r"Hugging Face tokenizer\.json"):
        tokenizers.train(str(tmp_path / "t.json"), None, [])


# Corpora


def test_a_decompression_bomb_ends_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(b"the same line\n" * 10**6))
    # Far below the size that counts as a bomb.
    assert sum(map(len, sources.raw_chunks(str(path)))) == 14 * 10**6
    monkeypatch.setattr(compression, "FREE", 10**6)
    form, given = documents.Form(max_expansion=100), []
    with pytest.raises(HvdlmError, match=r"unpacks to more than 100 times its size.*raise --data.max_expansion"):
        given += [len(chunk) for chunk in sources.raw_chunks(str(path), form=form)]
    assert sum(given) <= 100 * path.stat().st_size + 2**20


def test_devices_and_pipes_are_refused_as_corpora(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in ("/dev/zero", str(tmp_path / "pipe")):
        with pytest.raises(HvdlmError, match=f"data.path {path}: not a regular file.*--data.path -"):
            sources.expand([path])


def test_failed_spooling_of_standard_input_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    with pytest.raises(HvdlmError, match=r"standard input can't be saved in .*No space left"):
        sources.spool(tmp_path)
    assert not list(tmp_path.iterdir())


# Configurations

LAUGHS = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefghijklm", "bcdefghijklmn", strict=True)
)


@pytest.mark.parametrize(
    "text, words",
    [
        (LAUGHS, r"aliases \(\*a\) are not allowed"),
        ("model: &a {layers: *a}", r"aliases \(\*a\) are not allowed"),
        (f"framework: {json.dumps(LAUGHS)}", r"aliases \(\*a\) are not allowed"),
        ("model: {layers: !!int ''}", r"tags \(.*int\) are not allowed"),
        ("model: {layers: '!!int \"\"'}", r"tags \(.*int\) are not allowed"),
        ("model: !foo {}", "is no valid YAML"),
        ("[" * 10**5, "nests deeper than 32 levels"),
        (f"framework: '{'[' * 10**4}'", "nests deeper than 32 levels"),
        ("plugins: [" + "a, " * 30_000 + "]", "more than 20000 values"),
        ("#" * 300_000, "larger than 262,144 bytes"),
        ("1: 2", "a key is not text: 1"),
        ("model: {layers: " + "9" * 5000 + "}", "is no valid YAML"),
        ("model: {layers: " + "9" * 50 + "}", "neither text nor a number"),
        ("a: !!python/name:os.system", "are not allowed|is no valid YAML"),
        ("\x00", "is no valid YAML"),
    ],
)
def test_invalid_configurations_are_refused(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(text)
    for read in (lambda: parsing.parse_config(["--config", str(tmp_path / "a.yaml")]), lambda: run(tmp_path)):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(HvdlmError, match=words) as caught:
            read()
        assert len(str(caught.value)) < 600


def run(folder: Path) -> None:
    trained_run.run_config(str(folder), [])


def test_unusual_but_valid_configurations_are_accepted(tmp_path: Path) -> None:
    text = "log: {run: 2026-11-24, sample_prompt: '*ROMEO*: [ & {'}\ntrain: {learning_rate: 1e-3}\n"
    (tmp_path / "a.yaml").write_text(text + "data: {path: [a*.txt, 'b&c']}\n")
    config = parsing.parse_config(["--config", str(tmp_path / "a.yaml")])
    assert config.log.run == "2026-11-24" and config.log.sample_prompt == "*ROMEO*: [ & {"
    assert config.train.learning_rate == 1e-3 and config.data.paths == ["a*.txt", "b&c"]


def test_a_device_as_configuration_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--config", "/dev/zero"]) == 2
    assert "zero is not a regular file" in capsys.readouterr().err
