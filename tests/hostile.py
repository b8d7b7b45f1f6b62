"""The readers of what others may have written, each as a target: hand it bytes, it returns or raises HvdlmError."""

from __future__ import annotations

import hashlib
import json
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from safetensors.numpy import save as to_bytes

from hvdlm.checkpoints.manifest import FORMAT, read_manifest
from hvdlm.checkpoints.shards import Reader, Stored, from_json, to_json
from hvdlm.config import Config
from hvdlm.configuration import parsing, schema
from hvdlm.data import prepare_progress, token_files, tokenizers
from hvdlm.errors import HvdlmError
from hvdlm.io import untrusted_input
from hvdlm.parallel.flat_layout import whole

CORPUS = Path(__file__).parent / "fuzz_corpus"
SECONDS = 2.0
TEXT = "To be, or not to be:\nthat is the question. 红楼梦 🙂 é\n"
SETTLED = 2**18  # bytes of Python's own: caches, tables of codecs and expressions

ARRAYS = {
    "model.safetensors": {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros((0, 2), np.int64)},
    "optimizer-0000.safetensors": {"optimizer/m/w": np.ones(4, np.float32)},
    "optimizer-0001.safetensors": {"optimizer/m/w": np.ones(2, np.float32)},
    "rank-0000.safetensors": {"exchange/error": np.ones(2, np.float16)},
}


@dataclass(frozen=True)
class Target:
    """One reader.

    Attributes:
        read: hands bytes to it, with a folder to write them to.
        seeds: returns what it takes.
        words: what its format is made of.
        slack: bytes that it may take beside ``untrusted.FACTOR`` times those it is given.
    """

    read: Callable[[bytes, Path], Any]
    seeds: Callable[[], list[bytes]]
    words: tuple[str, ...] = ()
    slack: int = untrusted_input.SLACK


def entry(data: bytes) -> dict[str, Any]:
    """Return a manifest's entry of a file."""
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def manifest() -> dict[str, Any]:
    """Return a checkpoint's manifest: a tensor whole, an empty one, one in two flat slices."""
    flat = [{"shape": [2, 3], "start": [0, 0], "extent": [2, 3], "flat": f, "dtype": "F32"} for f in ([0, 4], [4, 6])]
    optimizer = [{"file": f"optimizer-000{i}.safetensors", **cut} for i, cut in enumerate(flat)]
    model = {name: to_json(array, whole(array.shape)) for name, array in ARRAYS["model.safetensors"].items()}
    tensors = {f"parameters/{name}": [{"file": "model.safetensors", **cut}] for name, cut in model.items()}
    files = {name: entry(to_bytes(arrays)) for name, arrays in ARRAYS.items()}
    more = {"mesh": [1, 1, 2], "metrics": {"val_loss": 1.5}, "cursor": {"batch": 5}, "config": {"train": {"steps": 9}}}
    meta = {"format": FORMAT, "step": 5, "world_size": 2, "tokenizer": "t", "vocab": 3, "versions": {"numpy": "2"}}
    return {**meta, **more, "files": files, "tensors": tensors | {"optimizer/m/w": optimizer}}


_TENSORS = from_json(manifest()["tensors"], manifest()["files"])


def _checkpoint(folder: Path) -> Path:
    path = folder / "step-00000005"
    if not path.is_dir():
        path.mkdir()
        for name, arrays in ARRAYS.items():
            (path / name).write_bytes(to_bytes(arrays))
    return path


def read_a_manifest(data: bytes, folder: Path) -> None:
    """Read ``data`` as the manifest of a whole checkpoint, and all that it names."""
    path = _checkpoint(folder)
    (path / "manifest.json").write_bytes(data)
    found, tensors = read_manifest(path)
    reader = Reader(path, found["files"], tensors)
    for name, stored in tensors.items():
        _read_any(reader, name, stored)
    for name in found["files"]:
        _attempt(lambda name=name: reader.all(name))


