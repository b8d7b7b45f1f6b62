"""The readers of untrusted files as fuzz targets: each reads bytes or raises HvdlmError; their seeds and mutations."""

from __future__ import annotations

import hashlib
import json
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import fuzz_folders
import fuzz_readers
import numpy as np
import pyarrow
import yaml
from pyarrow import parquet
from safetensors.numpy import save as to_bytes

from hvdlm.checkpoints.manifest import FORMAT, read_manifest
from hvdlm.checkpoints.order import sequence_number
from hvdlm.checkpoints.shards import Reader, Stored, from_json, to_json
from hvdlm.config import Config
from hvdlm.configuration import parsing, schema
from hvdlm.data import token_files
from hvdlm.data.tokenizers import ByteTokenizer
from hvdlm.errors import HvdlmError
from hvdlm.io import untrusted_input
from hvdlm.parallel.flat_layout import whole
from hvdlm_corpora import compression, prepare_progress, sources, tokenizers

CORPUS = Path(__file__).parent / "fuzz_corpus"
SECONDS = 2.0
TEXT = "To be, or not to be:\nthat is the question. 红楼梦 🙂 é\n"
INTERPRETER_BYTES = 2**18  # of Python's own caches and tables of codecs and expressions

ARRAYS = {
    "model.safetensors": {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros((0, 2), np.int64)},
    "optimizer-0000.safetensors": {"optimizer/m/w": np.ones(4, np.float32)},
    "optimizer-0001.safetensors": {"optimizer/m/w": np.ones(2, np.float32)},
    "rank-0000.safetensors": {"exchange/error": np.ones(2, np.float16)},
}


@dataclass(frozen=True)
class Target:
    """A reader under test.

    Attributes:
        read: reads bytes, written to a folder; returns how many of the parts that they name could be read.
        seeds: returns valid inputs.
        words: tokens of its format, for the fuzzer's dictionary.
        slack: bytes of memory that it may use beside ``untrusted_input.FACTOR`` times its input.
    """

    read: Callable[[bytes, Path], int]
    seeds: Callable[[], list[bytes]]
    words: tuple[str, ...] = ()
    slack: int = untrusted_input.SLACK


def file_entry(data: bytes) -> dict[str, Any]:
    """Return a manifest's entry for a file."""
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def manifest() -> dict[str, Any]:
    """Return a checkpoint's manifest: a whole tensor, an empty one, and one in two flat slices."""
    flat = [{"shape": [2, 3], "start": [0, 0], "extent": [2, 3], "flat": f, "dtype": "F32"} for f in ([0, 4], [4, 6])]
    optimizer = [{"file": f"optimizer-000{i}.safetensors", **cut} for i, cut in enumerate(flat)]
    model = {name: to_json(array, whole(array.shape)) for name, array in ARRAYS["model.safetensors"].items()}
    tensors = {f"parameters/{name}": [{"file": "model.safetensors", **cut}] for name, cut in model.items()}
    files = {name: file_entry(to_bytes(arrays)) for name, arrays in ARRAYS.items()}
    state: dict[str, Any] = {"mesh": [1, 1, 2], "metrics": {"val_loss": 1.5}, "config": {"train": {"steps": 9}}}
    state |= {"cursor": {"rows": 40, "left_out": [[8, 16]], "batch_size": 8}, "guard": {"mean_norm": 1.5, "steps": 5}}
    meta = {"format": FORMAT, "step": 5, "world_size": 2, "tokenizer": "t", "vocab": 3, "versions": {"numpy": "2"}}
    meta |= {"branch": "0123456789abcdef", "sequence": 7}
    return {**meta, **state, "files": files, "tensors": tensors | {"optimizer/m/w": optimizer}}


_TENSORS = from_json(manifest()["tensors"], manifest()["files"])


def write_checkpoint_files(folder: Path) -> Path:
    path = folder / "step-00000005"
    if not path.is_dir():
        path.mkdir()
        for name, arrays in ARRAYS.items():
            (path / name).write_bytes(to_bytes(arrays))
    return path


def read_a_manifest(data: bytes, folder: Path) -> int:
    """Read ``data`` as the manifest of a complete checkpoint, and all tensors and files that it names."""
    path = write_checkpoint_files(folder)
    (path / "manifest.json").write_bytes(data)
    sequence_number(path)
    content, tensors = read_manifest(path)
    reader = Reader(path, content["files"], tensors)
    count = sum(_read_tensor(reader, name, stored) for name, stored in tensors.items())
    return count + sum(succeeds(lambda name=name: reader.read_rank_file(name)) for name in content["files"])


