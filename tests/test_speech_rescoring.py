"""What is said, among all that the sound allows: prefix beam search, and a language model that helps to choose."""

from __future__ import annotations

import json
import os
import wave
from collections.abc import Iterator
from functools import cache
from itertools import groupby, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hvdlm_tasks.ctc_beam import Reading, prefix_beam_search
from hvdlm_tasks.models.ctc import scored
from hvdlm_tasks.rescoring import likeliest
from hvdlm_tasks.speech import SpeechOptions

from hvdlm import cli, plugins
from hvdlm.checkpoints import load
from hvdlm.checkpoints.base_weights import attach
from hvdlm.communication.all_reduce import AllReduceExchange
from hvdlm.config import Config, LoRAConfig, ModelConfig, ParallelConfig
from hvdlm.data.tokenizers import BPETokenizer, ByteTokenizer, CharTokenizer, Tokenizer
from hvdlm.inference import scorer
from hvdlm.models.lora import adapt
from hvdlm.models.spec import builtin_models
from hvdlm.parallel.mesh import make_mesh
from hvdlm.protocols.types import Batch
from hvdlm.tasks import likelihood
from hvdlm.tasks.likelihood import log_softmax, sequence_logs
from hvdlm_backends.local import AloneGroup, LocalWorld
from launching import launch

both = pytest.mark.parametrize("framework", ["torch", "tensorflow"])


# Prefix beam search


def random_logs(rows: int, time: int, vocab: int, scale: float = 2.0) -> np.ndarray:
    return log_softmax(np.random.default_rng([rows, time, vocab]).standard_normal((rows, time, vocab)) * scale)


def every_text(logs: np.ndarray) -> dict[tuple[int, ...], float]:
    """Return the log-probability of every text that frames ``[time, vocab]`` can spell: the sum over all alignments."""
    found: dict[tuple[int, ...], float] = {}
    for path in product(range(logs.shape[1]), repeat=len(logs)):
        text = tuple(character for character, _ in groupby(path) if character)
        log = sum(frame[character] for frame, character in zip(logs, path, strict=True))
        found[text] = float(np.logaddexp(found.get(text, -np.inf), log))
    return found


@pytest.mark.parametrize("time, vocab", [(1, 2), (6, 2), (5, 3), (4, 4)])
def test_with_beams_enough_every_text_has_the_sum_over_all_its_alignments(time: int, vocab: int) -> None:
    logs = random_logs(3, time, vocab)
    logs[2, 0, 1] = -np.inf  # what can't be is not said
    lengths = np.array([time, time - 1, time])
    for row, readings in enumerate(prefix_beam_search(logs, lengths, 200)):
        expected = {text: log for text, log in every_text(logs[row, : lengths[row]]).items() if np.isfinite(log)}
        assert {tuple(r.ids): r.log for r in readings} == pytest.approx(expected, abs=1e-12)
        assert [r.log for r in readings] == sorted((r.log for r in readings), reverse=True)
        assert np.logaddexp.reduce([r.log for r in readings]) == pytest.approx(0, abs=1e-12) or row == 2


def test_few_beams_give_as_many_texts_once_each_and_never_more_than_their_probability() -> None:
    logs = random_logs(8, 7, 3)
    for row, readings in enumerate(prefix_beam_search(logs, np.full(8, 7), 4)):
        exact = every_text(logs[row])
        assert len(readings) == 4 == len({tuple(r.ids) for r in readings})
        assert all(r.log <= exact[tuple(r.ids)] + 1e-12 for r in readings)


def test_peaked_scores_say_what_the_likeliest_frames_say() -> None:
    random = np.random.default_rng(0)
    path = random.integers(0, 5, (4, 30))
    logs = log_softmax(random.standard_normal((4, 30, 5)) + 20 * np.eye(5)[path])
    for row, (first, *_) in enumerate(prefix_beam_search(logs, np.full(4, 30), 3)):
        assert first.ids == [int(character) for character, _ in groupby(path[row]) if character]


def test_a_row_s_texts_depend_on_neither_its_neighbours_nor_what_lies_beyond_its_end() -> None:
    logs, lengths = random_logs(5, 12, 6), np.array([12, 3, 0, 7, 12])
    whole = prefix_beam_search(logs, lengths, 4)
    assert whole[2] == [Reading(0.0, [])]
    for row, length in enumerate(lengths):
        assert prefix_beam_search(logs[row : row + 1, :length], lengths[row : row + 1], 4)[0] == whole[row]


