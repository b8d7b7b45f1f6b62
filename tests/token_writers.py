"""Token files as their owners write them: nanoGPT, llm.c and Megatron-LM."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

LLAMA_3 = (20240801, 7, np.uint32)
GPT_2 = (20240520, 1, np.uint16)


def write_nanogpt(path: Path, documents: Sequence[Sequence[int]]) -> Path:
    """Write train.bin or val.bin, and the meta.pkl of ``data/shakespeare_char``; return the path."""
    np.array([number for document in documents for number in document], dtype=np.uint16).tofile(path)
    (path.parent / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 3, "itos": {0: "a"}, "stoi": {"a": 0}}))
    return path


def write_llm_c(path: Path, documents: Sequence[Sequence[int]], kind: tuple[int, int, Any] = GPT_2) -> Path:
    """Write the file that ``write_datafile`` of llm.c writes; return its path."""
    magic, version, dtype = kind
    ids = np.array([number for document in documents for number in document], dtype=dtype)
    header = np.zeros(256, dtype=np.int32)
    header[0], header[1], header[2] = magic, version, len(ids)
    with path.open("wb") as file:
        file.write(header.tobytes())
        file.write(ids.tobytes())
    return path


def write_llama_3(path: Path, documents: Sequence[Sequence[int]]) -> Path:
    """Write llm.c's file for the tokenizer of Llama 3."""
    return write_llm_c(path, documents, LLAMA_3)


def write_megatron(path: Path, documents: Sequence[Sequence[int]], dtype: int = 8, sentences: int = 1) -> Path:
    """Write NAME.bin and NAME.idx as ``IndexedDatasetBuilder`` does; return the path of NAME.bin.

    ``dtype``: the code of Megatron; ``sentences``: sequences that each document is split into.
    """
    kind = {1: np.uint8, 4: np.int32, 5: np.int64, 8: np.uint16}[dtype]
    lengths: list[int] = []
    pointers: list[int] = []
    ends = [0]
    position = 0
    with path.open("wb") as file:
        for document in documents:
            for sentence in np.array_split(np.array(document, kind), sentences):
                file.write(sentence.tobytes(order="C"))
                lengths.append(sentence.size)
                pointers.append(position)
                position += sentence.nbytes
            ends.append(len(lengths))
    with path.with_suffix(".idx").open("wb") as file:
        file.write(b"MMIDIDX\x00\x00")
        file.write(struct.pack("<Q", 1))
        file.write(struct.pack("<B", dtype))
        file.write(struct.pack("<Q", len(lengths)))
        file.write(struct.pack("<Q", len(ends)))
        file.write(np.array(lengths, dtype=np.int32).tobytes(order="C"))
        file.write(np.array(pointers, dtype=np.int64).tobytes(order="C"))
        file.write(np.array(ends, dtype=np.int64).tobytes(order="C"))
    return path


WRITERS: dict[str, Callable[[Path, Sequence[Sequence[int]]], Path]] = {
    "nanogpt": write_nanogpt,
    "llm_c": write_llm_c,
    "llama_3": write_llama_3,
    "megatron": write_megatron,
    "megatron_int32": lambda path, documents: write_megatron(path, documents, 4),
    "megatron_sentences": lambda path, documents: write_megatron(path, documents, 8, 3),
}