def _read_tensor(reader: Reader, name: str, stored: list[Stored]) -> int:
    """Return how many reads of a tensor, and of its last slice, succeed."""
    count = 0
    for wanted in (whole(stored[0].shard.shape), stored[-1].shard):
        count += succeeds(lambda wanted=wanted: reader.read(name, wanted))
        count += succeeds(lambda wanted=wanted: reader.read_if_covered(name, wanted))
    return count


def succeeds(action: Callable[[], Any]) -> bool:
    """Return whether ``action`` ends without HvdlmError; any other error is a bug of the reader."""
    try:
        action()
    except HvdlmError:
        return False
    return True


def read_a_shard(data: bytes, folder: Path) -> int:
    """Read ``data`` as the parameters, and as the file of one rank, of a checkpoint whose manifest has its hash."""
    model, rank_file = "model.safetensors", "rank-0000.safetensors"
    for name in (model, rank_file):
        (folder / name).write_bytes(data)
    tensors = {name: stored for name, stored in _TENSORS.items() if stored[0].file == model}
    reader = Reader(folder, dict.fromkeys((model, rank_file), file_entry(data)), tensors)
    count = sum(_read_tensor(reader, name, stored) for name, stored in tensors.items())
    return count + succeeds(lambda: reader.read_rank_file(rank_file))


def read_a_header(data: bytes, folder: Path) -> int:
    """Read ``data`` as the header of a folder of 40 tokens."""
    path = folder / "tokens"
    if not path.is_dir():
        path.mkdir()
        (path / "tokens.bin").write_bytes(np.arange(40, dtype="<u2").tobytes())
        (path / "documents.bin").write_bytes(np.array([0, 20, 30], "<i8").tobytes())
        (path / "tokenizer.json").write_text(json.dumps({"kind": "byte"}))
    (path / "header.json").write_bytes(data)
    tokens = token_files.open_tokens(path)
    assert len(tokens.train) + len(tokens.validation) in (20, 40)
    if tokens.validation_documents is not None:
        assert (tokens.validation_documents[:] >= 0).all()
    return 1


def read_a_journal(data: bytes, folder: Path) -> int:
    """Read ``data`` as the progress of a prepare that was killed after two chunks of 40 tokens together."""
    progress = prepare_progress.Journal(folder / "name", "i", 2)
    partial = prepare_progress.partial(folder / "name")
    progress.tokens.mkdir(parents=True, exist_ok=True)
    (progress.tokens / "tokens.bin").write_bytes(np.arange(40, dtype="<u2").tobytes())
    (progress.tokens / "tokenizer.json").write_text(json.dumps({"kind": "byte"}))
    (progress.tokens / "documents.bin").write_bytes(np.array([0, 20, 30], "<i8").tobytes())
    (partial / "places.bin").write_bytes(np.array([[0, 20, 20, 1], [1, 40, 40, 3]], "<u8").tobytes())
    (partial / "journal.json").write_bytes(data)
    if progress.resume() is None:
        assert not partial.exists() and progress.state == prepare_progress.JournalState()
        return 0
    counts = (progress.state.source, progress.state.pieces, progress.state.tokens, progress.state.documents)
    assert (
        counts in ((0, 0, 0, 0), (0, 1, 20, 1), (1, 2, 40, 3)) and len(progress.state.digests) == progress.state.source
    )
    return 1


def read_a_tokenizer(data: bytes, folder: Path) -> int:
    """Read ``data`` as a folder's tokenizer.json and as one of Hugging Face; write and read text with it."""
    path = folder / "tokenizer.json"
    path.write_bytes(data)
    readers = (_read_own_format, lambda path: tokenizers.train(str(path), None, []))
    return sum(succeeds(lambda read=read: _use(read(path))) for read in readers)


def _read_own_format(path: Path) -> tokenizers.Tokenizer:
    try:
        value = untrusted_input.read_json(path, tokenizers.LIMIT, slack=tokenizers.SLACK)
    except ValueError as error:
        raise HvdlmError(str(error)) from error
    return tokenizers.from_json(value)