def _read_any(reader: Reader, name: str, stored: list[Stored]) -> None:
    shape = stored[0].shard.shape
    for wanted in (whole(shape), stored[-1].shard):
        _attempt(lambda wanted=wanted: reader.shard(name, wanted))
        _attempt(lambda wanted=wanted: reader.covered(name, wanted))


def _attempt(action: Callable[[], Any]) -> None:
    try:
        action()
    except HvdlmError:
        pass


def read_a_shard(data: bytes, folder: Path) -> None:
    """Read ``data`` as the file of parameters, and as a rank's own, of a checkpoint whose manifest has its hash."""
    model, own = "model.safetensors", "rank-0000.safetensors"
    for name in (model, own):
        (folder / name).write_bytes(data)
    tensors = {name: stored for name, stored in _TENSORS.items() if stored[0].file == model}
    reader = Reader(folder, dict.fromkeys((model, own), entry(data)), tensors)
    for name, stored in tensors.items():
        _read_any(reader, name, stored)
    _attempt(lambda: reader.all(own))


def read_a_header(data: bytes, folder: Path) -> None:
    """Read ``data`` as the header of a folder of 40 tokens."""
    path = folder / "tokens"
    if not path.is_dir():
        path.mkdir()
        (path / "tokens.bin").write_bytes(np.arange(40, dtype="<u2").tobytes())
        (path / "tokenizer.json").write_text(json.dumps({"kind": "byte"}))
    (path / "header.json").write_bytes(data)
    found = token_files.open_tokens(path)
    assert len(found.train) + len(found.validation) in (20, 40)


def read_a_journal(data: bytes, folder: Path) -> None:
    """Read ``data`` as the journal of a prepare that was killed after two pieces of 40 tokens together."""
    found = prepare_progress.Journal(folder / "name", "i", 2)
    place = prepare_progress.partial(folder / "name")
    found.tokens.mkdir(parents=True, exist_ok=True)
    (found.tokens / "tokens.bin").write_bytes(np.arange(40, dtype="<u2").tobytes())
    (found.tokens / "tokenizer.json").write_text(json.dumps({"kind": "byte"}))
    (place / "places.bin").write_bytes(np.array([[0, 20, 20], [1, 40, 40]], "<u8").tobytes())
    (place / "journal.json").write_bytes(data)
    if found.find() is None:
        assert not place.exists() and found.state == prepare_progress.State()
    else:
        counts = (found.state.source, found.state.shards, found.state.tokens)
        assert counts in ((0, 0, 0), (0, 1, 20), (1, 2, 40)) and len(found.state.digests) == found.state.source


def read_a_tokenizer(data: bytes, folder: Path) -> None:
    """Read ``data`` as a folder's tokenizer.json and as one of Hugging Face; write and read text with it."""
    path = folder / "tokenizer.json"
    path.write_bytes(data)
    for read in (_ours, lambda path: tokenizers.train(str(path), None, [])):
        _attempt(lambda read=read: _use(read(path)))


def _ours(path: Path) -> tokenizers.Tokenizer:
    try:
        value = untrusted_input.read_json(path, tokenizers.LIMIT, slack=tokenizers.SLACK)
    except ValueError as error:
        raise HvdlmError(str(error)) from error
    return tokenizers.from_json(value)


def _use(tokenizer: tokenizers.Tokenizer) -> None:
    ids = tokenizer.encode(TEXT)
    assert ids.dtype == np.int32 and ids.max(initial=-1) < tokenizer.vocab and ids.min(initial=0) >= 0
    tokenizer.decode(ids.tolist())


def read_a_configuration(data: bytes, folder: Path) -> None:
    """Read ``data`` as --config, and look at its sections and options."""
    path = folder / "config.yaml"
    path.write_bytes(data)
    schema.check_mapping(parsing.read_yaml(path), _KNOWN, "--config")


_KNOWN = {k: v for k, v in schema.types_of({"": Config}).items() if k != "plugin_options"}


