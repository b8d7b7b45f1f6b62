"""Conversations and completions as training data: their texts, which tokens are targets, and runs on them."""

from __future__ import annotations

import json
import math
import multiprocessing
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet
from test_special_tokens import BOTH, ids_of, loaded, small_chunks, tokenizer_file

from builders import both_frameworks, small_trainable, token_batch
from hvdlm import cli
from hvdlm.config import Config, DataConfig
from hvdlm.data.token_files import TokenData, open_tokens
from hvdlm.data.tokenizers import ByteTokenizer
from hvdlm.errors import HvdlmError
from hvdlm_corpora import conversations, mixture, preparation, prepare_progress
from hvdlm_corpora.preparer import TextPreparer
from hvdlm_corpora.tokenizers import CharTokenizer, WordTokenizer
from hvdlm_language.language_model import LanguageModel, loss_figures
from launching import ONE_LAYER, SMALL, losses

assert small_chunks  # a fixture
MARKED = """{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- bos_token + 'assistant\n' }}{% generation %}{{ message.content + '</s>' }}{% endgeneration %}{{ '\n' }}
    {%- else %}
        {{- bos_token + message['role'] + '\n' + message['content'] + '</s>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ bos_token + 'assistant\n' }}{% endif %}"""
PLAIN = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
Chat = list[dict[str, Any]]


def turns(*contents: str) -> Chat:
    """Return a conversation, in which a user begins."""
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


CHATS: list[Chat] = [
    turns("To be", "or not to be"),
    [{"role": "system", "content": "answer in verse"}, *turns("that is", "the question: 红楼梦 é", "and?", "whether")],
    turns("", "'tis \u201cnobler\u201d <s> in the mind\n\n", "to suffer"),
    turns('"slings" & <arrows>', "{{ outrageous }} {% fortune %}"),
] * 9


def folder_of(
    folder: Path, template: str | None = MARKED, chats: list[Chat] | None = None, **settings: Any
) -> DataConfig:
    """Write a tokenizer with a chat template, and conversations; return the data options."""
    path = tokenizer_file(folder / "tokenizer.json")
    settings = {"bos_token": {"content": "<s>"}, "eos_token": "</s>"} | settings
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    lines = "".join(json.dumps({"messages": chat}) + "\n" for chat in (CHATS if chats is None else chats))
    (folder / "c.jsonl").write_text(lines)
    data = DataConfig(path=str(folder / "c.jsonl"), chat="messages", tokenizer=str(path), cache=str(folder / "cache"))
    data.context = 32
    return data


def targets_of(data: TokenData) -> list[int]:
    """Return for all tokens of a folder whether they are targets."""
    assert data.train_targets is not None and data.validation_targets is not None
    return [*data.train_targets[:].tolist(), *data.validation_targets[:].tolist()]


