"""Special tokens in texts, prompts and generated texts; and texts that a tokenizer's ``decode`` doesn't restore."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from test_huggingface import TEXT, transformers_model

from builders import both_frameworks
from hvdlm import cli
from hvdlm.config import Config, DataConfig
from hvdlm.data.token_files import TokenData
from hvdlm.data.tokenizers import ByteTokenizer
from hvdlm.errors import HvdlmError
from hvdlm_corpora import sources, tokenizers
from hvdlm_corpora.bpe_tokenizer import BPETokenizer
from hvdlm_corpora.preparation import prepare
from hvdlm_inference.generation import Detokenizer, encode
from record_files import WRITERS

SPECIAL = ("<s>", "</s>", "<|endoftext|>", "[PAD]")
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
BOTH, BEGIN = ("<s>", "$A", "</s>"), ("<s>", "$A")


def tokenizer_file(path: Path, template: tuple[str, ...] = (), **changes: Any) -> Path:
    """Write a byte-level tokenizer.json with the tokens ``SPECIAL`` last, whose post-processor has a template."""
    description = BPETokenizer.train([TEXT], 270).to_json()["description"]
    first = len(description["model"]["vocab"])
    ids = {token: first + number for number, token in enumerate(SPECIAL)}
    description["added_tokens"] = [{"id": number, "content": token, **FLAGS} for token, number in ids.items()]
    if template:
        sequence = [
            {"Sequence": {"id": "A", "type_id": 0}} if item == "$A" else {"SpecialToken": {"id": item, "type_id": 0}}
            for item in template
        ]
        tokens = {item: {"id": item, "ids": [ids[item]], "tokens": [item]} for item in template if item != "$A"}
        description["post_processor"] = {"type": "TemplateProcessing", "single": sequence, "pair": sequence * 2}
        description["post_processor"]["special_tokens"] = tokens
    path.write_text(json.dumps(description | changes))
    return path


def loaded(path: Path) -> Any:
    """Return the tokenizer that transformers makes of a tokenizer.json."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_file=str(path))


def prepared(folder: Path, text: str | list[str], tokenizer: Path, workers: int = 1, **options: Any) -> TokenData:
    """Prepare a text, or the records of a list."""
    source = folder / ("t.txt" if isinstance(text, str) else "t.jsonl")
    lines = text if isinstance(text, str) else "".join(json.dumps({"text": record}) + "\n" for record in text)
    source.write_text(lines)
    config = DataConfig(path=str(source), tokenizer=str(tokenizer), cache=str(folder / f"cache-{workers}"), **options)
    return prepare(config, None, workers)


def ids_of(data: TokenData) -> list[int]:
    """Return all ids of a token folder."""
    return [*data.train[:].tolist(), *data.validation[:].tolist()]


# Documents


@pytest.mark.parametrize("template", [(), BEGIN, BOTH], ids=["none", "begin", "both"])
def test_records_are_encoded_as_transformers_does(tmp_path: Path, template: tuple[str, ...]) -> None:
    path = tokenizer_file(tmp_path / "tokenizer.json", template)
    records = ["To be", "", "or not to be", "that is"]
    expected = [number for record in records for number in loaded(path)(record + "\n")["input_ids"]]
    assert ids_of(prepared(tmp_path, records, path)) == expected
    plain = ids_of(prepared(tmp_path, records, path, add_special_tokens=False))
    assert plain == loaded(path)("".join(record + "\n" for record in records), add_special_tokens=False)["input_ids"]
    assert len(expected) == len(plain) + len(records) * max(0, len(template) - 1)


@pytest.mark.parametrize("name", WRITERS)
def test_records_of_every_format_are_documents(name: str, tmp_path: Path) -> None:
    path = tokenizer_file(tmp_path / "tokenizer.json", BOTH)
    records = ["To be", "", 'or "not"\nto be', "红楼梦 🙂", "that is"]
    WRITERS[name](tmp_path / name, records)
    data = prepare(DataConfig(path=str(tmp_path / name), tokenizer=str(path), cache=str(tmp_path / "cache")))
    assert ids_of(data) == [number for record in records for number in loaded(path)(record + "\n")["input_ids"]]


def test_records_left_out_and_lone_surrogates_shift_no_end(tmp_path: Path) -> None:
    path = tokenizer_file(tmp_path / "tokenizer.json", BOTH)
    lines = ['"a \\ud83d b"', "null", '"\\ud83d\\ude42"', '"c"']
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": {line}}}\n' for line in lines))
    config = DataConfig(path=str(tmp_path / "a.jsonl"), tokenizer=str(path), cache=str(tmp_path / "cache"))
    config.separator = os.fsdecode(b"\xe9</s>")  # not UTF-8, and a special token
    stop = loaded(path).convert_tokens_to_ids("</s>")
    expected = []
    for record in ("a \ufffd b", "🙂", "c"):
        expected += [*loaded(path)(record)["input_ids"], *loaded(path)("\ufffd", add_special_tokens=False)["input_ids"]]
        expected += [stop]
    assert ids_of(prepare(config)) == expected


