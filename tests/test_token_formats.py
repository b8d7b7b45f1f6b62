"""Token files of nanoGPT, llm.c and Megatron-LM are read as they are, and damaged ones end in one sentence."""

from __future__ import annotations

import os
import pickle
import re
import struct
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_special_tokens import tokenizer_file
from token_writers import WRITERS, write_llama_3, write_llm_c, write_megatron, write_nanogpt

from builders import both_frameworks
from hvdlm import cli
from hvdlm.config import Config, DataConfig
from hvdlm.data.token_files import TokenData
from hvdlm.errors import HvdlmError, RankError
from hvdlm_corpora import mixture, preparation, token_corpus, tokenizers
from hvdlm_corpora.token_formats import read_shard
from hvdlm_language.language_model import LanguageModel
from launching import ONE_LAYER, SMALL

RANDOM = np.random.default_rng(0)
DOCUMENTS = [RANDOM.integers(0, 250, length).tolist() for length in RANDOM.integers(1, 60, 80)]
IDS = [number for document in DOCUMENTS for number in document]


def opened(path: Path | str | list[str], **options: object) -> TokenData:
    """Open token files with 250 ids, unless ``options`` say otherwise."""
    return preparation.prepare(
        DataConfig(path=path if isinstance(path, list) else str(path), **{"vocab_size": 250, **options})
    )  # type: ignore[arg-type]


def ids_of(data: TokenData) -> list[int]:
    """Return all ids of both splits."""
    return [*data.train[:].tolist(), *data.validation[:].tolist()]


@pytest.mark.parametrize("name", WRITERS)
def test_files_of_their_owners_are_read(tmp_path: Path, name: str) -> None:
    path = WRITERS[name](tmp_path / "x.bin", DOCUMENTS)
    data = opened(path)
    assert ids_of(data) == IDS and len(data.train) == int(len(IDS) * 0.9)
    assert data.train[5:9].tolist() == IDS[5:9] and data.validation[-3:].tolist() == IDS[-3:]
    assert data.tokenizer.vocab == 250 and data.validation_bytes == 0
    config = Config(data=DataConfig(path=str(path), vocab_size=250, context=8))
    task = LanguageModel(config)
    batch = task.rows(0, 4)
    windows = {tuple(IDS[start : start + 9]) for start in range(len(IDS) - 8)}
    rows = zip(batch.inputs.tolist(), batch.targets[:, -1].tolist(), strict=True)
    assert all((*row, last) in windows for row, last in rows)
    assert task.vocab == 250


def test_the_validation_split_lies_beside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder, writer, names in (
        ("nanogpt", write_nanogpt, ("train.bin", "val.bin")),
        ("llm.c", write_llm_c, ("tiny_shakespeare_train.bin", "tiny_shakespeare_val.bin")),
        ("megatron", write_megatron, ("wiki_train_text_document.bin", "wiki_valid_text_document.bin")),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "input.txt").write_text("the text of these tokens")
        train, held_out = (tmp_path / folder / name for name in names)
        writer(train, DOCUMENTS[:70])
        writer(held_out, DOCUMENTS[70:])
        capsys.readouterr()
        for path in (train, tmp_path / folder):
            data = opened(path)
            assert len(data.validation) == sum(map(len, DOCUMENTS[70:])) and ids_of(data) == IDS
            assert f"validation split {names[1]}" in capsys.readouterr().err
        assert ids_of(opened(train, validation_path=str(train)))[-len(DOCUMENTS[69]) :] == DOCUMENTS[69]
    assert ids_of(opened(str(train).removesuffix(".bin"))) == ids_of(opened(train.with_suffix(".idx"))) == IDS


def test_a_pickle_beside_is_never_read(tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
            return os.mkdir, (str(tmp_path / "harmed"),)

    write_nanogpt(tmp_path / "train.bin", DOCUMENTS)
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(Harm()))
    assert len(ids_of(opened(tmp_path))) == len(IDS) and not (tmp_path / "harmed").exists()


def test_shards_are_read_as_one_corpus(tmp_path: Path) -> None:
    for number, document in enumerate(DOCUMENTS):
        write_llm_c(tmp_path / f"edu_fineweb_{'val' if number > 75 else 'train'}_{number:06}.bin", [document])
    before = len(os.listdir("/proc/self/fd"))
    data = opened(tmp_path / "edu_fineweb_train_*.bin", validation_path=str(tmp_path / "edu_fineweb_val_*.bin"))
    assert ids_of(data) == IDS == ids_of(opened(tmp_path))
    assert len(os.listdir("/proc/self/fd")) - before < 76
    train = data.train[:].tolist()
    for first, last in [(0, 1), (3, 3), (17, 90), (5, 1000), (len(train) - 2, len(train) + 9), (-4, None)]:
        assert data.train[first:last].tolist() == train[first:last]
    whole = opened([str(path) for path in sorted(tmp_path.glob("*.bin"))])
    assert ids_of(whole) == IDS and len(whole.validation) == len(IDS) - int(0.9 * len(IDS))
    (tmp_path / "edu_fineweb_train_000007.bin").unlink()
    again = opened(tmp_path / "edu_fineweb_train_*.bin")
    os.truncate(tmp_path / "edu_fineweb_train_000008.bin", 1025)
    with pytest.raises(RankError, match=r"000008.bin has been truncated while it was in use: give whole files"):
        again.train[:]