def reference(path: str, template: str) -> tuple[list[int], list[int]]:
    """Return the ids of all conversations, and which are the assistant's, by transformers."""
    tokenizer = loaded(Path(path))
    tokenizer.chat_template = template
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    ids, targets = [], []
    for chat in CHATS:
        encoded = tokenizer.apply_chat_template(
            chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        ids += encoded["input_ids"]
        targets += encoded["assistant_masks"]
    return ids, targets


# Texts and targets


@pytest.mark.parametrize("workers", [1, 2])
def test_conversations_become_what_transformers_makes_of_them(tmp_path: Path, workers: int) -> None:
    config = folder_of(tmp_path)
    data = preparation.prepare(config, None, workers)
    ids, targets = reference(config.tokenizer, MARKED)
    assert ids_of(data) == ids and targets_of(data) == targets and 0 < sum(targets) < len(ids) / 2
    header = json.loads((data.folder / "header.json").read_text())
    assert (header["format"], header["documents"]) == ("hvdlm-tokens-4", len(CHATS))
    assert (data.folder / "targets.bin").stat().st_size == len(ids) and data.validation_bytes == 0
    assert not multiprocessing.active_children()  # not the process that renders, either


def test_turns_are_known_by_the_text_up_to_them(tmp_path: Path) -> None:
    """Without marks: each answer with what follows it, but for the generation prompt."""
    config = folder_of(tmp_path, PLAIN)
    data = preparation.prepare(config)
    ids, marked = reference(config.tokenizer, MARKED)
    assert ids_of(data) == ids
    # Beside what the marks say, the line's end after an answer.
    extra = np.array(targets_of(data)) - marked
    newline = loaded(Path(config.tokenizer))("\n")["input_ids"]
    assert set(extra.tolist()) == {0, 1} and {ids[i] for i in np.flatnonzero(extra)} == set(newline)
    assert extra.sum() == sum(message["role"] == "assistant" for chat in CHATS for message in chat)


@pytest.mark.usefixtures("small_chunks")
def test_chunks_of_conversations_are_joined_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = folder_of(tmp_path, chats=CHATS * 60)
    monkeypatch.setattr("hvdlm_corpora.documents._CHUNK", 5000)
    whole = preparation.prepare(config, str(tmp_path / "whole"))
    add = prepare_progress.Journal.add

    def failing(self: prepare_progress.Journal, *arguments: Any) -> None:
        add(self, *arguments)
        if self.state.pieces == 7:
            self._save()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prepare_progress.Journal, "add", failing)
        with pytest.raises(KeyboardInterrupt):
            preparation.prepare(config, str(tmp_path / "resumed"))
    resumed = preparation.prepare(config, str(tmp_path / "resumed"))
    for name in ("tokens.bin", "targets.bin", "documents.bin"):
        assert (whole.folder / name).read_bytes() == (resumed.folder / name).read_bytes()
    assert whole.fingerprint == resumed.fingerprint


def test_templates_are_found_where_tokenizers_have_them(tmp_path: Path) -> None:
    config = folder_of(tmp_path, None)
    with pytest.raises(HvdlmError, match=r"has no chat template beside it .*name a file \(--data.chat_template FILE\)"):
        conversations.find(config)
    for value in (PLAIN, [{"name": "tool_use", "template": "?"}, {"name": "default", "template": PLAIN}]):
        template = conversations.find(folder_of(tmp_path, None, chat_template=value))
        assert template.text == PLAIN and dict(template.variables) == {"bos_token": "<s>", "eos_token": "</s>"}
    beside = conversations.find(folder_of(tmp_path, MARKED, chat_template=PLAIN))
    assert beside.text == MARKED and beside.hash != template.hash
    (tmp_path / "own.jinja").write_text("own")
    config.chat_template = str(tmp_path / "own.jinja")
    assert conversations.find(config).text == "own"
    config.tokenizer = "byte"  # the special tokens are those beside the template, then
    assert conversations.find(config).variables == template.variables
    config.chat_template = str(tmp_path / "missing.jinja")
    with pytest.raises(HvdlmError, match=r"data.chat_template: .*missing.jinja: No such file.*: name another file"):
        conversations.find(config)
    for name in ("own.jinja", "tokenizer_config.json"):
        config.chat_template = str(tmp_path / "own.jinja")
        (tmp_path / name).write_bytes(b"\xff\xfea")
        with pytest.raises(HvdlmError, match=rf"data.chat_template: .*/{name}: 'utf-16-le' codec .*: name another"):
            conversations.find(config)
        (tmp_path / name).write_text("{}")


TERMS = {"message.content | tojson": '"a\\"<é"', "message.role.upper()": "USER", "tools is none": "True"}


@pytest.mark.parametrize("expression", TERMS)
def test_templates_have_the_functions_of_transformers(tmp_path: Path, expression: str) -> None:
    from hvdlm_corpora.chat_template import ChatTemplate

    chat = turns('a"<é')
    text = "{% for message in messages %}{{ " + expression + " }}{% break %}{% endfor %}"
    rendered, _ = ChatTemplate(text, {}).render(chat)
    tokenizer = loaded(tokenizer_file(tmp_path / "tokenizer.json"))
    assert rendered == TERMS[expression] == tokenizer.apply_chat_template(chat, chat_template=text, tokenize=False)