def _use(tokenizer: tokenizers.Tokenizer) -> None:
    ids = tokenizer.encode(TEXT)
    assert ids.dtype == np.int32 and ids.max(initial=-1) < tokenizer.vocab and ids.min(initial=0) >= 0
    tokenizer.decode(ids.tolist())
    assert tokenizer.encode_prompt(TEXT).max(initial=-1) < tokenizer.vocab
    assert 0 <= tokenizer.bytes_before(TEXT, len(ids) // 2)


def read_a_configuration(data: bytes, folder: Path) -> int:
    """Read ``data`` as --config, and check the names of its sections and options."""
    path = folder / "config.yaml"
    path.write_bytes(data)
    schema.check_mapping(parsing.read_yaml(path), _KNOWN, "--config")
    return 1


_KNOWN = {k: v for k, v in schema.types_of({"": Config}).items() if k != "plugin_options"}
schema.unknown("a", _KNOWN)  # imports all plugins, once: not counted as memory of a reader


def read_arrow(data: bytes, folder: Path) -> int:
    """Read ``data`` as an Arrow file."""
    return _read_table(data, folder / "a.arrow")


def read_parquet(data: bytes, folder: Path) -> int:
    """Read ``data`` as a Parquet file."""
    return _read_table(data, folder / "a.parquet")


def _read_table(data: bytes, path: Path) -> int:
    """Return how many chunks of text a table has; check the memory that its library allocates, which isn't traced."""
    path.write_bytes(data)
    try:
        with arrow_memory() as pool:
            return sum(1 for _ in sources.text_chunks(str(path)))
    finally:
        allowed = compression.FREE + untrusted_input.FACTOR * len(data)
        assert pool.max_memory() <= allowed, f"{len(data)} bytes took {pool.max_memory()} bytes of memory"


_DEFAULT_POOL = pyarrow.default_memory_pool()
_POOL = pyarrow.proxy_memory_pool(_DEFAULT_POOL)  # it has to outlive its last buffer, which an error may keep


@contextmanager
def arrow_memory() -> Iterator[pyarrow.MemoryPool]:
    """Yield the pool from which pyarrow allocates within the context; it counts the most bytes of all contexts."""
    pyarrow.set_memory_pool(_POOL)
    try:
        yield _POOL
    finally:
        pyarrow.set_memory_pool(_DEFAULT_POOL)


_COLUMNS = [pyarrow.array([TEXT, None, "", TEXT[:9]] * 3), pyarrow.array([TEXT] * 9).dictionary_encode()]


def _arrow_files() -> list[bytes]:
    return [_arrow_file(column, packed) for column in _COLUMNS for packed in (None, "zstd", "lz4")]


def _arrow_file(column: pyarrow.Array, packed: str | None) -> bytes:
    schema, sink = pyarrow.schema({"text": column.type}), pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, schema, options=pyarrow.ipc.IpcWriteOptions(compression=packed)) as stream:
        for _ in range(2):
            stream.write_batch(pyarrow.record_batch([column], schema=schema))
    return sink.getvalue().to_pybytes()