def test_a_tokenizer_decodes_the_ids(tmp_path: Path) -> None:
    path = tokenizer_file(tmp_path / "tokenizer.json")
    tokenizer = tokenizers.train(str(path), None, ())
    text = "To be, or not to be, that is the question. " * 30
    write_nanogpt(tmp_path / "train.bin", [tokenizer.encode(text).tolist()])
    data = opened(tmp_path / "train.bin", tokenizer=str(path), vocab_size=None)
    assert data.tokenizer.hash == tokenizer.hash and data.tokenizer.decode(ids_of(data)) == text


def test_ids_are_texts_of_numbers(tmp_path: Path) -> None:
    tokenizer = tokenizers.train("ids", 300, ())
    assert tokenizer.encode(" 299 0\n7").tolist() == [299, 0, 7] and tokenizer.encode("").dtype == np.int32
    assert tokenizer.decode(np.array([299, 0, 7])) == "299 0 7"  # type: ignore[arg-type]
    again = tokenizers.from_json(tokenizer.to_json())
    assert again.hash == tokenizer.hash != tokenizers.train("ids", 301, ()).hash
    for text in ("300", "-1", "1.5", "a", "٣", "9" * 5000):
        with pytest.raises(HvdlmError, match=r"is no id below 300: without a tokenizer") as error:
            tokenizer.encode(text)
        assert len(str(error.value)) < 400
    with pytest.raises(HvdlmError, match="needs the number of ids"):
        tokenizers.train("ids", None, ())
    with pytest.raises(HvdlmError, match="its vocabulary size is 0"):
        tokenizers.from_json({"kind": "ids", "vocab": 0})