def test_one_beam_follows_one_text() -> None:
    (readings,) = prefix_beam_search(random_logs(1, 9, 4), np.array([9]), 1)
    assert len(readings) == 1


# How likely sequences are


class Counts:
    """A causal model with a memory: the score of an id depends on the last two, and on where its batch begins."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def predict(self, batch: Batch) -> np.ndarray:
        self.shapes.append(batch.inputs.shape)
        before = np.pad(batch.inputs, ((0, 0), (1, 0)))[:, :-1]
        table = np.random.default_rng(3).standard_normal((7, 7, 7)).astype(np.float32)
        return table[before, batch.inputs]


@pytest.mark.parametrize("scores", [1, 1 << 22])
def test_sequences_of_any_lengths_are_scored_together_and_in_windows(
    scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(likelihood, "_SCORES", scores)
    random, model = np.random.default_rng(0), Counts()
    rows = [random.integers(0, 7, n).astype(np.int32) for n in (5, 2, 41, 3, 17, 40)]
    for given in (1, 2):
        found = sequence_logs(model, rows, given, 10**9, 7)  # type: ignore[arg-type]
        for log, row in zip(found, rows, strict=True):
            logs = log_softmax(model.predict(Batch(row[None, :-1], row[None, 1:])))[0]
            assert log == pytest.approx(logs[np.arange(len(row) - 1), row[1:]][given - 1 :].sum())
    # The model sees two ids: with any context of 4 or more, what is scored is the same.
    model.shapes.clear()
    assert sequence_logs(model, rows, 1, 8, 7) == pytest.approx(sequence_logs(model, rows, 1, 99, 7))  # type: ignore[arg-type]
    assert max(time for rows, time in model.shapes if rows and time <= 8) == 8


# Choosing


class Prefers:
    """A language model that finds one text likely."""

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
def test_sound_language_and_number_of_words_add_up(
    text: str | None, weight: float, bonus: float, expected: list[str]
) -> None:
    scorer = None if text is None else Prefers(text)
    assert likeliest(ROWS, scorer, weight, bonus) == expected
    assert scorer is None or scorer.asked == ["two cats", "too cats", "twocats", "a b c"]


# With language models that have been trained

LINES, STEPS = ["red bat", "one cat"], 240
TOKENIZERS: dict[str, tuple[str, Tokenizer]] = {
    "gpt": ("torch", CharTokenizer("\n abcdenorst")),
    "gru": ("tensorflow", ByteTokenizer()),
    "llama": ("torch", BPETokenizer.train([f"{line}\n" for line in LINES], 270)),
    "gpt with adapters": ("tensorflow", CharTokenizer("\n abcdenorst")),
}


def train(folder: Path, framework: str, model: str, tokenizer: Tokenizer) -> Path:
    """Train a language model on ``LINES``, or adapters to one, and keep it as a run does."""
    model, _, adapters = model.partition(" with ")
    config = Config(framework=framework, model=ModelConfig(name=model, layers=1, width=32, heads=2))
    config.data.context, config.train.batch_size, config.train.warmup = 12, 8, 0
    config.lora = LoRAConfig(rank=8 if adapters else None, layers=["*.weight"] if adapters else None)
    spec = adapt(builtin_models()[model](config.model, tokenizer.vocab, config.data.context), config.lora)
    spec, base = attach(spec, None, config.train.seed)
    maker = plugins.make(plugins.load([framework]), "framework", framework)
    world, exchange = LocalWorld(), AllReduceExchange(AloneGroup())
    trainable = maker.build(spec, make_mesh(1, ParallelConfig()), world, exchange, config)
    random = np.random.default_rng(0)
    tokens = tokenizer.encode("".join(f"{LINES[i]}\n" for i in random.integers(0, 2, 200)))
    for step in range(STEPS):
        starts = random.integers(0, len(tokens) - 13, 8)
        windows = np.stack([tokens[start : start + 13] for start in starts])
        trainable.train_step([Batch(windows[:, :-1], windows[:, 1:], None, True)], 0.02, step)
    meta = {"config": config.to_dict(), "tokenizer": tokenizer.hash, "vocab": tokenizer.vocab}
    meta |= {"base": base} if base else {}
    load.save(folder / "checkpoints", STEPS, trainable.state(), meta, world, trainable.shards())
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer.to_json()))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the runs of language models, by what they are."""
    folder = tmp_path_factory.mktemp("runs")
    return {name: train(folder / name, framework, name, tok) for name, (framework, tok) in TOKENIZERS.items()}


