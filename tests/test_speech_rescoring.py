"""CTC prefix beam search, and rescoring of its texts with a language model."""

from __future__ import annotations

import json
from functools import cache
from itertools import groupby, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from builders import (
    both_frameworks,
    configured_spec,
    next_token_batch,
    save_checkpoint,
    single_rank_trainable,
    write_wav,
)
from hvdlm import cli, plugins
from hvdlm.checkpoints.base_weights import attach
from hvdlm.config import Config, LoRAConfig, ModelConfig
from hvdlm.data.tokenizer_base import Tokenizer
from hvdlm.data.tokenizers import ByteTokenizer
from hvdlm.protocols.types import Batch
from hvdlm_backends.local import LocalWorld
from hvdlm_corpora.bpe_tokenizer import BPETokenizer
from hvdlm_corpora.tokenizers import CharTokenizer
from hvdlm_language import likelihood
from hvdlm_language.likelihood import log_softmax, sequence_logs
from hvdlm_language.scorer import open_scorer
from hvdlm_tasks.ctc_beam import Transcript, prefix_beam_search
from hvdlm_tasks.models.ctc import output_frames
from hvdlm_tasks.rescoring import rescore
from hvdlm_tasks.speech import SpeechOptions
from launching import launch

# Prefix beam search


def random_logs(rows: int, time: int, vocab: int, scale: float = 2.0) -> np.ndarray:
    return log_softmax(np.random.default_rng([rows, time, vocab]).standard_normal((rows, time, vocab)) * scale)


def every_text(logs: np.ndarray) -> dict[tuple[int, ...], float]:
    """Return the log-probability of every text that frames ``[time, vocab]`` can spell: the sum over all alignments."""
    texts: dict[tuple[int, ...], float] = {}
    for path in product(range(logs.shape[1]), repeat=len(logs)):
        text = tuple(character for character, _ in groupby(path) if character)
        log = sum(frame[character] for frame, character in zip(logs, path, strict=True))
        texts[text] = float(np.logaddexp(texts.get(text, -np.inf), log))
    return texts


@pytest.mark.parametrize("time, vocab", [(1, 2), (6, 2), (5, 3), (4, 4)])
def test_enough_beams_sum_over_all_alignments_of_a_text(time: int, vocab: int) -> None:
    logs = random_logs(3, time, vocab)
    logs[2, 0, 1] = -np.inf  # an impossible character appears in no text
    lengths = np.array([time, time - 1, time])
    for row, readings in enumerate(prefix_beam_search(logs, lengths, 200)):
        expected = {text: log for text, log in every_text(logs[row, : lengths[row]]).items() if np.isfinite(log)}
        assert {tuple(r.ids): r.log_probability for r in readings} == pytest.approx(expected, abs=1e-12)
        assert [r.log_probability for r in readings] == sorted((r.log_probability for r in readings), reverse=True)
        assert np.logaddexp.reduce([r.log_probability for r in readings]) == pytest.approx(0, abs=1e-12) or row == 2


def test_few_beams_underestimate_distinct_texts() -> None:
    logs = random_logs(8, 7, 3)
    for row, readings in enumerate(prefix_beam_search(logs, np.full(8, 7), 4)):
        exact = every_text(logs[row])
        assert len(readings) == 4 == len({tuple(r.ids) for r in readings})
        assert all(r.log_probability <= exact[tuple(r.ids)] + 1e-12 for r in readings)


def test_peaked_scores_give_the_greedy_path() -> None:
    random = np.random.default_rng(0)
    path = random.integers(0, 5, (4, 30))
    logs = log_softmax(random.standard_normal((4, 30, 5)) + 20 * np.eye(5)[path])
    for row, (first, *_) in enumerate(prefix_beam_search(logs, np.full(4, 30), 3)):
        assert first.ids == [int(character) for character, _ in groupby(path[row]) if character]


def test_a_row_ignores_its_neighbours_and_padding() -> None:
    logs, lengths = random_logs(5, 12, 6), np.array([12, 3, 0, 7, 12])
    whole = prefix_beam_search(logs, lengths, 4)
    assert whole[2] == [Transcript(0.0, [])]
    for row, length in enumerate(lengths):
        assert prefix_beam_search(logs[row : row + 1, :length], lengths[row : row + 1], 4)[0] == whole[row]


def test_one_beam_gives_one_text() -> None:
    (readings,) = prefix_beam_search(random_logs(1, 9, 4), np.array([9]), 1)
    assert len(readings) == 1


# Log-probabilities of sequences


