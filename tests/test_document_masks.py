"""Document masks: which batches carry where documents begin, what refuses them, and runs that train with them."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_special_tokens import ids_of, prepared, tokenizer_file
from token_writers import write_llm_c, write_megatron

from builders import both_frameworks
from hvdlm import cli
from hvdlm.config import Config, DataConfig
from hvdlm.errors import HvdlmError, RankError
from hvdlm.protocols.types import Batch
from hvdlm_corpora import cache, preparation
from hvdlm_language import sampler
from hvdlm_language.document_rows import DocumentRows
from hvdlm_language.language_model import LanguageModel
from hvdlm_language.sampler import TokenBatch
from launching import ONE_LAYER, SMALL, launch, losses

CONTEXT = 7
lists_of_lengths = st.lists(st.one_of(st.integers(0, 4), st.integers(0, 30)), min_size=1, max_size=40).filter(
    lambda lengths: sum(lengths) > 2 * CONTEXT
)


def expected_starts(documents: list[int], first: int, count: int) -> list[int]:
    """Return what the definition says, token by token; ``first``: of a row of ``count`` inputs."""
    own = [max(0, *(start - first for start in documents if start <= first + index)) for index in range(count)]
    return own + [count] * (CONTEXT - count)


def assert_divided(batch: TokenBatch, documents: list[int]) -> int:
    """Check rows of a corpus whose ids are their positions; return the number of targets."""
    assert batch.document_starts is not None and batch.document_starts.dtype == np.int32
    counts = batch.weights.sum(1) if batch.weights is not None else np.full(len(batch.inputs), CONTEXT)
    for inputs, starts, count in zip(batch.inputs, batch.document_starts, counts.astype(int).tolist(), strict=True):
        assert starts.tolist() == expected_starts(documents, int(inputs[0]), count)
    return int(counts.sum())


@given(lengths=lists_of_lengths, by_documents=st.booleans(), seed=st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_rows_are_divided_where_documents_begin(lengths: list[int], by_documents: bool, seed: int) -> None:
    starts = np.cumsum([0, *lengths[:-1]])
    tokens, documents = np.arange(sum(lengths)), starts.tolist()
    rows = DocumentRows(starts, len(tokens), CONTEXT) if by_documents else None
    shuffled = sampler.ShuffledSampler(tokens, CONTEXT, 4, seed, (), rows, starts)
    plain = sampler.ShuffledSampler(tokens, CONTEXT, 4, seed, (), rows)
    targets = 0
    for first in range(0, shuffled.windows, 4):
        batch = shuffled.rows(first, min(first + 4, shuffled.windows))
        targets += assert_divided(batch, documents)
        undivided = plain.rows(first, min(first + 4, shuffled.windows))
        assert undivided.document_starts is None
        for with_masks, without in zip(batch[:3], undivided[:3], strict=True):  # the same tokens, each counted
            np.testing.assert_array_equal(with_masks, without)
    assert targets == (len(tokens) - 1 if by_documents else shuffled.windows * CONTEXT)
    if rows is not None:
        evaluated = sampler.document_rows(tokens, rows, CONTEXT, 3, 0, 1, None, starts)
    else:
        evaluated = sampler.independent_windows(tokens, CONTEXT, 3, 0, 1, None, starts)
    assert sum(assert_divided(batch, documents) for batch in evaluated) == len(tokens) - 1


def test_mixtures_are_divided_by_the_documents_of_each_corpus() -> None:
    corpora, starts = [], [np.arange(0, 900, 3), np.arange(0, 800, 5)]
    for number, length in enumerate((900, 800)):
        corpora.append((10_000 * number + np.arange(length), 1.0))
    mixed = sampler.MixtureSampler(corpora, CONTEXT, 16, 1, None, starts)
    batch = mixed.rows(0, 64)
    assert batch.document_starts is not None
    for inputs, own in zip(batch.inputs, batch.document_starts, strict=True):
        corpus, first = divmod(int(inputs[0]), 10_000)
        assert own.tolist() == expected_starts(starts[corpus].tolist(), first, CONTEXT)
    assert len({int(first) // 10_000 for first in batch.inputs[:, 0]}) == 2


def test_rows_of_a_batch_keep_their_documents() -> None:
    starts = np.arange(12, dtype=np.int32).reshape(4, 3)
    batch = Batch(starts, starts, document_starts=starts)
    assert batch.rows(1, 3).document_starts.tolist() == starts[1:3].tolist()  # type: ignore[union-attr]
    assert Batch(starts, starts).rows(1, 3).document_starts is None


@pytest.mark.parametrize("positions", [[0, 25, 12], [0, 12, 25, 14]])
def test_a_damaged_index_ends_the_run(positions: list[int]) -> None:
    tokens = np.arange(40)
    shuffled = sampler.ShuffledSampler(tokens, 30, 1, 1, (), None, np.array(positions))
    with pytest.raises(RankError, match="index of documents is damaged: prepare the texts again"):
        shuffled.rows(0, 1)


RECORDS = [f"{number} to be or not to be" for number in range(60)]


def test_token_folders_have_the_index_that_masks_need(tmp_path: Path) -> None:
    path = tokenizer_file(tmp_path / "tokenizer.json")
    plain = prepared(tmp_path, RECORDS, path)
    with pytest.raises(HvdlmError, match="has no index of documents: prepare the texts with") as error:
        LanguageModel(Config(data=DataConfig(path=str(plain.folder), context=16, document_masks=True)))
    assert len(str(error.value)) < 400
    masked = prepared(tmp_path, RECORDS, path, document_masks=True)
    assert masked.folder != plain.folder and masked.train_documents is not None
    config = DataConfig(path=str(path), tokenizer=str(path), rows="documents")
    assert (
        cache.key(config)
        == cache.key(replace(config, document_masks=True))
        != cache.key(replace(config, rows="windows"))
    )
    task = LanguageModel(Config(data=DataConfig(path=str(masked.folder), context=16, document_masks=True)))
    batches = [task.rows(0, 8), *task.validation(0, 1)]
    for batch in batches:
        assert batch.document_starts is not None and batch.document_starts.shape == batch.inputs.shape
        assert (batch.document_starts.max(1) > 0).all()
    first = ids_of(masked)[:20]
    assert len(first) == 20


def test_megatrons_index_divides_rows_and_llm_c_has_none(tmp_path: Path) -> None:
    documents = [list(range(length)) for length in (5, 9, 30, 2, 40)]
    write_megatron(tmp_path / "a.bin", documents)
    data = DataConfig(path=str(tmp_path / "a.bin"), vocab_size=99, context=16, document_masks=True)
    batch = LanguageModel(Config(data=data)).rows(0, 1)
    assert batch.document_starts is not None
    begins = np.flatnonzero(batch.inputs[0] == 0)
    assert np.unique(batch.document_starts[0]).tolist() == np.unique([0, *begins]).tolist()
    write_llm_c(tmp_path / "b.bin", documents)
    with pytest.raises(HvdlmError, match=r"b.bin has no index of documents"):
        LanguageModel(
            Config(data=DataConfig(path=str(tmp_path / "b.bin"), vocab_size=99, context=16, document_masks=True))
        )


REFUSED = [
    (["--model.name", "lstm"], "data.document_masks: they mask the attention of a GPT, and model.name lstm is none"),
    (["--data.sampling", "sequential"], "data.document_masks: they divide the shuffled rows of a language model"),
    (["--task", "digits", "--model.name", "convnet"], "data.sampling is shuffled, the task digits: leave it false"),
]


@pytest.mark.parametrize("options, words", REFUSED, ids=["lstm", "sequential", "digits"])
def test_what_has_no_documents_refuses_masks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    command = ["train", *SMALL, "--data.document_masks", "true", "--log.run", str(tmp_path / "run"), *options]
    assert cli.main([*command, "--backend", "local"]) == 2
    error = capsys.readouterr().err
    assert words in error and len(error) < 450


def test_frameworks_without_masks_refuse_them(tmp_path: Path) -> None:
    from hvdlm.training.abilities import check_abilities

    framework: Any = type("Other", (), {"name": "other", "abilities": ()})()
    config = Config()
    check_abilities(framework, config)
    config.data.document_masks = True
    with pytest.raises(HvdlmError, match=r"data.document_masks: framework other doesn't have them: leave it false"):
        check_abilities(framework, config)


@both_frameworks
def test_runs_with_masks_train_evaluate_and_resume(tmp_path: Path, framework: str) -> None:
    """Two ranks of each framework; the other rows and layouts are those of tests/parallel/test_document_masks.py."""
    (tmp_path / "t.txt").write_text("\n".join(RECORDS))
    options = ["-m", "hvdlm", *SMALL, *ONE_LAYER, "--framework", framework, "--data.tokenizer", "byte"]
    options += ["--data.path", "embedded", "--data.document_masks", "true", "--train.warmup", "0"]
    options += ["--data.cache", str(tmp_path / "cache"), "--train.steps", "3", "--train.schedule", "constant"]
    for ranks in (1, 2):
        done = launch("threads", ranks, [*options, "--log.run", str(tmp_path / f"{ranks}")])
        assert done.returncode == 0, done.stderr
    one, two = losses(tmp_path / "1"), losses(tmp_path / "2")
    assert len(one) == 3 and two == pytest.approx(one, rel=1e-5)


def test_documents_of_shards_are_one_list(tmp_path: Path) -> None:
    for name, lengths in (("a", (5, 9)), ("b", (4, 30))):
        write_megatron(tmp_path / f"{name}.bin", [list(range(length)) for length in lengths])
    paths = [str(tmp_path / f"{name}.bin") for name in "ab"]
    data = preparation.prepare(DataConfig(path=paths, vocab_size=99, validation_share=0.05))
    documents = data.train_documents
    assert documents is not None and sorted(set(documents[:].tolist())) == [0, 5, 14, 18]
    shuffled = sampler.ShuffledSampler(data.train, CONTEXT, 1, 1, (), None, documents)
    for row in range(4):
        batch = shuffled.rows(row, row + 1)
        assert batch.document_starts is not None
        inside = [bool(start) for start in batch.document_starts[0]]
        zeros = [index > 0 and token == 0 for index, token in enumerate(batch.inputs[0].tolist())]
        assert inside == list(itertools.accumulate(zeros, max))