@both_frameworks
def test_models_train_and_generate_ids(tmp_path: Path, framework: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_llm_c(tmp_path / "x.bin", [[1, 2, 3, 4]] * 2000)
    run = ["--log.run", str(tmp_path / "run")]
    options = ["--framework", framework, "--backend", "local", "--data.path", str(tmp_path / "x.bin"), *SMALL]
    train = [*ONE_LAYER, "--data.vocab_size", "6", "--train.steps", "40", "--train.warmup", "0"]
    train += ["--train.learning_rate", "0.01", "--data.context", "16"]
    assert cli.main(["train", *options, *train, *run]) == 0
    capsys.readouterr()
    generate = ["generate", "--run", run[1], "--tokens", "5", "--temperature", "0", "--prompt"]
    assert cli.main([*generate, "3 4 1"]) == 0
    assert capsys.readouterr().out == "3 4 1 2 3 4 1 2\n"
    assert cli.main([*generate, "To be"]) == 2
    assert "'To' is no id below 6: without a tokenizer" in capsys.readouterr().err
    assert cli.main(["evaluate", "--run", run[1]]) == 0
    capsys.readouterr()
    assert cli.main(generate[:-1]) == 0  # as the end of a run advises; a new line is no id
    assert re.fullmatch(r"0( [0-5]){5}\n", capsys.readouterr().out)


def test_the_data_are_identified_by_content(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_nanogpt(tmp_path / folder / "x.bin", DOCUMENTS)
    first, second = opened(tmp_path / "a" / "x.bin"), opened(tmp_path / "b" / "x.bin")
    assert first.fingerprint == second.fingerprint == opened(write_llm_c(tmp_path / "c.bin", DOCUMENTS)).fingerprint
    assert first.fingerprint != opened(tmp_path / "a" / "x.bin", validation_share=0.2).fingerprint
    assert first.fingerprint != opened(tmp_path / "a" / "x.bin", vocab_size=251).fingerprint
    write_nanogpt(tmp_path / "b" / "x.bin", [*DOCUMENTS[:-1], DOCUMENTS[-1][::-1]])
    assert first.fingerprint != opened(tmp_path / "b" / "x.bin").fingerprint


def test_token_files_are_mixed_with_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tokenizer_file(tmp_path / "tokenizer.json")
    write_megatron(tmp_path / "wiki.bin", DOCUMENTS)
    (tmp_path / "b.txt").write_text("To be, or not to be.\n" * 200)
    mixed = DataConfig(mixture={"wiki.bin": 2, "b.txt": 1}, tokenizer=str(path), cache="cache")
    marked = mixture.open_corpora(replace(mixed, document_token=5))  # of the texts alone
    assert marked[0].data.validation[:].tolist()[-1] == 5 and ids_of(marked[1].data) == IDS
    corpora = mixture.open_corpora(mixed)
    assert [corpus.name for corpus in corpora] == ["b", "wiki"] and ids_of(corpora[1].data) == IDS
    assert corpora[0].data.tokenizer.hash == corpora[1].data.tokenizer.hash
    write_nanogpt(tmp_path / "c.bin", DOCUMENTS)
    tokens_only = DataConfig(mixture={"wiki.bin": 2, "c.bin": 1}, vocab_size=250)
    alone = mixture.open_corpora(tokens_only)
    assert [ids_of(corpus.data) for corpus in alone] == [IDS, IDS]
    with pytest.raises(HvdlmError, match=r"data.document_token: c.bin holds tokens"):
        mixture.open_corpora(replace(tokens_only, document_token=5))
    with pytest.raises(HvdlmError, match=r"wiki.bin: token files need the tokenizer that encoded them"):
        mixture.open_corpora(DataConfig(mixture={"wiki.bin": 2, "b.txt": 1}, cache="cache"))
    with pytest.raises(HvdlmError, match=r"wiki.bin holds tokens, b.txt doesn't: mix them"):
        preparation.prepare(DataConfig(path=["b.txt", "wiki.bin"], vocab_size=250))
    with pytest.raises(HvdlmError, match="wiki is prepared already"):
        mixture.prepare(mixed, "out", None)


# Files that can't be used


def written(data: bytes) -> Callable[[Path], object]:
    """Return a function that writes ``data`` as the file of tokens."""
    return lambda path: path.write_bytes(data)


def header(*numbers: int) -> bytes:
    """Return a header of llm.c."""
    return struct.pack(f"<{len(numbers)}i", *numbers) + bytes(4 * (256 - len(numbers)))


def changed_index(offset: int, data: bytes, size: int | None = None) -> Callable[[Path], object]:
    """Return a function that writes Megatron's files with other bytes, or another size, of the index."""

    def harm(path: Path) -> None:
        index = write_megatron(path, [[1, 2, 3], [4, 5], [6]]).with_suffix(".idx")
        content = bytearray(index.read_bytes()[:size])
        content[offset : offset + len(data)] = data
        index.write_bytes(bytes(content))

    return harm


def truncated_megatron(path: Path) -> None:
    """Write Megatron's files of which that with the ids is too short."""
    os.truncate(write_megatron(path, [[1, 2, 3], [4, 5]]), 8)


LENGTHS, POINTERS, ENDS = 34, 34 + 12, 34 + 12 + 24  # of the index of three documents
HARMS: dict[str, tuple[Callable[[Path], object], str]] = {
    "odd size": (written(b"\1\0\2"), "it has 3 bytes, and ids of nanoGPT have 2 each"),
    "large id": (written(struct.pack("<3H", 1, 250, 2)), "it holds the id 250, and the tokenizer has 250 ids"),
    "empty": (written(b""), "training split has 0 tokens"),
    "header alone": (written(header(20240520, 1, 0)[:100]), "its header is truncated"),
    "version": (written(header(20240520, 2, 0)), "20240520 with version 2 is not that of token files"),
    "model": (written(header(20240326, 3, 9) + bytes(90)), "20240326 with version 3 is not that of token files"),
    "count": (written(header(20240520, 1, 9) + bytes(16)), "1040 bytes, its header says 9 ids of 2 bytes"),
    "negative": (written(header(20240801, 7, -1)), "its header says -1 ids"),
    "32 bits": (lambda path: write_llama_3(path, [[1, 70_000]]), "it holds the id 70000"),
    "negative id": (lambda path: write_megatron(path, [[1, -2]], 4), "it holds the id 4294967294"),
    "magic": (changed_index(0, b"X"), "x.idx doesn't begin as an index of Megatron does"),
    "idx version": (changed_index(9, b"\2"), "x.idx is of version 2, not 1"),
    "dtype": (lambda path: write_megatron(path, [[1]], 5), "x.idx has the dtype 5: ids are of uint8"),
    "idx size": (changed_index(18, struct.pack("<Q", 2**60)), "its header says 1152921504606846976 sequences"),
    "short idx": (changed_index(0, b"", 20), "x.idx is truncated"),
    "outside": (changed_index(POINTERS + 16, struct.pack("<q", 2**40)), "sequences don't follow each other"),
    "first": (changed_index(POINTERS, struct.pack("<q", -6)), "sequences don't follow each other"),
    "length": (changed_index(LENGTHS + 8, struct.pack("<i", 9)), "it has 12 bytes, and x.idx describes 28"),
    "below zero": (changed_index(LENGTHS + 8, struct.pack("<i", -9)), "sequences don't follow each other"),
    "documents": (changed_index(ENDS + 8, struct.pack("<q", 7)), "documents don't follow each other"),
    "short": (truncated_megatron, "it has 8 bytes, and x.idx describes 10"),
}


@pytest.mark.parametrize("name", HARMS)
def test_bad_token_files_end_in_one_sentence(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    harm, words = HARMS[name]
    harm(tmp_path / "x.bin")
    options = ["--data.path", str(tmp_path / "x.bin"), "--data.vocab_size", "250", "--log.run", str(tmp_path / "run")]
    assert cli.main(["train", "--backend", "local", *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line and len(line) < 400 + 2 * len(str(tmp_path))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"vocab_size": None}, r"need the tokenizer that encoded them: name its tokenizer.json"),
        ({"tokenizer": "bpe"}, r"need the tokenizer that encoded them, and data.tokenizer bpe is none"),
        ({"tokenizer": "missing.json"}, r"and data.tokenizer missing.json is none"),
        ({"validation_path": "missing.txt"}, r"data.validation_path missing.txt: it names no token files"),
        ({"path": "missing.bin"}, "data.path missing.bin: there is no such file"),
        ({"path": "x.idx"}, "x.bin: it can't be read as a token file .x.idx is truncated"),
        ({"document_token": 0}, "data.document_token: train.bin holds tokens, to which none are added"),
        ({"chat": "messages"}, "data.chat: train.bin holds tokens, of which all are targets: leave it out"),
        ({"prompt": "question"}, "data.prompt: train.bin holds tokens, of which all are targets: leave it out"),
        ({"path": ".", "split": "val"}, "data.split val: of ., which holds token files, train is read"),
    ],
)
def test_options_that_token_files_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, object], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_nanogpt(Path("train.bin"), DOCUMENTS)
    Path("x.idx").write_bytes(b"")
    with pytest.raises(HvdlmError, match=words):
        opened(**{"path": "train.bin", **options})  # type: ignore[arg-type]
    with pytest.raises(HvdlmError, match=r"--output out: data.path train.bin holds tokens already"):
        preparation.prepare(DataConfig(path="train.bin", vocab_size=250), "out")
    assert token_corpus.is_tokens(["train.bin"]) and not token_corpus.is_tokens(["embedded"])