class Trigrams:
    """A causal model whose scores depend on the last two ids; it records the shapes of its batches."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def predict(self, batch: Batch) -> np.ndarray:
        self.shapes.append(batch.inputs.shape)
        before = np.pad(batch.inputs, ((0, 0), (1, 0)))[:, :-1]
        table = np.random.default_rng(3).standard_normal((7, 7, 7)).astype(np.float32)
        return table[before, batch.inputs]


@pytest.mark.parametrize("scores", [1, 1 << 22])
def test_sequences_of_any_length_are_scored_in_windows(scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(likelihood, "_MAX_LOGITS", scores)
    random, model = np.random.default_rng(0), Trigrams()
    rows = [random.integers(0, 7, n).astype(np.int32) for n in (5, 2, 41, 3, 17, 40)]
    for given in (1, 2):
        sums = sequence_logs(model, rows, given, 10**9, 7)  # type: ignore[arg-type]
        for log, row in zip(sums, rows, strict=True):
            logs = log_softmax(model.predict(Batch(row[None, :-1], row[None, 1:])))[0]
            assert log == pytest.approx(logs[np.arange(len(row) - 1), row[1:]][given - 1 :].sum())
    # The model depends on two ids: any context of 4 or more gives the same scores.
    model.shapes.clear()
    in_windows = sequence_logs(model, rows, 1, 8, 7)  # type: ignore[arg-type]
    assert max(time for _, time in model.shapes) == 8
    assert in_windows == pytest.approx(sequence_logs(model, rows, 1, 99, 7))  # type: ignore[arg-type]


# Rescoring


class OneLikelyText:
    """A language model that gives one text a high probability."""

    fingerprint = "stub"

    def __init__(self, text: str) -> None:
        self._text, self.asked = text, [""]

    def logs(self, texts: Any) -> np.ndarray:
        self.asked = list(texts)
        return np.array([-1.0 if text == self._text else -9.0 for text in texts])


ROWS = [[(-1.0, "two cats"), (-2.0, "too cats"), (-5.0, "twocats")], [(-0.1, "too cats"), (-3.0, "a b c")]]


@pytest.mark.parametrize(
    "text, weight, bonus, expected",
    [
        (None, 0.5, 0.0, ["two cats", "too cats"]),
        (None, 0.5, 4.0, ["two cats", "a b c"]),
        (None, 0.5, -5.0, ["twocats", "too cats"]),
        ("too cats", 0.5, 0.0, ["too cats", "too cats"]),
        ("too cats", 0.1, 0.0, ["two cats", "too cats"]),
        ("twocats", 1.0, 0.0, ["twocats", "too cats"]),
    ],
)
def test_acoustic_language_and_word_scores_are_added(
    text: str | None, weight: float, bonus: float, expected: list[str]
) -> None:
    scorer = None if text is None else OneLikelyText(text)
    assert rescore(ROWS, scorer, weight, bonus) == expected
    assert scorer is None or scorer.asked == ["two cats", "too cats", "twocats", "a b c"]


# Trained language models

LINES, STEPS = ["red bat", "one cat"], 240
TOKENIZERS: dict[str, tuple[str, Tokenizer]] = {
    "gpt": ("torch", CharTokenizer("\n abcdenorst")),
    "gru": ("tensorflow", ByteTokenizer()),
    "llama": ("torch", BPETokenizer.train([f"{line}\n" for line in LINES], 270)),
    "gpt with adapters": ("tensorflow", CharTokenizer("\n abcdenorst")),
}


def train(folder: Path, framework: str, model: str, tokenizer: Tokenizer) -> Path:
    """Train a language model on ``LINES``, or adapters to one; save it as a run does."""
    model, _, adapters = model.partition(" with ")
    config = Config(framework=framework, model=ModelConfig(name=model, layers=1, width=32, heads=2))
    config.data.context, config.train.batch_size, config.train.warmup = 12, 8, 0
    config.lora = LoRAConfig(rank=8 if adapters else None, layers=["*.weight"] if adapters else None)
    spec, base = attach(configured_spec(config, tokenizer.vocab), None, config.train.seed)
    trainable = single_rank_trainable(spec, config)
    random = np.random.default_rng(0)
    tokens = tokenizer.encode("".join(f"{LINES[i]}\n" for i in random.integers(0, 2, 200)))
    for step in range(STEPS):
        starts = random.integers(0, len(tokens) - 13, 8)
        windows = np.stack([tokens[start : start + 13] for start in starts])
        trainable.train_step([next_token_batch(windows)], 0.02, step)
    meta = {"config": config.to_dict(), "tokenizer": tokenizer.hash, "vocab": tokenizer.vocab}
    meta |= {"base": base} if base else {}
    save_checkpoint(folder / "checkpoints", STEPS, trainable.state(), meta, LocalWorld(), trainable.shards())
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer.to_json()))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return runs of language models by the names in ``TOKENIZERS``."""
    folder = tmp_path_factory.mktemp("runs")
    return {name: train(folder / name, framework, name, tok) for name, (framework, tok) in TOKENIZERS.items()}