HOSTILE = {
    "{% for i in range(10**9) %}{% endfor %}": "fails (Range too big",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}": "takes more than 10 s",
    "{{ 'a'.center(10**11) }}": "fails (it takes too much memory)",
    "{{ ''.__class__.__mro__ }}": "is unsafe",
    "{{ messages.append(1) }}": "unsafe",
    "{{ messages[0].missing.field }}": "has no attribute 'missing'",
    "{% if %}": "Expected an expression",
    "{{ raise_exception('roles must alternate') }}": "fails (roles must alternate)",
    "{{ '(' * 10**5 }}{{ 1 / 0 }}": "division by zero",
    "the same for all": "turn 2, of the assistant, adds no text to the generation prompt",
    "{{ messages | length }}{{ messages[-1].content }}": "the text up to turn 2 is not how the whole text begins",
}


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_hostile_templates_end_with_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str], number: int) -> None:
    text, words = list(HOSTILE.items())[number]
    chats = [turns("a", "b", "c", "d")] * 3
    config = folder_of(tmp_path, text, chats)
    command = ["prepare", "--data.path", *[config.path], "--data.chat", "messages", "--data.cache", str(config.cache)]
    began = time.monotonic()
    assert cli.main([*command, "--data.tokenizer", config.tokenizer]) == 2  # type: ignore[list-item]
    error = capsys.readouterr().err
    assert words in error and "record 1" in error and "check --data.chat_template" in error
    assert len(error) - len(str(tmp_path)) * 2 < 400 and time.monotonic() - began < 60
    assert not multiprocessing.active_children()


BROKEN: list[tuple[Any, str]] = [
    ("text", "record 1 holds no conversation: 'text', expected a list like"),
    ([], "holds no conversation"),
    ([{"content": "a"}], "holds no conversation"),
    ([{"role": "user"}], "holds no conversation"),
    ([{"role": "user", "content": 3}], "holds no conversation"),
    ([{"role": ["user"], "content": "a"}], "holds no conversation"),
    ({"role": "user", "content": "a"}, "holds no conversation"),
]


@pytest.mark.parametrize("chat, words", BROKEN, ids=[str(number) for number in range(len(BROKEN))])
def test_records_that_are_no_conversations_are_refused(tmp_path: Path, chat: Any, words: str) -> None:
    config = folder_of(tmp_path, chats=[chat])
    with pytest.raises(HvdlmError, match=words) as error:
        preparation.prepare(config)
    assert len(str(error.value)) - len(str(tmp_path)) < 300


def test_conversations_without_an_answer_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = folder_of(tmp_path, chats=[turns("nobody answers"), *CHATS, turns("a \ud83d b")])
    with (tmp_path / "c.jsonl").open("a") as file:
        file.write('{"messages": null}\n{"other": 1}\n')
    data = preparation.prepare(config)
    assert ids_of(data) == reference(config.tokenizer, MARKED)[0]
    error = capsys.readouterr().err
    assert "2 conversations without an answer are left out" in error
    assert "2 records without messages are left out" in error


# Prompts and completions

PAIRS = [("To be\n", "or not"), ("é ", "红楼梦"), ("", "question"), ("a, b", 'with "quotes"')] * 5


@pytest.mark.parametrize("name", ["p.jsonl", "p.json", "p.csv"])
def test_completions_alone_are_targets(tmp_path: Path, name: str) -> None:
    import csv
    import io

    records = [{"question": prompt, "answer": completion} for prompt, completion in PAIRS]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, ["answer", "question"])
    writer.writeheader()
    writer.writerows(records)
    content = {
        "p.jsonl": "".join(json.dumps(record) + "\n" for record in records) + '{"question": "no answer"}\n',
        "p.json": json.dumps(records),
        "p.csv": buffer.getvalue(),
    }[name]
    (tmp_path / name).write_text(content)
    config = DataConfig(path=str(tmp_path / name), field="answer", prompt="question", cache=str(tmp_path / "cache"))
    config.tokenizer, config.document_token, config.separator = "byte", 0, "!"
    data = preparation.prepare(config)
    expected: list[tuple[int, int]] = []
    for prompt, completion in PAIRS:
        expected += [(number, 0) for number in prompt.encode()]
        expected += [(number, 1) for number in [*f"{completion}!".encode(), 0]]
    assert list(zip(ids_of(data), targets_of(data), strict=True)) == expected