CHUNK = 1 << 15


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read texts in chunks of a 32nd of their usual size."""
    monkeypatch.setattr(sources, "_CHUNK", CHUNK)


@pytest.mark.usefixtures("small_chunks")
def test_a_text_of_many_chunks_is_one_document(tmp_path: Path) -> None:
    path = tokenizer_file(tmp_path / "tokenizer.json", BOTH)
    begin, end, *_ = (loaded(path).convert_tokens_to_ids(token) for token in SPECIAL)
    data = prepared(tmp_path, TEXT * (3 * CHUNK // len(TEXT)), path)
    ids = ids_of(data)
    assert len(list(sources.text_chunks(str(tmp_path / "t.txt")))) > 2
    assert (ids[0], ids[-1], ids.count(begin), ids.count(end)) == (begin, end, 1, 1)
    assert ids_of(prepared(tmp_path, TEXT * (3 * CHUNK // len(TEXT)), path, workers=2)) == ids


def test_a_separator_stands_for_the_token_it_spells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tokenizer_file(tmp_path / "tokenizer.json")
    stop = loaded(path).convert_tokens_to_ids("<|endoftext|>")
    records = ["To be <|endoftext|> or", "not"]
    ids = ids_of(prepared(tmp_path, records, path, separator="<|endoftext|>"))
    assert ids.count(stop) == 2 and ids[-1] == stop
    assert loaded(path).decode(ids) == "".join(record + "<|endoftext|>" for record in records)
    printed = capsys.readouterr().err
    assert printed.count("t.jsonl spells the special token <|endoftext|>, which is read as plain text") == 1
    tokens = prepared(tmp_path, records, path, separator="<|endoftext|>", split_special_tokens=False)
    assert ids_of(tokens).count(stop) == 3
    assert "special token" not in capsys.readouterr().err


def test_words_that_spell_a_line_end_are_unknown_words(tmp_path: Path) -> None:
    source = tmp_path / "t.txt"
    source.write_text("a <eos> b\nc\n" * 9)
    config = DataConfig(path=str(source), tokenizer="word", cache=str(tmp_path))
    for split, line_ends in ((True, 18), (False, 27)):
        config.split_special_tokens = split
        data = prepare(config)
        assert ids_of(data).count(int(data.tokenizer.encode("\n")[0])) == line_ends


# Prompts and generated texts


def tuned_on(folder: Path, framework: str, template: tuple[str, ...], *options: str, rows: int | None = None) -> Path:
    """Train a Llama for a step that starts from a folder with a tokenizer; return the run."""
    start = folder / "start"
    model = transformers_model("llama")
    size = len(loaded(tokenizer_file(folder / "tokenizer.json", template)))
    model.resize_token_embeddings(rows or size)
    model.save_pretrained(start)
    (folder / "tokenizer.json").rename(start / "tokenizer.json")
    (folder / "text.txt").write_text(TEXT)
    data = ["--data.path", str(folder / "text.txt"), "--data.context", "16", "--data.cache", str(folder / "cache")]
    train = ["--train.steps", "1", "--train.batch_size", "4", "--train.warmup", "0", "--log.run", str(folder / "run")]
    model_options = ["--model.pretrained", str(start), "--framework", framework, "--backend", "local"]
    assert cli.main(["train", *model_options, *data, *train, *options]) == 0
    return folder / "run"


@both_frameworks
def test_greedy_text_is_that_of_transformers(
    tmp_path: Path, framework: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run, out = tuned_on(tmp_path, framework, BEGIN), tmp_path / "out"
    assert cli.main(["convert", "--run", str(run), "--format", "huggingface", "--output", str(out)]) == 0
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    inputs = tokenizer("To be", return_tensors="pt", return_token_type_ids=False)
    assert inputs["input_ids"][0, 0] == tokenizer.convert_tokens_to_ids("<s>")
    greedy = {"do_sample": False, "pad_token_id": 0}
    (ids,) = model.generate(**inputs, max_new_tokens=9, **greedy).tolist()
    generated = ids[len(inputs["input_ids"][0]) :]
    command = ["generate", "--run", str(run), "--prompt", "To be", "--tokens", "9", "--temperature", "0"]
    for options, kept in (([], generated), (["--model.stop_tokens", f"[{generated[5]}]"], before(generated, 5))):
        capsys.readouterr()
        assert cli.main([*command, *options]) == 0
        assert capsys.readouterr().out == "To be" + tokenizer.decode(kept) + "\n"


def before(ids: list[int], index: int) -> list[int]:
    """Return the ids before the first that equals the one at ``index``."""
    return ids[: ids.index(ids[index])]


def test_prompts_have_the_tokens_that_they_spell(tmp_path: Path) -> None:
    tokenizer = tokenizers.train(str(tokenizer_file(tmp_path / "t.json", BOTH)), None, ())
    begin, _, stop, pad = (int(tokenizer.encode(token, special=True)[0]) for token in SPECIAL)
    config = Config()
    plain = tokenizer.encode("To be").tolist()
    assert encode(tokenizer, "To be<|endoftext|>", config).tolist() == [begin, *plain, stop]
    assert encode(tokenizer, "", config).tolist() == [begin]
    config.data.add_special_tokens = False
    assert encode(tokenizer, "To be", config).tolist() == plain
    with pytest.raises(HvdlmError, match="the prompt is empty"):
        encode(tokenizer, "", config)
    config.model.vocab = pad
    with pytest.raises(HvdlmError, match=r"the prompt has the token \[PAD\], for which the model has no embedding"):
        encode(tokenizer, "To be[PAD]", config)


def test_no_generated_token_is_withheld() -> None:
    """The last character may be cut off, or never be completed."""
    for data in ("é🙂".encode(), "é🙂".encode()[:-1], b"\xff\xfe a \xf0\x9f", b"\xf0", b""):
        detokenizer = Detokenizer(ByteTokenizer(), [65])
        chunks = [detokenizer.add(token) for token in data]
        assert "".join(chunks) + detokenizer.end() == data.decode("utf-8", "replace")
    detokenizer = Detokenizer(ByteTokenizer(), [65])
    assert [detokenizer.add(token) for token in "aéb".encode()] == ["a", "", "é", "b"]


# Sizes of texts that are decoded differently


def wordpiece(path: Path) -> Path:
    """Write a tokenizer.json like BERT's: lower case, without accents and blanks."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    words = ["[UNK]", *"abcdefghijklmnopqrstuvwxyz,.:", *("##" + letter for letter in "abcdefghijklmnopqrstuvwxyz")]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.save(str(path))
    return path