def _parquet_files() -> list[bytes]:
    options: list[dict[str, Any]] = [{}, {"use_dictionary": False, "compression": "none"}, {"compression": "zstd"}]
    options += [{"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}}]
    return [_parquet_file({"data_page_version": version, **one}) for one in options for version in ("1.0", "2.0")]


def _parquet_file(options: dict[str, Any]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.table({"text": _COLUMNS[0]}), sink, row_group_size=8, store_schema=False, **options)
    return sink.getvalue().to_pybytes()


def _header() -> dict[str, Any]:
    return {
        "format": token_files.FORMAT,
        "dtype": "uint16",
        "train": 30,
        "validation": 10,
        "validation_bytes": 10,
        "tokenizer": ByteTokenizer().hash,
        "sources": {"a.txt": "0" * 64},
    }


_INDEXED = {"format": token_files.INDEXED_FORMAT, "documents": 3}


def _journal() -> dict[str, Any]:
    state = {"source": 1, "offset": 20, "number": 3, "pieces": 2, "tokens": 40, "bytes": 40, "digests": ["0" * 64]}
    state["documents"] = 3
    return {"format": "hvdlm-prepare-2", "identity": "i", "tokenizer": ByteTokenizer().hash, **state}


def _shards() -> list[bytes]:
    bare = to_bytes({"w": np.ones(1, np.float32)}, {"format": "hvdlm"})
    return [*(to_bytes(arrays) for arrays in ARRAYS.values()), bare]


def _descriptions() -> list[bytes]:
    trained = [tokenizers.train(name, 260, [TEXT]).to_json() for name in ("byte", "char", "word", "bpe", "ids")]
    foreign = [huggingface_tokenizer(model=model).encode() for model in _MODELS]
    return [json.dumps(value).encode() for value in (*trained, trained[3]["description"])] + foreign


def huggingface_tokenizer(**changes: Any) -> str:
    """Return a small tokenizer.json of Hugging Face with some entries replaced."""
    rest = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [_ADDED]}
    return json.dumps({**rest, **_COMPONENTS, "model": _MODELS[0], **changes})


_ADDED = {"id": 3, "content": "<s>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
          "special": True}  # fmt: skip
_COMPONENTS: dict[str, Any] = {
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


UNUSUAL: list[Any] = [
    *(None, True, -1, 0, 1, 3, 2**31, 2**53, 2**63, 10**400, 0.5, 1e308, float("nan"), float("inf"), [], {}),
    *("", "a", "../x", "/etc/passwd", "model.safetensors", "\ud800", "\x1b[2J", "a" * 999, "F64", "BF16", "0" * 64),
    *([0], [1, 2, 3], [10**9, 10**9], [2**62, 0, 2**62], [1] * 99, [[[[[]]]]], {"a": {"b": []}}),
]


def mutated_value(value: Any, random: Random) -> Any:
    """Return JSON ``value`` with one element left out, doubled, or replaced by an unusual value."""
    if not isinstance(value, dict | list) or not value or random.random() < 0.1:
        return random.choice(UNUSUAL)
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key = random.choice(keys)
    changed = dict(value) if isinstance(value, dict) else list(value)
    chance = random.random()
    if chance < 0.1:
        del changed[key]
    elif chance < 0.2 and isinstance(changed, list):
        changed.append(changed[key])
    elif chance < 0.3 and isinstance(changed, dict):
        changed[random.choice([str(value) for value in UNUSUAL])] = changed[random.choice(list(value))]
    else:
        changed[key] = mutated_value(changed[key], random)
    return changed


def mutate(name: str, data: bytes, random: Random) -> bytes:
    """Return input ``data`` of target ``name`` with one to three changes of its JSON; unchanged if it is no JSON."""
    if name in fuzz_readers.SECTIONED:
        return _mutate_part(data, random)
    length = int.from_bytes(data[:8], "little") if name == "shard" else 0
    text, rest = (data[8 : 8 + length], data[8 + length :]) if name == "shard" else (data, b"")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return data
    for _ in range(random.randint(1, 3)):
        value = mutated_value(value, random)
    text = json.dumps(value).encode()
    if name != "shard":
        return text
    text += b" " * (-len(text) % 8)
    size = len(text) if random.random() < 0.9 else random.choice([0, 1, len(text) - 1, len(data), 2**31, 2**63])
    return size.to_bytes(8, "little") + text + rest


def _mutate_part(data: bytes, random: Random) -> bytes:
    """Return an input of several files with one to three lines of JSON or YAML, or bytes, of one of them changed."""
    files = data.split(fuzz_readers.END)
    index = random.randrange(len(files))
    lines = files[index].split(b"\n") if files[index][:1] in (b"{", b"[") else [files[index]]
    number = random.randrange(len(lines))
    try:
        if len(lines[number]) > 1000:
            raise ValueError("yaml takes quadratic time for deep nesting")
        value = yaml.safe_load(lines[number])
        for _ in range(random.randint(1, 3)):
            value = mutated_value(value, random)
        lines[number] = json.dumps(value).encode()
    except (ValueError, RecursionError, yaml.YAMLError):
        content = bytearray(lines[number])
        for _ in range(random.randint(1, 3)):
            if content:
                content[random.randrange(len(content))] = random.choice([0, 1, 2, 127, 128, 255, random.randrange(256)])
        lines[number] = bytes(content)
    files[index] = b"\n".join(lines)
    return fuzz_readers.END.join(files)


_PAGE = 2**22  # bytes of a page's style and script; of mel filters and of padded images
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
    "header": Target(
        read_a_header,
        lambda: [json.dumps(_header() | more, indent=1).encode() for more in ({}, _INDEXED)],
        (*_CUT, *_header(), "uint32"),
    ),
    "journal": Target(read_a_journal, lambda: [json.dumps(_journal()).encode()], (*_CUT, *_journal())),
    "tokenizer": Target(
        read_a_tokenizer,
        _descriptions,
        ("kind", "char", "characters", "words", "bpe", "description", *_ADDED, *_COMPONENTS, *_MODELS[0], *_MODELS[1],
         "Replace", "Regex", "String", "Precompiled", "precompiled_charsmap", "Metaspace", "ByteLevel", "Sequence",
         "TemplateProcessing", "Unigram", "WordPiece", "WordLevel", "4294967295", "\\ud800"),
        tokenizers.SLACK,
    ),
    "folder": Target(fuzz_folders.read_a_folder, fuzz_folders.seeds, fuzz_folders.WORDS),
    "yaml": Target(
        read_a_configuration,
        _configurations,
        ("&a ", "*a", "<<", "!!int", "!!binary", "? ", "- ", ": ", "|", ">", "%YAML 1.1", "---", "1:60", "0b", ".inf"),
    ),
    "doctor": Target(
        fuzz_readers.read_a_failed_run,
        fuzz_readers.failed_runs,
        ("own", "message", "step", "time", "state", "hvdlmLG1", "0-1", "0-9/2", "all_gather", "\\u001b", "\\ud800"),
        2**24,  # the numbers of the 65,536 ranks that a recording may claim
    ),
    "report": Target(
        fuzz_readers.read_a_run_folder,
        fuzz_readers.run_folders,
        ("step", "loss", "val_loss", "traffic", "ranks", "memory", "versions", "1e308", "-1e308", "1e999", "<b>"),
        _PAGE,
    ),
    "resume": Target(
        fuzz_readers.read_a_manifest_to_resume,
        fuzz_readers.manifests_to_resume,
        (*_CUT, "guard", "cursor", "rows", "left_out", "batch_size", "config", "model", "lora", "layers", "heads"),
    ),
    "speech": Target(
        fuzz_readers.read_speech, fuzz_readers.speech, ("RIFF", "WAVE", "fmt ", "data", "audio", "text"), _PAGE
    ),
    "tokens": Target(fuzz_readers.read_token_files, fuzz_readers.token_files, ("MMIDIDX", "--8<--")),
    "digits": Target(fuzz_readers.read_digits, fuzz_readers.digits, (), _PAGE),
    "hardware": Target(
        fuzz_readers.read_a_machine,
        fuzz_readers.machines,
        ("rates", "links", "latency", "bandwidth", "sharing", "torch", "tensorflow", ".inf", "1e999", "null"),
    ),
    "conditions": Target(
        fuzz_readers.read_injected_conditions,
        fuzz_readers.conditions,
        ("links", "between", "latency", "bandwidth", "Gbit/s", "us", "late", "faults", "kind", "hang", "1e999"),
    ),
    "scaling": Target(
        fuzz_readers.read_curves, fuzz_readers.curves, ("rows", "ranks", "shares", "1e308", "NaN", "<b>"), _PAGE
    ),
    "arrow": Target(read_arrow, _arrow_files, ("text", "ARROW1", "zstd"), compression.FREE),
    "parquet": Target(read_parquet, _parquet_files, ("text", "PAR1", "ARROW:schema"), compression.FREE),
}  # fmt: skip


def check_input(target: Target, data: bytes, folder: Path) -> None:
    """Let a target read ``data`` within its limits of time and memory.

    Raises:
        AssertionError: it took too long, or too much memory, or its error is not one printable sentence. Any other
            error is one that the reader should have turned into HvdlmError.
    """
    allowed = untrusted_input.FACTOR * len(data) + target.slack + INTERPRETER_BYTES
    seconds, peak = _measured(target, data, folder)
    if peak > allowed:  # a table of the interpreter, such as that of interned strings, may have grown
        seconds, peak = _measured(target, data, folder)
    assert seconds < SECONDS, f"{len(data)} bytes took {seconds:.1f} s"
    assert peak <= allowed, f"{len(data)} bytes took {peak} bytes of memory"


def _measured(target: Target, data: bytes, folder: Path) -> tuple[float, int]:
    """Read an input; return the seconds and the bytes of memory, at its peak, that it took."""
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
    return seconds, peak