# Large files

TOKENS, LENGTH = 10**10, 5000


def sparse_llm_c(path: Path) -> None:
    """Write the headers of 100 shards, as of FineWeb-10B, and a hole of 200 MB for the ids of each."""
    for number in range(100):
        with path.with_name(f"x_{number:03}.bin").open("wb") as file:
            file.write(header(20240520, 1, TOKENS // 100))
            file.truncate(1024 + 2 * TOKENS // 100)


def sparse_megatron(path: Path) -> None:
    """Write an index of two million documents, and a hole of 20 GB for their ids."""
    count = TOKENS // LENGTH
    with path.with_suffix(".idx").open("wb") as file:
        file.write(b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, count, count + 1))
        file.write(np.full(count, LENGTH, np.int32).tobytes())
        file.write((2 * LENGTH * np.arange(count, dtype=np.int64)).tobytes())
        file.write(np.arange(count + 1, dtype=np.int64).tobytes())
    with path.open("wb") as file:
        file.truncate(2 * TOKENS)


@pytest.mark.parametrize("write", [sparse_llm_c, sparse_megatron])
def test_large_corpora_open_fast_in_little_memory(tmp_path: Path, write: Callable[[Path], None]) -> None:
    write(tmp_path / "x.bin")
    path = str(tmp_path / "x*.bin")
    tracemalloc.start()
    began = time.thread_time()
    task = LanguageModel(Config(data=DataConfig(path=path, vocab_size=50257, context=1024)))
    seconds = time.thread_time() - began
    batches = [task.rows(row, row + 8) for row in range(0, 400, 8)]
    del batches[1:]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(task.data.train) + len(task.data.validation) == TOKENS and batches[0].inputs.shape == (8, 1024)
    assert seconds < 2.5 and peak < 32e6  # about 0.3 s and 6 MB


def test_ids_that_no_check_saw_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a large file some blocks are checked when it is opened, the rest when it is read."""
    monkeypatch.setattr("hvdlm.data.token_files._CHECKED", 100)
    monkeypatch.setattr("hvdlm.data.token_files._BLOCK", 1)
    ids = np.zeros(3000, np.uint32)
    ids[1001:1010] = 2**31 + 5
    path = write_llama_3(tmp_path / "x.bin", [ids.tolist()])
    assert read_shard(path).count == 3000
    task = LanguageModel(Config(data=DataConfig(path=str(path), vocab_size=250, context=8)))
    with pytest.raises(RankError, match=r"holds the id 2147483653, the model has 250 ids: prepare it again, or give"):
        task.rows(0, 400)