def _header() -> dict[str, Any]:
    return {
        "format": token_files.FORMAT,
        "dtype": "uint16",
        "train": 30,
        "validation": 10,
        "validation_bytes": 10,
        "tokenizer": tokenizers.ByteTokenizer().hash,
        "sources": {"a.txt": "0" * 64},
    }


def _journal() -> dict[str, Any]:
    state = {"source": 1, "offset": 20, "number": 3, "pieces": 2, "tokens": 40, "bytes": 40, "digests": ["0" * 64]}
    return {"format": "hvdlm-prepare-1", "identity": "i", "tokenizer": tokenizers.ByteTokenizer().hash, **state}


def _shards() -> list[bytes]:
    bare = to_bytes({"w": np.ones(1, np.float32)}, {"format": "hvdlm"})
    return [*(to_bytes(arrays) for arrays in ARRAYS.values()), bare]


def _descriptions() -> list[bytes]:
    trained = [tokenizers.train(name, 260, [TEXT]).to_json() for name in ("byte", "char", "word", "bpe")]
    own = [described(model=model) for model in _MODELS]
    return [json.dumps(value).encode() for value in (*trained, trained[-1]["description"])] + [o.encode() for o in own]


def described(**changes: Any) -> str:
    """Return a small tokenizer.json of Hugging Face, with parts of it exchanged."""
    rest = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [_ADDED]}
    return json.dumps({**rest, **_PARTS, "model": _MODELS[0], **changes})


_ADDED = {"id": 3, "content": "<s>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
          "special": True}  # fmt: skip
_PARTS: dict[str, Any] = {
    "normalizer": {
        "type": "Sequence",
        "normalizers": [
            {"type": "NFKC"},
            {"type": "Prepend", "prepend": "_"},
            {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "_"},
        ],
    },
    "pre_tokenizer": {"type": "Split", "pattern": {"String": " "}, "behavior": "Isolated", "invert": False},
    "post_processor": None,
    "decoder": {"type": "Fuse"},
}
_MODELS: list[dict[str, Any]] = [
    {"type": "BPE", "dropout": None, "unk_token": "u", "continuing_subword_prefix": None, "end_of_word_suffix": None,
     "fuse_unk": True, "byte_fallback": True, "vocab": {"u": 0, "a": 1, "b": 2, "ab": 4}, "merges": [["a", "b"]]},
    {"type": "Unigram", "unk_id": 0, "vocab": [["u", 0.0], ["a", -1.5], ["b", -2.5]], "byte_fallback": False},
    {"type": "WordLevel", "unk_token": "u", "vocab": {"u": 0, "To": 1}},
    {"type": "WordPiece", "unk_token": "u", "continuing_subword_prefix": "##", "max_input_chars_per_word": 9,
     "vocab": {"u": 0, "##e": 1, "t": 2}},
]  # fmt: skip


def _configurations() -> list[bytes]:
    examples = sorted((CORPUS.parent.parent / "examples").glob("*.yaml"))
    odd = [
        "a: &a [1, 2]\nb: *a\n",
        "model: {layers: !!int '3'}\n? [a]\n: b\n",
        "train: {steps: 2026-01-01}\n",
        "- <<: {}",
    ]
    return [*(path.read_bytes() for path in examples), *(text.encode() for text in odd)]


ODD: list[Any] = [
    *(None, True, -1, 0, 1, 3, 2**31, 2**53, 2**63, 10**400, 0.5, 1e308, float("nan"), float("inf"), [], {}),
    *("", "a", "../x", "/etc/passwd", "model.safetensors", "\ud800", "\x1b[2J", "a" * 999, "F64", "BF16", "0" * 64),
    *([0], [1, 2, 3], [10**9, 10**9], [2**62, 0, 2**62], [1] * 99, [[[[[]]]]], {"a": {"b": []}}),
]