@cache
def scorer(framework: str, run: Path) -> Any:
    config = Config(framework=framework, backend="local")
    return scorer.opener(config)("speech.language_model", str(run), " abcdenorst")


@pytest.mark.parametrize("model", TOKENIZERS)
def test_both_frameworks_find_a_text_as_likely_whoever_trained_the_model(model: str, runs: dict[str, Path]) -> None:
    texts = ["red bat", "red cat", "", "one cat one cat one cat", " tab"]
    found = {framework: scorer(framework, runs[model]).logs(texts) for framework in ("torch", "tensorflow")}
    np.testing.assert_allclose(found["torch"], found["tensorflow"], rtol=1e-5, atol=1e-4)
    one = found["torch"]
    assert one[0] > one[1] + 1 and (one < 0).all() and np.isfinite(one).all()
    np.testing.assert_allclose(scorer("torch", runs[model]).logs(texts[1:2]), one[1:2], rtol=1e-5)


@both
@pytest.mark.parametrize("model", TOKENIZERS)
def test_a_text_s_score_is_the_loss_of_its_line(framework: str, model: str, runs: dict[str, Path]) -> None:
    opened, tokenizer = scorer(framework, runs[model]), TOKENIZERS[model][1]
    ids = tokenizer.encode("\none cat\n")[None]
    loss, tokens = opened._trainable.eval_step(Batch(ids[:, :-1].copy(), ids[:, 1:].copy(), None, True))
    assert opened.logs(["one cat"])[0] == pytest.approx(-loss, abs=1e-4) and tokens == ids.size - 1


# The task


def say(folder: Path, name: str, texts: list[str]) -> Path:
    """Write recordings, a tone each, and the list of what is said in them."""
    folder.mkdir(exist_ok=True)
    for number in range(len(texts)):
        with wave.open(str(folder / f"{number}.wav"), "wb") as file:
            file.setparams((1, 2, 8000, 0, "NONE", ""))
            tone = 9000 * np.sin(np.arange(1600) * (0.3 + 0.3 * (number % 2)))
            file.writeframes(tone.astype("<i2").tobytes())
    lines = [json.dumps({"audio": f"{number}.wav", "text": text}) for number, text in enumerate(texts)]
    (folder / name).write_text("\n".join(lines))
    return folder / name


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return say(tmp_path_factory.mktemp("recordings"), "list.jsonl", LINES * 10)


class Mumbles:
    """A model that hears each character twice but can't tell b from c, and would rather say the wrong one."""

    def __init__(self, task: Any, texts: list[str]) -> None:
        self._task, self._texts = task, texts

    def predict(self, batch: Batch) -> np.ndarray:
        encode = self._task.tokenizer.encode
        frames = batch.features["frames"].shape[1]
        scores = np.zeros((len(batch.inputs), frames, self._task.vocab + 1), np.float32)
        for row, text in enumerate(self._texts):
            path = [i for token in encode(text) for i in (token, token, 0)]
            batch.features["frame_count"][row] = 2 * len(path)
            assert len(path) == scored(2 * len(path)) <= frames
            scores[row, np.arange(len(path)), path] = 9
            right, wrong = encode("bc" if "b" in text else "cb")
            alike = np.flatnonzero(np.array(path) == right)
            scores[row, alike, wrong] = 9.5
        return scores


def task(recordings: Path, framework: str, **options: Any) -> Any:
    config = Config(task="speech", framework=framework, backend="local")
    config.data.path, config.data.validation_share, config.train.eval_batch_size = str(recordings), 0.1, 8
    config.plugin_options = {"speech": SpeechOptions(**options)}
    return plugins.make(plugins.load(["speech"]), "task", "speech", config=config, open_scorer=scorer.opener(config))


@both
@pytest.mark.parametrize("model", ["gpt", "gru"])
def test_a_language_model_turns_what_is_heard_into_what_was_said(
    framework: str, model: str, runs: dict[str, Path], recordings: Path
) -> None:
    wrong, right = ["red cat", "one bat"], LINES
    helped = {"beams": 8, "language_model": str(runs[model])}
    for options, expected in ({}, wrong), ({"beams": 8}, wrong), (helped, right), (helped | {"word_bonus": 1.0}, right):
        made = task(recordings, framework, **options)
        (batch,) = made.validation(0, 1)
        counted = made.count(Mumbles(made, LINES), batch)
        wrongly = 2.0 if expected is wrong else 0.0
        assert counted == {"words": 4.0, "wrong": wrongly, "rows": 2.0, "right": 2.0 - wrongly}
        said = made.respond(Mumbles(made, LINES[:1]), str(recordings.parent / "0.wav"))
        assert said == expected[0]