def test_added_tokens_are_targets_after_a_completion(tmp_path: Path) -> None:
    path = tokenizer_file(tmp_path / "tokenizer.json", BOTH)
    (tmp_path / "p.jsonl").write_text(
        json.dumps({"p": "to be ", "text": "or not"}) + "\n" + '{"p": "a", "text": "b"}\n'
    )
    config = DataConfig(path=str(tmp_path / "p.jsonl"), prompt="p", tokenizer=str(path), cache=str(tmp_path / "cache"))
    data = preparation.prepare(config)
    tokenizer = loaded(path)
    expected = [number for text in ("to be or not\n", "ab\n") for number in tokenizer(text)["input_ids"]]
    assert ids_of(data) == expected
    spelled = [(tokenizer.decode([i]), mark) for i, mark in zip(ids_of(data), targets_of(data), strict=True)]
    assert spelled[0] == ("<s>", 0) and ("</s>", 1) in spelled and ("</s>", 0) not in spelled
    assert "".join(token for token, mark in spelled if mark) == "or not\n</s>b\n</s>" or "ab" in dict(spelled)


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), CharTokenizer("abé🙂 ")])
def test_offsets_are_those_of_characters(tokenizer: Any) -> None:
    ids, offsets = tokenizer.encode_offsets("aé 🙂b")
    assert ids.tolist() == tokenizer.encode("aé 🙂b").tolist() and len(offsets) == len(ids)
    assert offsets[[0, -1]].tolist() == [[0, 1], [4, 5]] and set(offsets[:, 0].tolist()) == set(range(5))
    with pytest.raises(HvdlmError, match="need a tokenizer that knows which characters a token stands for"):
        WordTokenizer(["a", "<unk>"]).encode_offsets("a")


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"prompt": "p"}, "data.chat and data.prompt both say which tokens are targets: give one"),
    ({"sampling": "sequential"}, "data.sampling sequential: some tokens of .* are no targets"),
]


@pytest.mark.parametrize("options, words", REFUSED, ids=["both", "sequential"])
def test_options_that_contradict_targets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: dict[str, Any], words: str
) -> None:
    config = folder_of(tmp_path)
    command = ["train", *SMALL, "--backend", "local", "--data.path", str(config.path), "--data.chat", "messages"]
    command += [
        "--data.tokenizer",
        config.tokenizer,
        "--data.cache",
        str(config.cache),
        "--log.run",
        str(tmp_path / "r"),
    ]
    command += [word for name, value in options.items() for word in (f"--data.{name}", value)]
    assert cli.main([*command, "--data.context", "8", "--train.batch_size", "2"]) == 2
    assert re.search(words, capsys.readouterr().err)


def test_a_prompt_is_not_its_completion(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--data.prompt", "text"]) == 2
    assert "data.prompt: 'text' is also data.field, the completion" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["chat", "prompt"])
def test_targets_are_marked_in_records_alone(tmp_path: Path, option: str) -> None:
    text = tmp_path / "plain.txt"
    text.write_text("No record.\n" * 20)
    plain = DataConfig(path=str(text), tokenizer="byte", cache=str(tmp_path / "cache"))
    template = tmp_path / "chat.jinja"
    template.write_text(PLAIN)
    marked: dict[str, Any] = {option: "messages", "chat_template": str(template)}
    for path in (str(text), "embedded"):
        with pytest.raises(HvdlmError, match=f"{path}: it is a text, and data.{option} names a field of records"):
            preparation.prepare(replace(plain, path=path, **marked))
    tokens = preparation.prepare(plain, str(tmp_path / "tokens")).folder
    with pytest.raises(HvdlmError, match=rf"data.{option}: all tokens of the folder {tokens} are targets"):
        preparation.prepare(replace(plain, path=str(tokens), **marked))


