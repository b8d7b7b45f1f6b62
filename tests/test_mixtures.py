"""Mixtures of corpora: their shares equal the weights, on any number of ranks, in both frameworks."""

from __future__ import annotations

import json
import math
import os
import re
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvdlm import cli
from hvdlm.config import Config, DataConfig
from hvdlm.data.corpora import fingerprint
from hvdlm_corpora import mixture, preparation
from hvdlm_language.language_model import LanguageModel
from hvdlm_language.sampler import MixtureSampler, ShuffledSampler
from launching import launch, losses, run_python

PROSE = "It was the best of times, it was the worst of times, it was the age of wisdom.\n" * 400
VERSE = "TO BE, OR NOT TO BE: THAT IS THE QUESTION: WHETHER 'TIS NOBLER IN THE MIND\n" * 150
CONTEXT = 9


def corpora(*sizes: int) -> list[np.ndarray]:
    """Return corpora whose tokens are 10,000 times the number of their corpus plus their position in it."""
    return [number * 10_000 + np.arange(size, dtype=np.uint32) for number, size in enumerate(sizes)]


def mixed(weights: list[float], sizes: list[int], batch: int = 32, seed: int = 5) -> MixtureSampler:
    return MixtureSampler(list(zip(corpora(*sizes), weights, strict=True)), CONTEXT, batch, seed)


def first_tokens(sampler: MixtureSampler, batches: int, batch: int) -> np.ndarray:
    """Return the first token of every row of the first batches."""
    return np.concatenate([sampler.rows(number * batch, (number + 1) * batch)[0][:, 0] for number in range(batches)])


# Rows


@given(st.lists(st.floats(0.001, 1000), min_size=1, max_size=6), st.integers(0, 2**40))
@settings(max_examples=100, deadline=None)
def test_mixture_shares_are_exact_at_every_block(weights: list[float], block: int) -> None:
    sampler = mixed(weights, [100] * len(weights))
    before, after = sampler.counts(block * 1024), sampler.counts((block + 1) * 1024)
    assert before.sum() == block * 1024 and after.sum() == before.sum() + 1024 and (after >= before).all()
    exact = [weight / math.fsum(weights) * block * 1024 for weight in weights]
    assert all(abs(count - wanted) <= len(weights) + 1e-9 * wanted for count, wanted in zip(before, exact, strict=True))


def test_realised_shares_equal_the_weights() -> None:
    sampler = mixed([3, 1, 0.5], [3000, 500, 90])
    drawn = first_tokens(sampler, 320, 32) // 10_000
    counts = Counter(drawn.tolist())
    for number, weight in enumerate([3, 1, 0.5]):
        assert abs(counts[number] - len(drawn) * weight / 4.5) < 2
    for share in drawn.reshape(8, -1):  # the shares hold in every eighth of the rows too
        assert abs(np.mean(share == 0) - 3 / 4.5) < 0.05 and abs(np.mean(share == 1) - 1 / 4.5) < 0.05


def test_corpora_are_interleaved_at_random() -> None:
    drawn = first_tokens(mixed([1, 1], [2000, 2000]), 64, 16) // 10_000
    assert 0.4 < np.mean(drawn[1:] == drawn[:-1]) < 0.6
    assert 1 < drawn.reshape(64, 16).sum(axis=1).std() < 3  # 2, as if every row were drawn by itself