def edited(value: Any, random: Random) -> Any:
    """Return JSON ``value`` with one part of it left out, doubled, or exchanged for something odd."""
    if not isinstance(value, dict | list) or not value or random.random() < 0.1:
        return random.choice(ODD)
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key = random.choice(keys)
    changed = dict(value) if isinstance(value, dict) else list(value)
    what = random.random()
    if what < 0.1:
        del changed[key]
    elif what < 0.2 and isinstance(changed, list):
        changed.append(changed[key])
    elif what < 0.3 and isinstance(changed, dict):
        changed[random.choice([str(odd) for odd in ODD])] = changed[random.choice(list(value))]
    else:
        changed[key] = edited(changed[key], random)
    return changed


def mutated(name: str, data: bytes, random: Random) -> bytes:
    """Return input ``data`` of target ``name`` with one to three parts of its JSON changed; as it is if it has none."""
    length = int.from_bytes(data[:8], "little") if name == "shard" else 0
    text, rest = (data[8 : 8 + length], data[8 + length :]) if name == "shard" else (data, b"")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return data
    for _ in range(random.randint(1, 3)):
        value = edited(value, random)
    text = json.dumps(value).encode()
    if name != "shard":
        return text
    text += b" " * (-len(text) % 8)
    size = len(text) if random.random() < 0.9 else random.choice([0, 1, len(text) - 1, len(data), 2**31, 2**63])
    return size.to_bytes(8, "little") + text + rest


_CUT = ("dtype", "shape", "start", "extent", "flat", "file", "F32", "I64", "null", "true", "-1", "1e999", "NaN")
TARGETS: dict[str, Target] = {
    "manifest": Target(
        read_a_manifest,
        lambda: [json.dumps(manifest(), indent=indent).encode() for indent in (None, 1)],
        (*_CUT, *manifest(), "parameters/", "optimizer/", "carry/", ".safetensors", "18446744073709551615", "\\ud800"),
    ),
    "shard": Target(
        read_a_shard, _shards, ("dtype", "shape", "data_offsets", "__metadata__", "BF16", "F8_E4M3", "BOOL", "I64")
    ),
    "header": Target(read_a_header, lambda: [json.dumps(_header(), indent=1).encode()], (*_CUT, *_header(), "uint32")),
    "journal": Target(read_a_journal, lambda: [json.dumps(_journal()).encode()], (*_CUT, *_journal())),
    "tokenizer": Target(
        read_a_tokenizer,
        _descriptions,
        ("kind", "char", "characters", "words", "bpe", "description", *_ADDED, *_PARTS, *_MODELS[0], *_MODELS[1],
         "Replace", "Regex", "String", "Precompiled", "precompiled_charsmap", "Metaspace", "ByteLevel", "Sequence",
         "TemplateProcessing", "Unigram", "WordPiece", "WordLevel", "4294967295", "\\ud800"),
        tokenizers.SLACK,
    ),
    "yaml": Target(
        read_a_configuration,
        _configurations,
        ("&a ", "*a", "<<", "!!int", "!!binary", "? ", "- ", ": ", "|", ">", "%YAML 1.1", "---", "1:60", "0b", ".inf"),
    ),
}  # fmt: skip


def check(target: Target, data: bytes, folder: Path) -> None:
    """Hand ``data`` to a target.

    Raises:
        AssertionError: it took too long, or too much memory. Anything else but HvdlmError: it stumbled.
    """
    tracing = tracemalloc.is_tracing()
    if not tracing:
        tracemalloc.start()
    tracemalloc.reset_peak()
    before, began = tracemalloc.get_traced_memory()[0], time.thread_time()
    try:
        target.read(data, folder)
    except HvdlmError as error:
        assert str(error).isprintable() and len(str(error)) < 600, repr(error)
    finally:
        seconds, peak = time.thread_time() - began, tracemalloc.get_traced_memory()[1] - before
        if not tracing:
            tracemalloc.stop()
    assert seconds < SECONDS, f"{len(data)} bytes took {seconds:.1f} s"
    allowed = untrusted_input.FACTOR * len(data) + target.slack + SETTLED
    assert peak <= allowed, f"{len(data)} bytes took {peak} bytes of memory"