@pytest.mark.parametrize("option", ["chat", "prompt", "field"])
@pytest.mark.parametrize("name", ["x.jsonl", "x.csv", "x.parquet"])
def test_the_option_of_a_missing_field_is_named(tmp_path: Path, name: str, option: str) -> None:
    template, path = tmp_path / "chat.jinja", tmp_path / name
    template.write_text(PLAIN)
    if name == "x.parquet":
        parquet.write_table(pyarrow.table({"text": ["a"]}), path)
    else:
        path.write_text('{"text": "a"}\n' if name == "x.jsonl" else "text\na\n")
    config = DataConfig(path=str(path), tokenizer="byte", cache=str(tmp_path / "cache"), chat_template=str(template))
    with pytest.raises(HvdlmError, match=rf"has no field 'none', it has text: --data.{option} NAME"):
        preparation.prepare(replace(config, **{option: "none"}))


@both_frameworks
def test_a_run_outlives_steps_without_targets(
    tmp_path: Path, framework: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """More of them in a row than skipped steps end a run; its last step and its part of the validation have none."""
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"prompt": "why " * 100, "text": "so"}) + "\n")
    pairs.write_text(pairs.read_text() * 8)
    run = tmp_path / "run"
    command = ["train", *SMALL, "--backend", "local", "--framework", framework, "--data.path", str(pairs)]
    command += ["--data.prompt", "prompt", "--data.tokenizer", "byte", "--data.cache", str(tmp_path / "cache")]
    command += ["--data.context", "8", "--data.validation_path", str(pairs), "--train.batch_size", "1"]
    command += ["--train.steps", "12", "--train.max_skips", "2", "--train.eval_every", "6", "--train.eval_tokens", "8"]
    command += ["--train.warmup", "1", "--log.every", "1", "--log.run", str(run)]
    assert cli.main(command) == 0
    printed = capsys.readouterr()
    assert "update skipped, the batch has no targets" in printed.out + printed.err
    evaluated = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if "val_loss" in line]
    assert math.isfinite(evaluated[-1]["val_loss"]) and 0 <= evaluated[-1]["token_accuracy"] <= 1


# Rows


@pytest.mark.parametrize("rows", ["windows", "documents"])
def test_rows_count_targets_alone(tmp_path: Path, rows: Any, capsys: pytest.CaptureFixture[str]) -> None:
    config = folder_of(tmp_path)
    config.rows = rows
    data = preparation.prepare(config)
    task = LanguageModel(Config(data=config))
    assert ("documents to train on are longer than data.context 32: they continue" in capsys.readouterr().err) == (
        rows == "documents"
    )
    train, marks = data.train[:].tolist(), targets_of(data)
    pairs = {(a, b, bool(mark)) for a, b, mark in zip(train, train[1:], marks[1:], strict=False)}
    total = 0.0
    sampled = task._sampler.epoch_rows  # type: ignore[union-attr]
    for row in range(sampled):
        batch = task.rows(row, row + 1)
        assert batch.weights is not None
        total += batch.tokens
        inside = batch.weights[0] > 0
        assert {(a, b, True) for a, b in zip(batch.inputs[0][inside], batch.targets[0][inside], strict=True)} <= pairs
    if rows == "documents":
        assert total == sum(marks[1 : len(train)])
    held_out = [batch.tokens for batch in task.validation(0, 1)]
    assert sum(held_out) == sum(marks[len(train) + 1 :])


def test_texts_and_conversations_are_mixed(tmp_path: Path) -> None:
    config = folder_of(tmp_path)
    (tmp_path / "plain.txt").write_text("to be or not to be " * 60)
    mixed = {"chats": {"path": config.path, "chat": "messages"}, "plain": {"path": str(tmp_path / "plain.txt")}}
    data = DataConfig(mixture=mixed, tokenizer=config.tokenizer, cache=config.cache, context=16)
    task = LanguageModel(Config(data=data))
    batch = task.rows(0, 64)
    assert batch.weights is not None
    shares = batch.weights.mean(1)
    assert (shares == 1).sum() >= 30 and (shares < 1).sum() >= 10
    assert {batch.corpus for batch in task.validation(0, 1)} == {"chats", "plain"}