@cache
def scorer(framework: str, run: Path) -> Any:
    config = Config(framework=framework, backend="local")
    return open_scorer("speech.language_model", str(run), " abcdenorst", config)


@pytest.mark.parametrize("model", TOKENIZERS)
def test_log_probabilities_agree_across_frameworks(model: str, runs: dict[str, Path]) -> None:
    texts = ["red bat", "red cat", "", "one cat one cat one cat", " tab"]
    logs = {framework: scorer(framework, runs[model]).logs(texts) for framework in ("torch", "tensorflow")}
    np.testing.assert_allclose(logs["torch"], logs["tensorflow"], rtol=1e-5, atol=1e-4)
    values = logs["torch"]
    assert values[0] > values[1] + 1 and (values < 0).all() and np.isfinite(values).all()
    np.testing.assert_allclose(scorer("torch", runs[model]).logs(texts[1:2]), values[1:2], rtol=1e-5)


@both_frameworks
@pytest.mark.parametrize("model", TOKENIZERS)
def test_a_texts_score_is_the_loss_of_its_line(framework: str, model: str, runs: dict[str, Path]) -> None:
    opened, tokenizer = scorer(framework, runs[model]), TOKENIZERS[model][1]
    ids = tokenizer.encode("\none cat\n")[None]
    loss, tokens = opened._trainable.eval_step(next_token_batch(ids))
    assert opened.logs(["one cat"])[0] == pytest.approx(-loss, abs=1e-4) and tokens == ids.size - 1


# The task


def say(folder: Path, name: str, texts: list[str]) -> Path:
    """Write recordings of one tone each, and the list of their texts."""
    folder.mkdir(exist_ok=True)
    for number in range(len(texts)):
        tone = 9000 * np.sin(np.arange(1600) * (0.3 + 0.3 * (number % 2)))
        write_wav(folder / f"{number}.wav", tone)
    lines = [json.dumps({"audio": f"{number}.wav", "text": text}) for number, text in enumerate(texts)]
    (folder / name).write_text("\n".join(lines))
    return folder / name


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return say(tmp_path_factory.mktemp("recordings"), "list.jsonl", LINES * 10)


class ConfusesBAndC:
    """A CTC model that emits each character twice, and scores b and c nearly alike, the wrong one higher."""

    def __init__(self, task: Any, texts: list[str]) -> None:
        self._task, self._texts = task, texts

    def predict(self, batch: Batch) -> np.ndarray:
        encode = self._task.tokenizer.encode
        frames = batch.features["frames"].shape[1]
        scores = np.zeros((len(batch.inputs), frames, self._task.vocab + 1), np.float32)
        for row, text in enumerate(self._texts):
            path = [i for token in encode(text) for i in (token, token, 0)]
            batch.features["frame_count"][row] = 2 * len(path)
            assert len(path) == output_frames(2 * len(path)) <= frames
            scores[row, np.arange(len(path)), path] = 9
            right, wrong = encode("bc" if "b" in text else "cb")
            alike = np.flatnonzero(np.array(path) == right)
            scores[row, alike, wrong] = 9.5
        return scores


def task(recordings: Path, framework: str, **options: Any) -> Any:
    config = Config(task="speech", framework=framework, backend="local")
    config.data.path, config.data.validation_share, config.train.eval_batch_size = str(recordings), 0.1, 8
    config.plugin_options = {"speech": SpeechOptions(**options)}
    return plugins.make(plugins.load(["speech"]), "task", "speech", config=config)


@both_frameworks
@pytest.mark.parametrize("model", ["gpt", "gru"])
def test_a_language_model_corrects_ambiguous_sounds(
    framework: str, model: str, runs: dict[str, Path], recordings: Path
) -> None:
    wrong, right = ["red cat", "one bat"], LINES
    helped = {"beams": 8, "language_model": str(runs[model])}
    for options, expected in ({}, wrong), ({"beams": 8}, wrong), (helped, right), (helped | {"word_bonus": 1.0}, right):
        made = task(recordings, framework, **options)
        (batch,) = made.validation(0, 1)
        counted = made.count(ConfusesBAndC(made, LINES), batch)
        wrongly = 2.0 if expected is wrong else 0.0
        assert counted == {"words": 4.0, "word_errors": wrongly, "utterances": 2.0, "correct": 2.0 - wrongly}
        answer = made.respond(ConfusesBAndC(made, LINES[:1]), str(recordings.parent / "0.wav"))
        assert answer == expected[0]


