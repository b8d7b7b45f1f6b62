"""One decoder for every text from outside: marks, encodings, line ends, surrogates, nulls, packed files."""

from __future__ import annotations

import codecs
import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from hvdlm.config import Config, DataConfig, LogConfig
from hvdlm.configuration import parsing
from hvdlm.errors import HvdlmError
from hvdlm.io import text_decoding, untrusted_input
from hvdlm_corpora import preparation, sources
from hvdlm_corpora.documents import Form
from hvdlm_inference import generation
from hvdlm_tasks import pairs, recordings
from launching import run_python
from record_files import PACKERS

TEXT = "To be,\nor not to be: 红楼梦 🙂\n"
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-16-le", "utf-32", "utf-32-be", "utf-32-le")
MARKS = {"utf-16-be": codecs.BOM_UTF16_BE, "utf-16-le": codecs.BOM_UTF16_LE, "utf-32-be": codecs.BOM_UTF32_BE}
MARKS["utf-32-le"] = codecs.BOM_UTF32_LE


def encoded(text: str, encoding: str) -> bytes:
    """Return ``text`` with the mark of its encoding."""
    return MARKS.get(encoding, b"") + text.encode(encoding)


def read(path: Path, **form: Any) -> str:
    return "".join(sources.texts([str(path)], Form(**form)))


def read_config(path: Path) -> str:
    return str(parsing.read_yaml(path)["text"])


def write_config(text: str) -> str:
    return f"text: {json.dumps(text, ensure_ascii=False)}\n"


def write_record(text: str) -> str:
    return json.dumps({"text": text}, ensure_ascii=False) + "\n"


def read_pairs(path: Path) -> str:
    return "".join(f"{line}\n" for line in pairs.read_texts([str(path), str(path)], "data.path").source)


def read_json(path: Path) -> str:
    return str(untrusted_input.read_json(path, 1000)["text"])