def test_corpora_of_a_mixture_opt_out_by_null(tmp_path: Path) -> None:
    config = folder_of(tmp_path)
    (tmp_path / "plain.txt").write_text("to be or not to be " * 60)
    pairs = "".join(json.dumps({"q": f"{i} and", "a": f"{i + 1}"}) + "\n" for i in range(99))
    (tmp_path / "pairs.jsonl").write_text(pairs)
    named = {"chats": {"path": config.path}, "plain": {"path": str(tmp_path / "plain.txt"), "chat": None}}
    answers = {"path": str(tmp_path / "pairs.jsonl"), "prompt": "q", "field": "a"}
    data = DataConfig(mixture={**named, "pairs": {**answers, "chat": None}}, chat="messages", context=16)
    data.tokenizer, data.cache = config.tokenizer, config.cache
    opened = {corpus.name: corpus.data for corpus in mixture.open_corpora(data)}
    alone = preparation.prepare(config)
    assert targets_of(opened["chats"]) == targets_of(alone) and ids_of(opened["chats"]) == ids_of(alone)
    assert opened["plain"].train_targets is None and 0 < sum(targets_of(opened["pairs"])) < len(ids_of(opened["pairs"]))
    for corpus, words in (
        (answers, "pairs: chat messages and prompt q both say which tokens are targets: set one of them to null"),
        ({**answers, "field": None}, "pairs: field is None, expected text"),
    ):
        with pytest.raises(HvdlmError, match=words):
            mixture.read(replace(data, mixture={"pairs": corpus}))


@both_frameworks
def test_a_step_without_targets_changes_nothing(framework: str) -> None:
    trainable = small_trainable(framework, layers=1)
    before = trainable.state()["parameters/embed.tokens"].copy()
    batch = token_batch()
    batch.weights = np.zeros(batch.inputs.shape, np.float32)
    result = trainable.train_step([batch], 0.1, 0)
    assert result.skipped and result.tokens == 0
    assert result.empty and not result.failed  # no reason to roll back
    np.testing.assert_array_equal(trainable.state()["parameters/embed.tokens"], before)
    assert trainable.eval_step(batch) == (0.0, 0.0)
    assert math.isnan(loss_figures({"loss": 0.0, "tokens": 0.0})["val_loss"])


# Token folders


def test_damaged_targets_are_refused(tmp_path: Path) -> None:
    data = preparation.prepare(folder_of(tmp_path))
    path = data.folder / "targets.bin"
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(HvdlmError, match=r"targets.bin has \d+ bytes, the header says \d+ tokens: delete it"):
        open_tokens(data.folder)
    path.write_bytes(b"\2" + content[1:])
    with pytest.raises(HvdlmError, match=r"targets.bin holds other bytes than 0 and 1"):
        open_tokens(data.folder)
    path.write_bytes(bytes(len(content)))
    with pytest.raises(HvdlmError, match=r"the training split of .* has no targets: check data.chat or data.prompt"):
        LanguageModel(Config(data=DataConfig(path=str(data.folder), context=8)))
    path.unlink()
    with pytest.raises(HvdlmError, match="is damaged or foreign"):
        open_tokens(data.folder)


def test_a_large_folder_of_targets_opens_fast(tmp_path: Path) -> None:
    """Ten billion tokens in sparse files."""
    folder = preparation.prepare(folder_of(tmp_path), str(tmp_path / "t")).folder
    header, count = json.loads((folder / "header.json").read_text()), 10**10
    header |= {"dtype": "uint16", "train": count - 10**6, "validation": 10**6}
    (folder / "header.json").write_text(json.dumps(header))
    for name, size in (("tokens.bin", 2 * count), ("targets.bin", count)):
        with (folder / name).open("r+b") as file:
            file.truncate(size)
            file.seek(size - 1)
            file.write(b"\1")
    with (folder / "targets.bin").open("r+b") as file:  # in the blocks that are checked, too
        file.seek(count - 10**6)
        file.write(b"\1" * 100)
    began = time.thread_time()
    task = LanguageModel(Config(data=DataConfig(path=str(folder), context=1024)))
    assert task.rows(0, 8).inputs.shape == (8, 1024) and time.thread_time() - began < 2.5  # about 0.1 s