def test_the_fingerprint_covers_the_language_model(runs: dict[str, Path], recordings: Path) -> None:
    prints = {task(recordings, "torch", beams=8, language_model=str(runs[name])).fingerprint for name in runs}
    again = {task(recordings, "tensorflow", beams=8, language_model=str(runs[name])).fingerprint for name in runs}
    assert len(prints) == len(runs) and prints == again


def test_every_rank_evaluates_with_its_own_language_model(
    runs: dict[str, Path], recordings: Path, tmp_path: Path
) -> None:
    options = ["--task", "speech", "--model.name", "ctc", "--model.layers", "1", "--model.width", "16"]
    options += ["--model.heads", "2", "--train.steps", "1", "--train.batch_size", "4", "--log.tensorboard", "false"]
    options += ["--data.path", str(recordings), "--log.run", str(tmp_path), "--framework", "tensorflow"]
    options += ["--speech.beams", "3", "--speech.language_model", str(runs["gpt"]), "--data.validation_share", "0.15"]
    done = launch("threads", 2, ["-m", "hvdlm", *options])  # three utterances: one rank has more than the other
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert json.loads((tmp_path / "summary.json").read_text())["word_error_rate"] >= 0


# Bad input


LM = "--speech.language_model"


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["--speech.beams", "0"], "speech.beams 0: expected 1 or more"),
        ([LM, "RUNS/gpt"], "speech.language_model rescores several candidates: add --speech.beams 16"),
        (["--speech.word_bonus", "1"], "speech.word_bonus rescores several candidates"),
        (["--speech.beams", "4", "--speech.language_model_weight", "-1"], "language_model_weight has to be 0 or more"),
        (["--speech.beams", "4", "--speech.word_bonus", ".nan"], "speech.word_bonus a finite number"),
        (["--speech.beams", "4", LM, "RUNS/none"], "speech.language_model RUNS/none: it holds no run"),
        (["--speech.beams", "4", LM, "RUNS/empty"], "RUNS/empty: it holds no checkpoint yet"),
        (["--speech.beams", "4", LM, "RUNS/torn"], "RUNS/torn: its tokenizer.json can't be read"),
        (["--speech.beams", "4", LM, "RUNS/other"], "was trained with another tokenizer than its tokenizer.json"),
        (["--speech.beams", "4", LM, "RUNS/extra"], "holds lora, which its model gpt lacks"),
        (["--speech.beams", "4", LM, "RUNS/reads_audio"], "its model ctc reads more than text"),
        (["--speech.beams", "4", LM, "RUNS/short"], "RUNS/short: character 't' is not among the 11"),
    ],
)
def test_unusable_language_models_are_refused(
    options: list[str],
    sentence: str,
    runs: dict[str, Path],
    broken: Path,
    recordings: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = [option.replace("RUNS", str(broken if "gpt" not in option else broken.parent)) for option in options]
    given = ["--task", "speech", "--model.name", "ctc", "--data.path", str(recordings)]
    assert cli.main([*given, "--log.run", str(tmp_path / "run"), *options]) == 2
    error = capsys.readouterr().err
    assert sentence.replace("RUNS", str(broken)) in error and error.count("\n") == 1, error


@pytest.fixture(scope="module")
def broken(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of runs that can't be used as language models."""
    folder = tmp_path_factory.mktemp("broken")
    tokenizer, short = (CharTokenizer(f"\n abcdenor{letters}") for letters in ("st", "s"))

    def write(name: str, kept: Tokenizer, saved: Tokenizer | None, model: str = "gpt", **extra: np.ndarray) -> None:
        run = folder / name
        config = Config(model=ModelConfig(name=model, layers=1, width=16, heads=2))
        spec = plugins.find_model(plugins.load([model]), model)(config.model, kept.vocab, config.data.context)
        state = {f"parameters/{n}": a for n, a in (spec.initial(1) | extra).items()}
        if saved is not None:
            meta = {"config": config.to_dict(), "tokenizer": saved.hash, "vocab": kept.vocab}
            save_checkpoint(run / "checkpoints", 1, state, meta, LocalWorld())
        run.mkdir(exist_ok=True)
        (run / "tokenizer.json").write_text(json.dumps(kept.to_json()))

    write("empty", tokenizer, None)
    write("torn", tokenizer, None)
    (folder / "torn" / "tokenizer.json").write_text("{")
    write("other", tokenizer, short)
    write("extra", tokenizer, tokenizer, lora=np.zeros((2, 2), np.float32))
    write("reads_audio", tokenizer, tokenizer, "ctc")
    write("short", short, short)
    return folder