def test_the_language_model_is_part_of_what_ranks_have_to_agree_on(runs: dict[str, Path], recordings: Path) -> None:
    prints = {task(recordings, "torch", beams=8, language_model=str(runs[name])).fingerprint for name in runs}
    again = {task(recordings, "tensorflow", beams=8, language_model=str(runs[name])).fingerprint for name in runs}
    assert len(prints) == len(runs) and prints == again


def test_ranks_that_have_met_evaluate_with_a_language_model_each(
    runs: dict[str, Path], recordings: Path, tmp_path: Path
) -> None:
    options = ["--task", "speech", "--model.name", "ctc", "--model.layers", "1", "--model.width", "16"]
    options += ["--model.heads", "2", "--train.steps", "1", "--train.batch_size", "4", "--log.tensorboard", "false"]
    options += ["--data.path", str(recordings), "--log.run", str(tmp_path), "--framework", "tensorflow"]
    options += ["--speech.beams", "3", "--speech.language_model", str(runs["gpt"]), "--data.validation_share", "0.15"]
    done = launch("mpirun", 2, ["-m", "hvdlm", *options])  # three utterances: one rank has more than the other
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert json.loads((tmp_path / "summary.json").read_text())["word_error_rate"] >= 0


# Bad input


@pytest.fixture
def _environment() -> Iterator[None]:
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


LM = "--speech.language_model"


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["--speech.beams", "0"], "speech.beams 0: expected 1 or more"),
        ([LM, "RUNS/gpt"], "speech.language_model chooses among several texts: give --speech.beams 16"),
        (["--speech.word_bonus", "1"], "speech.word_bonus chooses among several texts"),
        (["--speech.beams", "4", "--speech.language_model_weight", "-1"], "language_model_weight is 0 or more"),
        (["--speech.beams", "4", "--speech.word_bonus", ".nan"], "speech.word_bonus any number"),
        (["--speech.beams", "4", LM, "RUNS/none"], "speech.language_model RUNS/none: there is no run"),
        (["--speech.beams", "4", LM, "RUNS/empty"], "RUNS/empty: it holds no checkpoint yet"),
        (["--speech.beams", "4", LM, "RUNS/torn"], "RUNS/torn: its tokenizer.json can't be read"),
        (["--speech.beams", "4", LM, "RUNS/other"], "was trained with another tokenizer than its tokenizer.json"),
        (["--speech.beams", "4", LM, "RUNS/more"], "holds parameters/lora, which its model gpt lacks"),
        (["--speech.beams", "4", LM, "RUNS/hears"], "its model ctc reads more than text"),
        (["--speech.beams", "4", LM, "RUNS/short"], "RUNS/short: character 't' is not among the 11"),
    ],
)
@pytest.mark.usefixtures("_environment")
def test_what_can_t_help_is_refused_in_a_sentence_before_ranks_meet(
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
    said = capsys.readouterr().err
    assert sentence.replace("RUNS", str(broken)) in said and said.count("\n") == 1, said


@pytest.fixture(scope="module")
def broken(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of runs that are no language models, or none that can help."""
    folder = tmp_path_factory.mktemp("broken")
    tokenizer, short = (CharTokenizer(f"\n abcdenor{more}") for more in ("st", "s"))

    def write(name: str, kept: Tokenizer, saved: Tokenizer | None, model: str = "gpt", **more: np.ndarray) -> None:
        run = folder / name
        config = Config(model=ModelConfig(name=model, layers=1, width=16, heads=2))
        spec = builtin_models()[model](config.model, kept.vocab, config.data.context)
        state = {f"parameters/{n}": a for n, a in (spec.initial(1) | more).items()}
        if saved is not None:
            meta = {"config": config.to_dict(), "tokenizer": saved.hash, "vocab": kept.vocab}
            load.save(run / "checkpoints", 1, state, meta, LocalWorld())
        run.mkdir(exist_ok=True)
        (run / "tokenizer.json").write_text(json.dumps(kept.to_json()))

    write("empty", tokenizer, None)
    write("torn", tokenizer, None)
    (folder / "torn" / "tokenizer.json").write_text("{")
    write("other", tokenizer, short)
    write("more", tokenizer, tokenizer, lora=np.zeros((2, 2), np.float32))
    write("hears", tokenizer, tokenizer, "ctc")
    write("short", short, short)
    return folder