# Runs


@both_frameworks
def test_a_run_on_conversations_answers(tmp_path: Path, framework: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = folder_of(tmp_path, chats=[turns("ping", "pong"), turns("ding", "dong")] * 30)
    run = tmp_path / "run"
    command = ["train", "--framework", framework, "--backend", "local", *SMALL, *ONE_LAYER, "--log.run", str(run)]
    command += ["--data.path", str(config.path), "--data.chat", "messages", "--data.tokenizer", config.tokenizer]
    command += ["--data.cache", str(config.cache), "--data.context", "32", "--data.rows", "documents"]
    command += ["--data.document_masks", "true", "--train.steps", "60", "--train.warmup", "0"]
    command += ["--train.learning_rate", "0.01", "--model.stop_tokens", "[271]"]
    assert cli.main(command) == 0
    curve = losses(run)
    assert curve[-1] < 0.1 < curve[0]
    capsys.readouterr()
    chat = ["generate", "--run", str(run), "--chat", "true", "--temperature", "0", "--tokens", "12"]
    assert cli.main([*chat, "--prompt", "ding", "--prompt", "ping"]) == 0
    assert capsys.readouterr().out.split("-" * 16) == [
        "<s>user\nding</s>\n<s>assistant\ndong\n",
        "\n<s>user\nping</s>\n<s>assistant\npong\n",
    ]
    (tmp_path / "chat_template.jinja").unlink()
    assert cli.main([*chat, "--prompt", "ding"]) == 2
    assert "has no chat template beside it" in capsys.readouterr().err


def test_a_prepared_folder_keeps_its_template(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Runs on it write prompts by that, wherever the tokenizer was."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    config = folder_of(tmp_path / "a")
    before = conversations.find(config)
    folder = preparation.prepare(config, str(tmp_path / "tokens")).folder
    for path in (tmp_path / "a").glob("*.*"):
        path.unlink()
    kept = conversations.find(DataConfig(path=str(folder)))
    assert kept.hash == before.hash and kept.path == str(folder / "chat_template.jinja")
    run = tmp_path / "run"
    command = ["train", "--backend", "local", *SMALL, *ONE_LAYER, "--log.run", str(run), "--data.context", "32"]
    assert cli.main([*command, "--data.path", str(folder), "--train.steps", "1"]) == 0
    capsys.readouterr()
    assert cli.main(["generate", "--run", str(run), "--chat", "true", "--prompt", "to be", "--tokens", "1"]) == 0
    assert capsys.readouterr().out.startswith("<s>user\nto be</s>\n<s>assistant\n")
    other = preparation.prepare(folder_of(tmp_path / "b", PLAIN), str(tmp_path / "others")).folder
    mixed = DataConfig(mixture={str(folder): 1, str(other): 1})
    with pytest.raises(
        HvdlmError, match=r"the mixture has several, .*others/chat_template.jinja and .*tokens/chat_tem"
    ):
        TextPreparer().chat_prompt(mixed, "to be")
    assert TextPreparer().chat_prompt(replace(mixed, mixture={str(folder): 1}), "to").startswith("<s>user\nto</s>")


# Tables


def table_of(chats: list[Any]) -> pyarrow.Table:
    """Return a table of conversations, whose messages have more fields than the role and the content."""
    message = pyarrow.struct({"content": pyarrow.string(), "role": pyarrow.string(), "name": pyarrow.string()})
    kinds = {"id": pyarrow.int64(), "messages": pyarrow.list_(message)}
    return pyarrow.table({"id": list(range(len(chats))), "messages": chats}, pyarrow.schema(kinds))


def write_table(path: Path, table: pyarrow.Table, rows: int = 7) -> str:
    """Write a table as Parquet or as an Arrow stream; return its path."""
    if path.suffix == ".parquet":
        parquet.write_table(table, path, row_group_size=rows)
    else:
        with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table, rows)
    return str(path)


@pytest.mark.parametrize("name", ["c.parquet", "c.arrow"])
def test_conversations_of_tables_are_those_of_json(tmp_path: Path, name: str) -> None:
    config = folder_of(tmp_path)
    chats = [*CHATS, None, *CHATS[:3]]
    lines = "".join(json.dumps({"messages": chat}) + "\n" for chat in chats)
    (tmp_path / "c.jsonl").write_text(lines)
    expected = preparation.prepare(config, str(tmp_path / "json"))
    config.path = write_table(tmp_path / name, table_of(chats))
    data = preparation.prepare(config, str(tmp_path / "table"))
    assert ids_of(data) == ids_of(expected) and targets_of(data) == targets_of(expected)
    config.chat = "id"
    with pytest.raises(HvdlmError, match=r"the column id is of type int64, expected lists of structures with role"):
        preparation.prepare(config)
    config.chat = "other"
    with pytest.raises(HvdlmError, match=r"the table has no field 'other', it has id, messages"):
        preparation.prepare(config)


@pytest.mark.parametrize("name", ["p.parquet", "p.arrow"])
def test_fields_of_structures_are_prompts_and_completions(tmp_path: Path, name: str) -> None:
    pair = pyarrow.struct({"other": pyarrow.int64(), "question": pyarrow.string()})
    answers = pyarrow.array([*(answer for _, answer in PAIRS), "no question"]).dictionary_encode()
    questions = [*({"other": 1, "question": prompt} for prompt, _ in PAIRS), None]
    table = pyarrow.table({"pair": pyarrow.array(questions, pair), "answer": answers})
    path = write_table(tmp_path / name, table)
    config = DataConfig(path=path, field="answer", prompt="pair.question", tokenizer="byte", document_token=0)
    config.cache = str(tmp_path / "cache")
    data = preparation.prepare(config)
    expected = [f"{prompt}{completion}\n\0" for prompt, completion in PAIRS]
    assert bytes(ids_of(data)).decode() == "".join(expected)
    assert sum(targets_of(data)) == sum(len(f"{completion}\n\0".encode()) for _, completion in PAIRS)
    for field, words in (("pair.missing", "the column pair has no field 'pair.missing', it has other, question"),
                         ("pair.question.x", "the column pair.question has no field 'pair.question.x'"),
                         ("pair.other", "the column pair.other is of type int64, expected text"),
                         ("pair", "the column pair is of type struct")):  # fmt: skip
        with pytest.raises(HvdlmError, match=words):
            preparation.prepare(DataConfig(path=path, field=field, tokenizer="byte"), str(tmp_path / "refused"))
    plain = DataConfig(path=path, field="pair.question", tokenizer="byte", separator="|", cache=config.cache)
    assert bytes(ids_of(preparation.prepare(plain))).decode() == "".join(f"{prompt}|" for prompt, _ in PAIRS)


@pytest.mark.parametrize("name, bomb", [("b.parquet", "elements"), ("b.parquet", "text"), ("b.arrow", "text")])
def test_bombs_of_conversations_are_refused(tmp_path: Path, name: str, bomb: str) -> None:
    """A list of millions of equal messages, and a long text in many of them: each takes little space on disk."""
    count, text = (300_000, "a") if bomb == "elements" else (200, "a" * 500_000)
    role = pyarrow.DictionaryArray.from_arrays(pyarrow.array(np.zeros(count, np.int32)), ["user"])
    content = pyarrow.DictionaryArray.from_arrays(pyarrow.array(np.zeros(count, np.int32)), [text])
    messages = pyarrow.StructArray.from_arrays([role, content], ["role", "content"])
    table = pyarrow.table({"messages": pyarrow.ListArray.from_arrays([0, count], messages)})
    config = folder_of(tmp_path)
    config.path = write_table(tmp_path / name, table)
    config.max_expansion = 100
    assert (tmp_path / name).stat().st_size < 2e6
    with pytest.raises(HvdlmError, match=r"unpacks to more than 100 times its size, as a decompression bomb"):
        preparation.prepare(config)