def test_a_corpus_shows_every_window_once_an_epoch() -> None:
    sampler = mixed([3, 1], [3000, 400])
    large, small = sampler.windows
    tokens = first_tokens(sampler, 64, 32)  # two blocks
    for number, count in enumerate((large, small)):
        seen = tokens[tokens // 10_000 == number] % 10_000
        offsets = Counter((seen % CONTEXT).tolist())  # epochs are cut at other offsets
        assert sum(offsets.values()) == [1536, 512][number]
        times = Counter(seen.tolist())
        epochs = -(-len(seen) // count)
        assert len(times) > min(len(seen), count) * 0.9 and max(times.values()) <= epochs
    order = np.concatenate([sampler._samplers[1].spans(np.arange(e * small, (e + 1) * small))[0] for e in range(12)])
    for epoch in range(12):
        starts = np.sort(order[epoch * small : (epoch + 1) * small])
        assert len(set(starts.tolist())) == small and set(np.diff(starts).tolist()) == {CONTEXT}
    seen = tokens[tokens // 10_000 == 1] % 10_000
    assert Counter(seen.tolist()) == Counter(order[: len(seen)].tolist())


def test_equal_corpora_are_shuffled_independently() -> None:
    first, second = mixed([1, 1], [500, 500])._samplers
    assert first.spans(np.arange(40))[0].tolist() != second.spans(np.arange(40))[0].tolist()
    assert (
        first.spans(np.arange(40))[0].tolist()
        != ShuffledSampler(first.tokens, CONTEXT, 8, 5).spans(np.arange(40))[0].tolist()
    )


@given(st.integers(1, 8), st.integers(1, 6), st.integers(0, 300), st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_a_global_batch_depends_on_seed_and_number_alone(ranks: int, share: int, number: int, seed: int) -> None:
    batch = ranks * share
    whole = mixed([2, 1, 0.1], [900, 300, 30], batch, seed).rows(number * batch, (number + 1) * batch)
    fresh = mixed([2, 1, 0.1], [900, 300, 30], batch, seed)
    rank_rows = [fresh.rows(number * batch + r * share, number * batch + (r + 1) * share) for r in range(ranks)]
    np.testing.assert_array_equal(whole[0], np.concatenate([rows[0] for rows in rank_rows]))
    np.testing.assert_array_equal(whole[1], whole[0] + 1)
    assert whole[0].shape == (batch, CONTEXT) and whole[0].dtype == np.int32 and whole[2] is None and whole[3] is True


def test_rows_continue_after_a_change_of_batch_size() -> None:
    before, after = mixed([2, 1], [900, 300], 32), mixed([2, 1], [900, 300], 8)
    rows = np.concatenate([before.rows(row, row + 32)[0] for row in range(0, 1280, 32)])
    np.testing.assert_array_equal(
        rows[800:], np.concatenate([after.rows(row, row + 8)[0] for row in range(800, 1280, 8)])
    )


# Options and prepared folders


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prose.txt").write_text(PROSE)
    Path("verse.txt").write_text(VERSE)
    Path("lines.jsonl").write_text("".join(json.dumps({"words": line}) + "\n" for line in VERSE.splitlines()))


def data(corpora: Any, **options: Any) -> DataConfig:
    return DataConfig(mixture=corpora, cache="cache", **options)


@pytest.mark.parametrize(
    "option",
    [
        {"prose.txt": 3, "verse.txt": 1},
        {"verse.txt": 1.0, "prose.txt": {"weight": 3}},
        {"verse": {"path": "verse.txt"}, "prose": {"path": ["prose.txt"], "weight": 3, "separator": "\n"}},
        {"verse": {"path": "lines.jsonl", "field": "words"}, "prose.txt": 3},
    ],
)
def test_equivalent_mixture_options_are_the_same_mixture(option: dict[str, Any]) -> None:
    corpora = mixture.open_corpora(data(option))
    assert [(corpus.name, corpus.share) for corpus in corpora] == [("prose", 0.75), ("verse", 0.25)]
    texts = [c.data.tokenizer.decode([*c.data.train[:].tolist(), *c.data.validation[:].tolist()]) for c in corpora]
    assert texts == [PROSE, VERSE]
    assert corpora[0].data.tokenizer.hash == corpora[1].data.tokenizer.hash
    assert corpora[0].data.tokenizer.vocab == len(set(PROSE + VERSE))


def test_a_new_weight_reuses_tokens_and_changes_the_fingerprint() -> None:
    first, second = (mixture.open_corpora(data({"prose.txt": w, "verse.txt": 1})) for w in (1, 2))
    assert [c.data.folder for c in first] == [c.data.folder for c in second]
    assert fingerprint(first) != fingerprint(second)


@pytest.mark.parametrize("tokenizer, vocab", [("bpe", 300), ("word", 30)])
def test_one_tokenizer_is_trained_on_all_corpora(tokenizer: str, vocab: int) -> None:
    corpora = mixture.open_corpora(data({"prose.txt": 1, "verse.txt": 1}, tokenizer=tokenizer, vocab_size=vocab))
    joint = preparation.prepare(
        DataConfig(path=["prose.txt", "verse.txt"], tokenizer=tokenizer, vocab_size=vocab, cache="cache")
    )
    assert {c.data.tokenizer.hash for c in corpora} == {joint.tokenizer.hash}
    assert [c.data.validation_bytes > 0 for c in corpora] == [tokenizer == "bpe"] * 2


def test_prepared_folders_are_mixed_with_their_tokenizer(capsys: pytest.CaptureFixture[str]) -> None:
    option = "{prose.txt: 3, verse.txt: 1}"
    assert cli.main(["prepare", "--data.mixture", option, "--output", "tokens", "--data.cache", "cache"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{name}: tokens/{name}: {len(text) * 9 // 10:,} training and {len(text) // 10:,} validation tokens, "
        f"vocabulary of {len(set(PROSE + VERSE))}"
        for name, text in (("prose", PROSE), ("verse", VERSE))
    ]
    assert sorted(os.listdir("tokens")) == ["prose", "verse"]
    assert sorted(name for name in os.listdir() if "tokens" in name) == ["tokens"]
    plain = mixture.open_corpora(data({"prose.txt": 3, "verse.txt": 1}))
    for paths in ({"tokens/prose": 3, "tokens/verse": 1}, {"tokens/prose": 3, "verse.txt": 1}):
        prepared = mixture.open_corpora(data(paths))
        assert fingerprint(prepared) == fingerprint(plain)


def test_a_killed_prepare_of_a_mixture_resumes(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["prepare", "--data.mixture", "{prose.txt: 3, verse.txt: 1}", "--output", "tokens"]
    arguments += ["--data.cache", "cache"]
    code = (
        "import os, signal; from hvdlm import cli; from hvdlm_corpora import prepare_progress, sources\n"
        "sources._CHUNK, prepare_progress._SAVE_SECONDS, add = 1000, 0, prepare_progress.Journal.add\n"
        "def killing(self, *arguments):\n"
        "    add(self, *arguments)\n"
        "    if '.verse.partial' in str(self._folder) and self.state.pieces == 5:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        f"prepare_progress.Journal.add = killing\ncli.main({arguments!r})"
    )
    done = run_python(["-c", code], cwd=Path.cwd())
    assert done.returncode == -signal.SIGKILL and not Path("tokens").exists(), done.stderr
    assert cli.main(arguments) == 0
    printed = capsys.readouterr()
    assert "resuming after" in printed.err and printed.err.count("resuming") == 1
    assert [name for name in os.listdir() if "tokens" in name] == ["tokens"]
    plain = mixture.open_corpora(data({"prose.txt": 3, "verse.txt": 1}))
    assert fingerprint(mixture.open_corpora(data({"tokens/prose": 3, "tokens/verse": 1}))) == fingerprint(plain)


def prepare_separately() -> None:
    """Prepare the corpora separately, so that each trains another tokenizer."""
    preparation.prepare(DataConfig(path="prose.txt", cache="cache"), "alone")
    preparation.prepare(DataConfig(path="verse.txt", cache="cache"), "single")


WRONG: dict[str, tuple[str, str, Callable[[], Any]]] = {
    "no weight above 0": ("{prose.txt: 0}", "data.mixture prose.txt: the weight is 0, expected a number above 0", list),
    "a negative weight": ("{prose.txt: {weight: -1}}", "the weight is -1, expected a number above 0", list),
    "an endless weight": ("{prose.txt: .inf}", "the weight is inf", list),
    "a weight in words": ("{prose.txt: much}", "the weight is 'much'", list),
    "a weight that is true": ("{prose.txt: true}", "the weight is True", list),
    "an unknown key": ("{prose.txt: {wieght: 1}}", "there is no 'wieght'; did you mean weight?", list),
    "a key that is a figure": ("{prose.txt: {1: 1}}", "there is no '?1'?; known", list),
    "no corpus": ("{}", "it holds no corpus: write for example", list),
    "no mapping": ("[prose.txt]", "--data.mixture: got .*, expected a mapping such as", list),
    "no file": ("{prse.txt: 1}", "data.path prse.txt: there is no such file", list),
    "no path": ("{a: {path: []}}", r"data.mixture a: path is \[\], expected a path", list),
    "a path that is a figure": ("{a: {path: 5}}", "path is 5, expected a path or a list of paths", list),
    "standard input": ("{a: {path: '-'}}", "data.mixture a: path is standard input: .*prepare", list),
    "no field": ("{prose.txt: {field: [a]}}", r"field is \['a'\], expected text", list),
    "no name": ("{'*.txt': 1}", "data.mixture .*: a name consists of letters.*name it", list),
    "a name that leads out": ("{..: {path: prose.txt}}", "a name consists of letters", list),
    "one name twice": ("{prose.txt: 1, prose: {path: verse.txt}}", "two corpora are called prose: name them", list),
    "two tokenizers": ("{alone: 1, single: 1}", "single: its tokenizer differs from alone's", prepare_separately),
    "too small": ("{prose.txt: 1, tiny.txt: 1}", "data.mixture tiny: the training split has 36 tokens, fewer than",
                  lambda: Path("tiny.txt").write_text("so few of them\n" * 2 + "and more words\n"[:10])),
}  # fmt: skip


@pytest.mark.parametrize("case", list(WRONG))
def test_invalid_mixtures_are_refused_in_one_sentence(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    option, sentence, setup = WRONG[case]
    setup()
    assert cli.main(["--data.mixture", option, "--data.cache", "cache"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("hvdlm: ") and re.search(sentence, line), line


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["--data.sampling", "sequential"], "in shuffled order, and data.sampling is sequential"),
        (["--data.path", "prose.txt"], "data.mixture: data.path and data.validation_path are given too"),
        (["--data.validation_path", "prose.txt"], "data.path and data.validation_path are given too"),
        (["--task", "translation"], "data.mixture: the task translation doesn't support mixtures"),
    ],
)
def test_options_incompatible_with_a_mixture_are_refused(
    options: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["--data.mixture", "{prose.txt: 1, verse.txt: 1}", *options]) == 2
    assert sentence in capsys.readouterr().err


# Validation


def test_validation_reports_each_corpus_and_the_weighted_mean() -> None:
    config = Config(data=data({"prose.txt": 3, "verse.txt": 1}, context=32))
    task = LanguageModel(config)
    batches = [batch for rank in range(2) for batch in task.validation(rank, 2)]
    expected = {corpus.name: len(corpus.data.validation) - 1 for corpus in task._corpora}
    counted: Counter[str] = Counter()
    for batch in batches:
        counted[batch.corpus] += batch.tokens
    assert counted == expected
    figures = task.metrics({"prose/loss": 300.0, "prose/tokens": 100.0, "verse/loss": 10.0, "verse/tokens": 10.0})
    assert figures["val_loss/prose"] == 3 and figures["val_loss/verse"] == 1
    assert figures["val_loss"] == 0.75 * 3 + 0.25 * 1 and figures["perplexity"] == math.exp(2.5)
    assert figures["bits_per_byte"] == pytest.approx(2.5 / math.log(2))  # characters of one byte


RUN = """
data:
  mixture:
    prose: {{path: [{folder}/prose.txt], weight: 3}}
    verse: {{path: {folder}/verse.txt}}
  cache: {folder}/cache
  context: 32
model: {{layers: 1, width: 32, heads: 2}}
train: {{steps: 12, batch_size: 8, warmup: 2, schedule: constant, eval_every: 6}}
log: {{every: 1, tensorboard: false}}
"""


def test_a_mixture_trains_alike_in_every_setup(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(RUN.format(folder=tmp_path))

    def train(framework: str, ranks: int, *options: str) -> tuple[list[float], dict[str, float]]:
        run = tmp_path / f"{framework}-{ranks}"
        command = ["-m", "hvdlm", "--config", str(tmp_path / "run.yaml"), "--framework", framework]
        done = launch("mpirun", ranks, [*command, "--log.run", str(run), *options])
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert re.search(r"val_loss/prose \d\.\d{4}, val_loss/verse \d\.\d{4}", done.stdout)
        return losses(run), json.loads((run / "summary.json").read_text())

    expected, summary = train("torch", 1)
    assert summary["val_loss"] == pytest.approx(0.75 * summary["val_loss/prose"] + 0.25 * summary["val_loss/verse"])
    train("tensorflow", 2, "--train.steps", "6")
    for curve, other_summary in (train("torch", 2), train("tensorflow", 2, "--checkpoint.resume", "auto")):
        assert len(curve) == 12
        np.testing.assert_allclose(curve, expected, atol=1e-4)
        for name in ("val_loss", "val_loss/prose", "val_loss/verse"):
            assert other_summary[name] == pytest.approx(summary[name], abs=1e-4)