@pytest.mark.parametrize("text", ["红楼梦 是 一部 小说\n", "To be,  or not: É\n", "ALL UPPER CASE\n"])
def test_texts_that_change_have_no_size_in_bytes(tmp_path: Path, text: str) -> None:
    data = prepared(tmp_path, text * 50, wordpiece(tmp_path / "t.json"))
    assert data.validation_bytes == 0 and len(data.validation)


@pytest.mark.parametrize("records", [False, True])
def test_special_tokens_have_no_bytes(tmp_path: Path, records: bool) -> None:
    path = tokenizer_file(tmp_path / "tokenizer.json", BOTH)
    text = [f"{TEXT} 红楼梦 {number}" for number in range(40)] if records else f"{TEXT} 红楼梦 🙂\n" * 40
    data = prepared(tmp_path, text, path, validation_share=0.3)
    restored = loaded(path).decode(data.validation[:].tolist(), skip_special_tokens=True)
    assert abs(data.validation_bytes - len(restored.encode())) <= 4  # of a character that is divided
    (tmp_path / "held_out.jsonl").write_text(json.dumps({"text": "To be é"}))
    data = prepared(tmp_path, text, path, validation_path=str(tmp_path / "held_out.jsonl"))
    assert data.validation_bytes == len("To be é\n".encode())


@pytest.mark.usefixtures("small_chunks")
def test_bytes_of_texts_are_exact_beyond_one_chunk(tmp_path: Path) -> None:
    """A normaliser that changes nothing here, and several chunks before the validation text."""
    path = tokenizer_file(tmp_path / "tokenizer.json", BEGIN, normalizer={"type": "NFC"})
    text = "".join(f"{number} 红楼梦 or not to be\n" for number in range(3_000))
    data = prepared(tmp_path, text, path, validation_share=0.25)
    restored = loaded(path).decode(data.validation[:].tolist())
    assert len(list(sources.text_chunks(str(tmp_path / "t.txt")))) > 2
    assert len(text.encode()) > 2 * CHUNK and abs(data.validation_bytes - len(restored.encode())) <= 4


# Vocabularies larger than the embedding


def test_unused_special_tokens_need_no_embedding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = len(loaded(tokenizer_file(tmp_path / "t.json", BEGIN)))
    run = tuned_on(tmp_path, "torch", BEGIN, rows=size - 1)  # an added [PAD], for example
    assert cli.main(["evaluate", "--run", str(run)]) == 0
    assert cli.main(["generate", "--run", str(run), "--tokens", "3"]) == 0
    assert cli.main(["generate", "--run", str(run), "--prompt", "[PAD]"]) == 2
    assert "[PAD], for which the model has no embedding" in capsys.readouterr().err
    assert cli.main(["convert", "--run", str(run), "--format", "huggingface", "--output", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize("option", [["--data.separator", "[PAD]"], ["--data.split_special_tokens", "false"]])
def test_missing_embeddings_are_named_with_their_cure(
    tmp_path: Path, option: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    size = len(loaded(tokenizer_file(tmp_path / "t.json", BEGIN)))
    with pytest.raises(AssertionError):
        tuned_on(tmp_path, "torch", BEGIN, *option, rows=size - 1)
    printed = capsys.readouterr().err
    assert f"model.vocab {size - 1} is less than the {size} ids of the texts: enlarge the folder's model" in printed
    assert f"resize_token_embeddings({size})" in printed and "--model.vocab" not in printed
