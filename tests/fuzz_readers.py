"""Readers of files beside checkpoints and corpora, for ``fuzz_targets``: an input holds several files.

Each takes the bytes of an input and a folder, and returns how many of its parts could be read.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import tempfile
import wave
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import yaml
from safetensors.numpy import save
from token_writers import write_llama_3, write_llm_c, write_megatron, write_nanogpt

from hvdlm.checkpoints.load import open_checkpoint
from hvdlm.checkpoints.manifest import FORMAT
from hvdlm.checkpoints.shards import to_json
from hvdlm.config import Config, DataConfig, ModelConfig, TrainConfig
from hvdlm.diagnostics.flight_recorder import CALL, FIRST, HEADER, MAGIC, RECORD
from hvdlm.io.terminal import printable
from hvdlm.parallel.flat_layout import whole
from hvdlm.planning.hardware import named_files, read_hardware
from hvdlm.training import preflight
from hvdlm.training.data_cursor import DataCursor
from hvdlm.training.step_guard import StepGuard
from hvdlm_backends.injected_conditions import read_conditions
from hvdlm_diagnosis import diagnosis
from hvdlm_diagnosis.recorder_reader import read_files
from hvdlm_language.gpt import make_gpt
from hvdlm_language.language_model import LanguageModel
from hvdlm_language.rebuild_spec import spec_of
from hvdlm_launchers.run_status import RunStatus, outcome
from hvdlm_report import page, scaling
from hvdlm_tasks.digits import Digits
from hvdlm_tasks.speech import Speech

END = b"\n--8<--\n"
"""Separates the files of an input."""

SECTIONED = ("doctor", "report", "speech", "digits", "tokens")


def split_files(data: bytes, count: int) -> list[bytes]:
    """Return the files of an input; what is missing is empty."""
    split = data.split(END, count - 1)
    return [*split, *[b""] * (count - len(split))]


# The flight recorders, failure files and status of two ranks


def read_a_failed_run(data: bytes, folder: Path) -> int:
    """Read two recordings, an error, a stack and a status as ``doctor`` and ``supervise`` do."""
    run, names = folder / "run", ("rank-0000.recorder", "rank-0001.recorder", "failed-0001.json", "rank-0000.stack")
    *contents, status = split_files(data, 5)
    files = run / "flight_recorder"
    files.mkdir(parents=True, exist_ok=True)
    for name, content in zip(names, contents, strict=True):
        (files / name).write_bytes(content)
    (run / "status.json").write_bytes(status)
    seen = read_files(files)
    state = RunStatus.of(run)
    lines = [diagnosis.report(seen)] if seen.recordings else []
    text = "\n".join([*lines, *diagnosis.explain_refused(seen, 1e9), str(state), str(state.step)])
    assert printable(text) == text and len(text) < 100_000
    assert all(isinstance(word, str) for word in outcome(1, state.status, []))
    return len(seen.recordings) + len(seen.failures) + len(seen.stacks) + bool(state.status)


def recording(rank: int, entries: list[tuple[int, int, str, float]], size: int = 2) -> bytes:
    """Return a recording of ``entries`` (number, index, ranks, when it ended)."""
    header = HEADER.pack(MAGIC, RECORD.size, len(entries), rank, size, 7, 3, 1e9, b"host")
    records = b"".join(_record(*entry) for entry in entries)
    return header.ljust(FIRST, b"\0") + records


def _record(number: int, index: int, ranks: str, ended: float) -> bytes:
    call = CALL.pack(b"all_reduce", b"g", ranks.encode(), b"[1]", b"f4", b"x.py:1")
    return RECORD.pack(number, index, 1, 1e9 - 1, ended, 0, call)


def failed_runs() -> list[bytes]:
    failure = json.dumps({"rank": 1, "message": "RuntimeError: no", "step": 3, "time": 1e9, "own": True}).encode()
    status = json.dumps({"state": "running", "step": 3, "reason": None, "code": None, "time": 1e9}).encode()
    stack = b'MainThread, the innermost call last:\n  File "a.py", line 3, in f\n    g()\n'
    calls = [(i + 1, i, "0-1", 1e9 * (i < 3)) for i in range(4)]
    return [END.join([recording(0, calls), recording(1, calls[:3]), failure, stack, status])]


# The folder of a run, for report


class _Tags(HTMLParser):
    """The tags of a page that could load or run something, and event attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.active: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("img", "iframe", "object", "embed", "base", "form") or any(n.startswith("on") for n, _ in attrs):
            self.active.append(tag)
        if tag == "script" and attrs:
            self.active.append(tag)


_UNDRAWN = re.compile(r'(?i)\b(?:points|[xy][12]?|c[xy]|data-\w+)="[^"]*(?:nan|inf)')
"""A coordinate that is no number."""