READERS: dict[str, tuple[str, Callable[[str], str], Callable[[Path], str]]] = {
    "text": ("a.txt", str, read),
    "JSON lines": ("a.jsonl", write_record, lambda path: read(path, separator="")),
    "CSV": ("a.csv", lambda text: f'text\n"{text}"\n', lambda path: read(path, separator="")),
    "translation": ("a.de", str, read_pairs),
    "prompt": ("prompt", str, generation.read_prompt),
    "configuration": ("a.yaml", write_config, read_config),
    "JSON": ("a.json", write_record, read_json),
}


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("name, write, reader", READERS.values(), ids=list(READERS))
def test_every_reader_accepts_every_mark(
    name: str, write: Callable[[str], str], reader: Callable[[Path], str], encoding: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(encoded(write(TEXT), encoding))
    assert reader(tmp_path / name) == TEXT


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
@pytest.mark.parametrize("name", ["text", "translation", "prompt", "CSV"])
def test_line_ends_of_other_systems_are_plain(name: str, encoding: str, tmp_path: Path) -> None:
    file, write, reader = READERS[name]
    (tmp_path / file).write_bytes(write(TEXT).replace("\n", "\r\n").encode(encoding))
    assert reader(tmp_path / file) == TEXT


@pytest.mark.parametrize("size", [1, 2, 3, 5, 1000])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_decoding_does_not_depend_on_the_chunks(encoding: str, size: int) -> None:
    data = encoded("\r\r\n" + TEXT.replace("\n", "\r\n") + "\r", encoding)
    chunks = [data[i : i + size] for i in range(0, len(data), size)]
    assert b"".join(text_decoding.as_utf8(chunks)).decode() == "\r\n" + TEXT + "\r"


def test_a_mark_inside_of_a_text_is_kept(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a\ufeffb", encoding="utf-8-sig")
    assert read(tmp_path / "a.txt") == "a\ufeffb"


def test_lone_surrogates_become_replacement_characters(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "hi \\ud83d"}\n{"text": "\\ud83d\\ude42"}\n')
    config = DataConfig(path=str(tmp_path / "a.jsonl"), tokenizer="byte", cache=str(tmp_path / "cache"))
    data = preparation.prepare(config)
    assert data.tokenizer.decode([*data.train[:].tolist(), *data.validation[:].tolist()]) == "hi \ufffd\n🙂\n"


def test_transcripts_are_decoded_like_texts(tmp_path: Path, wav: Callable[[Path], None]) -> None:
    wav(tmp_path / "a.wav")
    lines = '{"audio": "a.wav", "text": "one"}\r\n{"audio": "a.wav", "text": "a\u2028b"}\r\n'
    (tmp_path / "list.jsonl").write_bytes(encoded(lines, "utf-8-sig"))
    items = recordings.read_recordings([str(tmp_path / "list.jsonl")], "data.path").items
    assert [item.text for item in items] == ["one", "a\u2028b"]


@pytest.fixture
def wav() -> Callable[[Path], None]:
    import wave

    def write(path: Path) -> None:
        with wave.open(str(path), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(8000)
            file.writeframes(bytes(16000))

    return write


BAD_TEXTS: dict[str, tuple[str, bytes, str]] = {
    "a binary file": ("a.txt", b"text\0\1\2", "is not text: it holds NUL bytes, as binary files do"),
    "half a character": ("a.txt", codecs.BOM_UTF16_LE + b"a\0b", "is not text: .*truncated data"),
    "another encoding": ("a.txt", "é".encode("latin-1"), "byte 0 is not UTF-8: convert it"),
    "another encoding of CSV": ("a.csv", "text\né\n".encode("latin-1"), "line 2 is not CSV in UTF-8"),
    "an image": ("a.jsonl", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "is not text: it holds NUL bytes"),
}


@pytest.mark.parametrize("name, content, words", BAD_TEXTS.values(), ids=list(BAD_TEXTS))
def test_what_is_not_text_is_refused(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(HvdlmError, match=words):
        read(tmp_path / name)


# Records


def test_a_long_table_of_numbers_in_a_string_is_read(tmp_path: Path) -> None:
    table = "[1,2],{3:4}," * 15_000 + '\\"\\\\' + "x"
    (tmp_path / "a.jsonl").write_text('{"text": "' + table + '"}\n')
    assert read(tmp_path / "a.jsonl", separator="") == table.replace("\\\\", "\\").replace('\\"', '"')
    (tmp_path / "b.jsonl").write_text('{"text": "a", "n": [' + "1," * 1_000_000 + "1]}\n")
    with pytest.raises(HvdlmError, match="holds too many small values"):
        read(tmp_path / "b.jsonl")


@pytest.mark.parametrize("record", ['{"text": null}', '{"other": 1}'])
def test_one_record_without_a_text_is_left_out(record: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"text": "{i}"}}\n' if i != 50 else record + "\n" for i in range(100)))
    preparation.prepare(DataConfig(path=str(path), tokenizer="byte", cache=str(tmp_path / "cache")))
    assert f"{path}: 1 records without text are left out" in capsys.readouterr().err
    assert read(path, separator=" ").split() == [str(i) for i in range(100) if i != 50]


def test_json_and_csv_files_are_records_not_text(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"text": "a]\\"["}, {"n": [1, {}], "text": "b"}]\n')
    (tmp_path / "c4-train.00000-of-01024.json.gz").write_bytes(gzip.compress(b'{"text": "c"}\n{"text": "d"}\n'))
    (tmp_path / "e.csv").write_text('id,text\n1,"e, ""f"""\n')
    (tmp_path / "g.tsv").write_text("text\tid\ng h\t1\n")
    assert [read(path) for path in sorted(tmp_path.iterdir())] == ['a]"[\nb\n', "c\nd\n", 'e, "f"\n', "g h\n"]


# Packed files


@pytest.mark.parametrize("suffix", PACKERS)
def test_packed_files_are_read(suffix: str, tmp_path: Path) -> None:
    pack = PACKERS[suffix]
    (tmp_path / f"a.txt{suffix}").write_bytes(pack(TEXT.encode()) + pack(b"second"))  # two members
    (tmp_path / f"b.JSONL{suffix.upper()}").write_bytes(pack(write_record("third").encode()))
    assert read(tmp_path) == TEXT + "second" + "third\n"
    (tmp_path / f"a.txt{suffix}").write_bytes(pack(TEXT.encode())[:-6])
    with pytest.raises(HvdlmError, match="can't be "):
        read(tmp_path)


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz"])
def test_bytes_after_a_packed_text_are_left_out(
    suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(PACKERS[suffix](TEXT.encode()) + b"\0" * 512)  # padding of a tape
    config = DataConfig(path=str(path), tokenizer="byte", cache=str(tmp_path / "cache"))
    assert read(path) == TEXT
    preparation.prepare(config)
    assert capsys.readouterr().err == ""
    path.write_bytes(PACKERS[suffix](TEXT.encode()) + b"\0\0signature")
    preparation.prepare(config)
    assert "the bytes after the end of its packed content are left out" in capsys.readouterr().err
    assert read(path) == TEXT


# Names and options that are not UTF-8


def test_options_that_are_not_utf_8_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    config = DataConfig(
        path=str(tmp_path), tokenizer="byte", cache=str(tmp_path / "cache"), separator=os.fsdecode(b"\xe9")
    )
    data = preparation.prepare(config)
    tokens = [*data.train[:].tolist(), *data.validation[:].tolist()]
    assert data.tokenizer.decode(tokens) == "a\ufffdb\ufffd"
    prompt = generation.encode(data.tokenizer, os.fsdecode(b"caf\xe9"), Config())
    assert data.tokenizer.decode(prompt.tolist()) == "caf\ufffd"


def test_names_that_are_not_utf_8_survive_config_yaml(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(Config(log=LogConfig(run=name)).to_dict()))
    assert parsing.parse_config(["--config", str(tmp_path / "config.yaml")]).log.run == name


def test_names_that_are_not_utf_8_are_read_back(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)
    with open(folder + b"/a.txt", "w") as file:
        file.write(TEXT * 50)
    run = os.fsdecode(folder + b"/run")
    sizes = ["--model.layers", "1", "--model.width", "16", "--model.heads", "2", "--data.context", "8"]
    options = ["--data.path", os.fsdecode(folder + b"/a.txt"), "--log.run", run, "--train.steps", "2", *sizes]
    first = run_python(["-m", "hvdlm", *options, "--data.cache", str(tmp_path / "cache")])
    assert first.returncode == 0, first.stderr
    again = run_python(["-m", "hvdlm", "generate", "--run", run, "--tokens", "3"])
    assert again.returncode == 0 and again.stdout, again.stderr