def read_a_run_folder(data: bytes, folder: Path) -> int:
    """Write a page about a run whose metrics, summary, configuration, status and sample are in ``data``."""
    run, other = folder / "run", folder / "other"
    for path in (run, other):
        path.mkdir(exist_ok=True)
    (other / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n')
    names = ("metrics.jsonl", "summary.json", "config.yaml", "status.json", "sample.txt")
    for name, content in zip(names, split_files(data, len(names)), strict=True):
        (run / name).write_bytes(content)
    output = folder / "page.html"
    sentences = page.write([run, other], output, 1e-4)
    text = output.read_text(encoding="utf-8")
    assert not _Tags(text).active and text.count("<script") <= 1
    assert not _UNDRAWN.search(text) and all(len(sentence) < 600 for sentence in sentences)
    return 1


def run_folders() -> list[bytes]:
    figures = {"learning_rate": 1e-3, "tokens": 8.0, "tokens_per_second": 9e3, "grad_norm": 1.0, "overlap": None}
    lines = [json.dumps({"step": s, "loss": 3.0 / s, **figures, "comm_bytes": 9000, "comm_share": 0.1}) for s in (1, 2)]
    lines.append(json.dumps({"step": 2, "val_loss": 1.0, "perplexity": 2.7}))
    rank = {"memory": {"parameters": 9, "gradients": 9}, "predicted_memory": {"parameters": 9}}
    summary = {"val_loss": 1.0, "steps": 2, "stopped": None, "framework": "torch", "versions": {"numpy": "2"}}
    summary |= {"traffic": {"gradients/all_reduce": {"calls": 2, "bytes": 9, "seconds": 0.1}}, "ranks": [rank]}
    options = yaml.safe_dump({"model": {"layers": 2}, "train": {"batch_size": 8}, "plugins": []})
    status = json.dumps({"state": "done", "step": 2, "code": 0})
    texts = ["\n".join(lines), json.dumps(summary), options, status, "text"]
    return [END.join(text.encode() for text in texts)]


# What a resumed run takes from a manifest


_MODEL = ModelConfig(layers=1, width=8, heads=2)
_SPEC = make_gpt(_MODEL, 5, 4)


def read_a_manifest_to_resume(data: bytes, folder: Path) -> int:
    """Read ``data`` as the manifest of a small model, and what resume and convert take from it."""
    path = folder / "step-00000005"
    if not path.is_dir():
        path.mkdir()
        (path / "model.safetensors").write_bytes(_weights())
    (path / "manifest.json").write_bytes(data)
    checkpoint = open_checkpoint(path)
    cursor = DataCursor.of(checkpoint.manifest, 8)
    rows = [cursor.advance() for _ in range(3)]
    assert rows == sorted(rows) and cursor.rows < 2**62
    guard = StepGuard(TrainConfig(spike=2.0), False, checkpoint.manifest.get("guard"))
    result = SimpleNamespace(skipped=False, grad_norm=1.0)
    guard.add(result)  # type: ignore[arg-type]
    assert guard.limit >= 0 and np.isfinite(guard.state()["mean_norm"])
    task: Any = SimpleNamespace(tokenizer=SimpleNamespace(hash="t"))
    preflight.check_continuation(checkpoint, task, _SPEC, Config())
    assert {param.name for param in spec_of(checkpoint).params} == {param.name for param in _SPEC.params}
    return 1


def _weights() -> bytes:
    return save({param.name: np.zeros(param.shape, np.float32) for param in _SPEC.params})


def manifests_to_resume() -> list[bytes]:
    from fuzz_targets import file_entry

    config = Config(model=_MODEL)
    config.data.context = 4
    tensors = {
        f"parameters/{param.name}": [
            {"file": "model.safetensors", **to_json(np.zeros(param.shape, np.float32), whole(param.shape))}
        ]
        for param in _SPEC.params
    }
    meta = {
        "format": FORMAT,
        "branch": "0" * 16,
        "sequence": 1,
        "step": 5,
        "world_size": 1,
        "vocab": 5,
        "tokenizer": "t",
        "mesh": [1, 1, 1],
    }
    meta |= {"guard": {"mean_norm": 1.5, "steps": 60}, "metrics": {"step": 5, "val_loss": 1.5}}
    meta |= {"cursor": {"rows": 40, "left_out": [[48, 56]], "batch_size": 8}, "versions": {"numpy": "2"}}
    whole_config = config.to_dict()
    meta["config"] = {name: whole_config[name] for name in ("model", "lora", "data", "train", "plugins")}
    return [json.dumps({**meta, "files": {"model.safetensors": file_entry(_weights())}, "tensors": tensors}).encode()]


# Tasks


def read_speech(data: bytes, folder: Path) -> int:
    """Read a recording and a list of transcripts, and make a batch of each split of them."""
    wav, lines = split_files(data, 2)
    (folder / "a.wav").write_bytes(wav)
    (folder / "list.jsonl").write_bytes(lines)
    config = Config()
    config.data.path, config.data.validation_share, config.train.batch_size = str(folder / "list.jsonl"), 0.5, 2
    task = Speech(config)
    batches = [task.rows(0, 2), *task.validation(0, 1)]
    assert all(np.isfinite(batch.features["frames"]).all() for batch in batches)
    return len(batches)


def speech() -> list[bytes]:
    content = io.BytesIO()
    with wave.open(content, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes((9000 * np.sin(np.arange(400) / 9)).astype("<i2").tobytes())
    lines = "".join(
        json.dumps({"audio": "a.wav", "text": text}) + "\n" for text in ("one two", "two one", "one", "two")
    )
    return [END.join([content.getvalue(), lines.encode()])]


def read_digits(data: bytes, folder: Path) -> int:
    """Read images and labels, each plain or packed, and make a batch of each split of them."""
    for name, content in zip(("images-idx3-ubyte", "labels-idx1-ubyte"), split_files(data, 2), strict=True):
        packed = content[:2] == b"\x1f\x8b"
        (folder / f"train-{name}{'.gz' if packed else ''}").write_bytes(content)
        (folder / f"train-{name}{'' if packed else '.gz'}").unlink(missing_ok=True)
    config = Config()
    config.data.path, config.data.validation_share, config.train.batch_size = str(folder), 0.5, 2
    task = Digits(config)
    batches = [task.rows(0, 2), *task.validation(0, 1)]
    assert all(batch.features["images"].shape[1:] == (28, 28) for batch in batches)
    return len(batches)


def digits() -> list[bytes]:
    images = bytes([0, 0, 8, 3]) + np.array([6, 9, 9], ">u4").tobytes() + bytes(range(243)) + bytes(243)
    labels = bytes([0, 0, 8, 1]) + np.array([6], ">u4").tobytes() + bytes(range(6))
    return [END.join([images, labels]), END.join([gzip.compress(images, mtime=0), labels])]


# Token files of other frameworks


def read_token_files(data: bytes, folder: Path) -> int:
    """Read a token file, with the index of Megatron where there is one, and all of its rows."""
    for path, content in zip((folder / "x.bin", folder / "x.idx"), split_files(data, 2), strict=True):
        path.unlink(missing_ok=True)
        if content or path.suffix == ".bin":
            path.write_bytes(content)
    config = Config(data=DataConfig(path=str(folder / "x.bin"), vocab_size=50, context=4, validation_share=0.5))
    task = LanguageModel(config)
    batches = [task.rows(0, 8), *task.validation(0, 1)]
    assert all(0 <= batch.inputs.min() <= batch.inputs.max() < 50 for batch in batches)
    return len(batches)


def token_files() -> list[bytes]:
    """Return files of nanoGPT, of llm.c and of Megatron-LM."""
    documents = [list(range(20)), [], list(range(30))]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.bin"
        files = [write(path, documents).read_bytes() for write in (write_nanogpt, write_llm_c, write_llama_3)]
        for dtype in (4, 8):
            write_megatron(path, documents, dtype)
            files.append(END.join([path.read_bytes(), path.with_suffix(".idx").read_bytes()]))
        return files


# The planner's files


def read_a_machine(data: bytes, folder: Path) -> int:
    """Read ``data`` as a hardware file of the planner."""
    path = folder / "machine.yaml"
    path.write_bytes(data)
    read_hardware(path)
    return 1


def machines() -> list[bytes]:
    """Return the hardware files that come with hvdlm as JSON, which is YAML, too, and can be mutated by value."""
    return [json.dumps(yaml.safe_load(path.read_text())).encode() for path in named_files().values()]


def read_injected_conditions(data: bytes, folder: Path) -> int:
    """Read ``data`` as the file of slow links and faults of a world of four ranks."""
    path = folder / "conditions.yaml"
    path.write_bytes(data)
    read_conditions(path, 4)
    return 1


def conditions() -> list[bytes]:
    """Return a file of conditions with every kind of entry, as JSON."""
    content: dict[str, Any] = {"ranks_per_node": 2}
    content["links"] = [{"between": "across_nodes", "latency": "50 us", "bandwidth": "1 Gbit/s", "from_step": 2}]
    content["links"] += [{"between": [0, 3], "latency": "1 ms", "to_step": 5}]
    content["slow"] = [{"ranks": [1], "factor": 2.5, "seconds": 0.1}]
    content["late"] = [{"rank": 1, "step": 3, "seconds": 0.5, "collective": 2}]
    content["faults"] = [{"rank": 2, "step": 3, "kind": "hang"}]
    return [json.dumps(content).encode()]


def read_curves(data: bytes, folder: Path) -> int:
    """Read ``data`` as the curves of ``plan --simulate --scaling``, and write their page."""
    path = folder / "scaling.json"
    path.write_bytes(data)
    return len(scaling.write([path], folder / "page.html"))


def curves() -> list[bytes]:
    """Return the curves of two numbers of ranks."""
    row = {"tokens_per_second": 1e4, "efficiency": 1.0, "shares": {"compute": 0.9, "stragglers": 0.1}}
    rows = [{"ranks": 8, **row}, {"ranks": 64, **row, "efficiency": 0.8}]
    return [json.dumps({"kind": "scaling", "name": "a model", "rows": rows}).encode()]
