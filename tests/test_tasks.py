"""Translation, speech and digits: batches, metrics and responses on real files, and training on real ranks."""

from __future__ import annotations

import gzip
import json
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from builders import write_idx, write_wav
from hvdlm import cli
from hvdlm.config import Config
from hvdlm.errors import HvdlmError
from hvdlm.protocols.types import Batch
from hvdlm_tasks.digits import Digits
from hvdlm_tasks.items import ShuffledItems, spread
from hvdlm_tasks.mel import frame_count, log_mel
from hvdlm_tasks.recordings import WORDS, read_recordings
from hvdlm_tasks.speech import Speech, SpeechOptions
from hvdlm_tasks.translation import Translation, TranslationOptions
from launching import launch, losses, run_python

RATE = 8000


def summed(task: Any, trainable: Any, ranks: int) -> dict[str, float]:
    """Return the sums over the validation batches of ``ranks`` ranks, as the loop adds them up."""
    sums: Counter[str] = Counter()
    for rank in range(ranks):
        for batch in task.validation(rank, ranks):
            sums.update({"loss": 1.0 * batch.tokens, "tokens": batch.tokens, **task.count(trainable, batch)})
    return dict(sums)


def assert_same(a: Batch, b: Batch) -> None:
    for left, right in ((a.inputs, b.inputs), (a.targets, b.targets), (a.weights, b.weights)):
        np.testing.assert_array_equal(left, right)
    for name, array in a.features.items():
        np.testing.assert_array_equal(array, b.features[name])


def concatenate(batches: list[Batch]) -> Batch:
    def join(arrays: list[Any]) -> Any:
        return None if arrays[0] is None else np.concatenate(arrays)

    features = {name: np.concatenate([p.features[name] for p in batches]) for name in batches[0].features}
    first = [join([getattr(p, name) for p in batches]) for name in ("inputs", "targets", "weights")]
    return Batch(*first, True, features)


# Items


def test_a_part_of_the_items_is_spread_over_all() -> None:
    targets = np.arange(1, 101)
    assert spread(targets, None).tolist() == spread(targets, 5050).tolist() == list(range(100))
    assert spread(targets, 505).tolist() == list(range(0, 100, 10))
    assert spread(targets, 1).tolist() == [0] and len(spread(targets, 5049)) == 100


def test_every_item_comes_once_an_epoch() -> None:
    items = ShuffledItems(23, 4, 7)
    rows = np.concatenate([items.rows(row, row + 4)[0] for row in range(0, 92, 4)])
    for epoch in range(4):
        assert sorted(rows[epoch * 23 : (epoch + 1) * 23]) == list(range(23))
    assert list(rows[:23]) != list(rows[23:46])
    selected, blocks = items.rows(11, 18)
    assert list(selected) == list(rows[11:18]) and list(blocks) == list(rows[8:20])


def test_batches_hold_items_of_similar_length() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, 1000)
    items = ShuffledItems(1000, 10, 1, lengths)
    batches = [lengths[items.rows(row, row + 10)[0]] for row in range(0, 1000, 10)]
    assert sorted(np.concatenate(batches)) == sorted(lengths)
    assert np.mean([b.max() - b.min() for b in batches]) < 5
    firsts = [b[0] for b in batches[:60]]
    assert firsts != sorted(firsts)


# Translation

GERMAN = ["ein Hund läuft .", "eine Katze schläft .", "zwei Hunde laufen im Schnee .", "ein Mann liest ein Buch ."]
ENGLISH = ["a dog runs .", "a cat sleeps .", "two dogs run in the snow .", "a man reads a book ."]


@pytest.fixture
def pairs(tmp_path: Path) -> Config:
    for name, times in (("train", 30), ("val", 2)):
        (tmp_path / f"{name}.de").write_text("\n".join(GERMAN * times) + "\n")
        with gzip.open(tmp_path / f"{name}.en.gz", "wt") as file:
            file.write("\n".join(ENGLISH * times) + "\n")
    config = Config(task="translation")
    config.data.path = [str(tmp_path / "train.de"), str(tmp_path / "train.en.gz")]
    config.data.validation_path = [str(tmp_path / "val.de"), str(tmp_path / "val.en.gz")]
    config.data.tokenizer, config.data.vocab_size, config.train.batch_size = "bpe", 300, 8
    config.train.eval_batch_size = 3
    return config


def translations(task: Translation, batch: Batch) -> list[str]:
    """Return the translations in a batch."""
    assert batch.weights is not None
    rows = zip(batch.targets, batch.weights, strict=True)
    return [task.tokenizer.decode(row[: int(w.sum()) - 1].tolist()) for row, w in rows]


def test_translation_rows_do_not_depend_on_the_ranks(pairs: Config) -> None:
    task = Translation(pairs)
    whole = task.rows(24, 32)
    assert_same(whole, concatenate([task.rows(first, first + 2) for first in range(24, 32, 2)]))
    two_batches = translations(task, task.rows(28, 32)) + translations(task, task.rows(32, 36))
    assert translations(task, task.rows(28, 36)) == two_batches
    assert whole.weights is not None
    for row in range(8):
        count, read = int(whole.weights[row].sum()), int(whole.features["source_length"][row])
        target, source = whole.targets[row, :count], whole.features["source"][row, :read]
        assert target[-1] == source[-1] == task.vocab - 1 and whole.inputs[row, 0] == task.vocab - 2
        np.testing.assert_array_equal(whole.inputs[row, 1:count], target[:-1])
        german, english = task.tokenizer.decode(source[:-1]), task.tokenizer.decode(target[:-1])
        assert ENGLISH[GERMAN.index(german)] == english


class KnowsTargets:
    """A model that writes the target tokens of each row; if ``wrong``, with a wrong word in long rows."""

    def __init__(self, task: Translation, wrong: bool = False) -> None:
        self._task, self._wrong = task, wrong

    def read(self, batch: Batch) -> list[list[int]]:
        assert batch.weights is not None
        rows = [row[: int(w.sum())].tolist() for row, w in zip(batch.targets, batch.weights, strict=True)]
        changed = self._task.tokenizer.encode("cow").tolist()
        return [changed + row[2:] if self._wrong and len(row) > 8 else row for row in rows]

    def select(self, cache: list[list[int]], rows: np.ndarray) -> list[list[int]]:
        return [cache[i] for i in rows]

    def logits(self, tokens: np.ndarray, cache: list[list[int]]) -> tuple[np.ndarray, Any]:
        scores = np.zeros((len(cache), self._task.vocab), np.float32)
        for row, left in zip(scores, cache, strict=True):
            row[left[0] if left else self._task.vocab - 1] = 50
        return scores, [left[1:] for left in cache]


def test_bleu_equals_sacrebleu_on_any_number_of_ranks(pairs: Config) -> None:
    from sacrebleu.metrics import BLEU

    pairs.plugin_options = {"translation": TranslationOptions(beams=2)}
    task = Translation(pairs)
    model: Any = KnowsTargets(task, True)
    written = {
        i: text
        for rank in task.validation(0, 1)
        for i, text in zip(rank.items, _written(task, model, rank), strict=True)
    }
    expected = BLEU().corpus_score([written[i] for i in range(8)], [ENGLISH * 2]).score
    assert 10 < expected < 100
    for ranks in (1, 2, 3):
        figures = task.metrics(summed(task, model, ranks))
        assert figures["bleu"] == pytest.approx(expected) and figures["val_loss"] == pytest.approx(1.0)


def _written(task: Translation, model: Any, batch: Batch) -> list[str]:
    return [task.tokenizer.decode(ids[:-1]) for ids in model.read(batch)]


def test_prompts_are_translated_line_by_line(pairs: Config) -> None:
    task = Translation(pairs)
    answer = task.respond(KnowsTargets(task), "\n".join(GERMAN[:2]))  # type: ignore[arg-type]
    assert answer == "\n".join(GERMAN[:2])  # the targets of a prompt are the prompt itself


# Speech


def tone(path: Path, hertz: float, seconds: float = 0.2, rate: int = RATE) -> None:
    samples = 0.5 * 32767 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)
    write_wav(path, samples, rate)


@pytest.fixture
def digits_folder(tmp_path: Path) -> Path:
    """Return a folder of tones under the names of spoken digits: 3 digits, 12 recordings of each."""
    folder = tmp_path / "recordings"
    folder.mkdir()
    random = np.random.default_rng(0)
    for digit in range(3):
        for index in range(12):
            seconds = 0.15 + 0.1 * random.random()
            tone(folder / f"{digit}_anna_{index}.wav", 400 + 900 * digit + 20 * random.random(), seconds)
    return folder


def speech(path: Path, **options: int) -> Speech:
    config = Config(task="speech")
    config.data.path, config.train.batch_size, config.train.eval_batch_size = str(path), 6, 4
    config.plugin_options = {"speech": SpeechOptions(**options)}
    return Speech(config)


def mel(hertz: float) -> float:
    return 2595 * float(np.log10(1 + hertz / 700))


@pytest.mark.parametrize("hertz", [300, 1000, 3000])
def test_a_tone_is_loudest_in_its_mel_band(hertz: int) -> None:
    sound = np.sin(2 * np.pi * hertz * np.arange(4000) / RATE).astype(np.float32)
    frames = log_mel(sound, RATE, 40)
    assert frames.shape == (frame_count(4000, RATE), 40) and frames.dtype == np.float32
    assert abs(frames.mean()) < 1e-4 and frames.std() == pytest.approx(1, abs=0.01)
    expected = 41 * mel(hertz) / mel(RATE / 2) - 1
    assert abs(int(frames[30].argmax()) - expected) <= 1


def test_folders_and_tar_files_of_digits_are_read_alike(digits_folder: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "all.tar", "w") as archive:
        archive.add(digits_folder, "recordings")
    one, other = (read_recordings([str(path)], "data.path") for path in (digits_folder, tmp_path / "all.tar"))
    assert one.digest == other.digest and one.rate == RATE
    assert Counter((item.text, item.held_out) for item in one.items) == {
        (word, held): 5 if held else 7 for word in WORDS[:3] for held in (True, False)
    }


def test_utterances_are_joined_alike_on_all_ranks(digits_folder: Path) -> None:
    task = speech(digits_folder, shortest=2, longest=4, validation_shortest=3, validation_longest=3)
    whole = task.rows(30, 36)
    assert_same(whole, concatenate([task.rows(30, 32), task.rows(32, 36)]))
    assert whole.weights is not None and whole.features["frames"].shape[1] % 64 == 0
    for row in range(6):
        text = task.tokenizer.decode(whole.targets[row, : int(whole.weights[row].sum())].tolist())
        assert 2 <= len(text.split()) <= 4 and set(text.split()) <= set(WORDS[:3])
    held = [b for rank in range(2) for b in task.validation(rank, 2)]
    assert sum(len(b.targets) for b in held) == 15
    assert_same(
        next(task.validation(0, 1)),
        next(speech(digits_folder, validation_shortest=3, validation_longest=3).validation(0, 1)),
    )
    assert not np.array_equal(task.rows(30, 36).features["frames"], task.rows(36, 42).features["frames"])


class KnowsTranscripts:
    """A CTC model that emits each target character twice; if ``wrong``, it changes texts that begin with two."""

    def __init__(self, task: Speech, wrong: bool) -> None:
        self._task, self._wrong = task, wrong

    def predict(self, batch: Batch) -> np.ndarray:
        scores = np.zeros((len(batch.targets), batch.features["frames"].shape[1], self._task.vocab), np.float32)
        for row, (target, weights) in enumerate(zip(batch.targets, batch.weights, strict=True)):
            text = self._task.tokenizer.decode(target[weights > 0].tolist())
            text = f"one{text[text.index(' ') :]} one" if self._wrong and text.startswith("two") else text
            path = [i for token in self._task.tokenizer.encode(text) for i in (token, token, 0)]
            batch.features["frame_count"][row] = 2 * len(path)
            scores[row, np.arange(len(path)), path] = 9
        return scores


def test_word_errors_are_counted_over_all_ranks(digits_folder: Path) -> None:
    task = speech(digits_folder, validation_shortest=2, validation_longest=3)
    right = task.metrics(summed(task, KnowsTranscripts(task, False), 1))
    assert right["word_error_rate"] == 0 and right["accuracy"] == 1
    texts = [
        task.tokenizer.decode(row[w > 0].tolist()).split()
        for b in task.validation(0, 1)
        for row, w in zip(b.targets, b.weights, strict=True)  # type: ignore[arg-type]
    ]
    bad = [words for words in texts if words[0] == "two"]
    assert 0 < len(bad) < len(texts)
    for ranks in (1, 2):
        wrong = task.metrics(summed(task, KnowsTranscripts(task, True), ranks))
        assert wrong["word_error_rate"] == pytest.approx(2 * len(bad) / sum(map(len, texts)))
        assert wrong["accuracy"] == pytest.approx(1 - len(bad) / len(texts))


def test_lists_of_recordings_with_texts_are_read(tmp_path: Path) -> None:
    for i in range(10):
        tone(tmp_path / f"{i}.wav", 500)
    lines = [json.dumps({"audio": f"{i}.wav", "text": "hello there"}) for i in range(10)]
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    task = speech(tmp_path / "list.jsonl")
    assert sum(len(b.targets) for b in task.validation(0, 1)) == 1  # the last tenth
    assert task.tokenizer.decode(range(1, task.vocab)) == " ehlort"


# Digits


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    """Return a folder of images in MNIST's format: digit d has a bright bar in row 2 d."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 10, 400)
    images = random.integers(0, 40, (400, 28, 28))
    images[np.arange(400), 2 * labels + 2] = 250
    write_idx(tmp_path / "t10k-images-idx3-ubyte.gz", images)
    write_idx(tmp_path / "t10k-labels-idx1-ubyte.gz", labels)
    return tmp_path


def test_digits_hold_out_the_last_share_and_report_accuracy(mnist: Path) -> None:
    config = Config(task="digits")
    config.data.path, config.data.validation_share, config.train.batch_size = str(mnist), 0.25, 8
    task = Digits(config)
    held = [b for rank in range(3) for b in task.validation(rank, 3)]
    assert sum(len(b.targets) for b in held) == 100
    assert_same(task.rows(16, 24), concatenate([task.rows(16, 20), task.rows(20, 24)]))
    image = task.rows(0, 1)
    bright = int(image.features["images"][0].mean(1).argmax())
    assert image.targets[0, 0] == (bright - 2) // 2 and image.features["images"].dtype == np.float32

    class Bars:
        def predict(self, batch: Batch) -> np.ndarray:
            rows = (batch.features["images"].mean(2).argmax(1) - 2) // 2
            return np.eye(10)[np.where(rows == 3, 4, rows)][:, None]

    threes = sum(int((b.targets == 3).sum()) for b in held)
    figures = task.metrics(summed(task, Bars(), 2))
    assert figures["accuracy"] == pytest.approx(1 - threes / 100) and 0 < threes < 100
    labels = gzip.decompress((mnist / "t10k-labels-idx1-ubyte.gz").read_bytes())[8:]
    answer = task.respond(Bars(), str(mnist / "t10k-images-idx3-ubyte.gz"))  # type: ignore[arg-type]
    assert answer == "".join(map(str, labels)).replace("3", "4")


# Training

APPLICATIONS = {
    "digits": ("--model.name", "convnet", "--train.learning_rate", "0.003"),
    "speech": ("--model.name", "ctc", "--speech.longest", "2", "--train.learning_rate", "0.003"),
    "translation": ("--model.name", "seq2seq", "--translation.beams", "2", "--train.learning_rate", "0.003")
    + ("--data.context", "32"),  # as many tokens are decoded before a model has learnt to end
}


@pytest.fixture
def data(request: pytest.FixtureRequest, application: str) -> list[str]:
    """Return the options that name an application's data."""
    if application == "translation":
        config = request.getfixturevalue("pairs")
        paths = [f"[{','.join(group)}]" for group in (config.data.path, config.data.validation_path)]
        return ["--data.path", paths[0], "--data.validation_path", paths[1], "--data.tokenizer", "bpe"]
    return ["--data.path", str(request.getfixturevalue("mnist" if application == "digits" else "digits_folder"))]


@pytest.mark.parametrize("application", APPLICATIONS)
def test_applications_train_alike_in_both_frameworks(application: str, data: list[str], tmp_path: Path) -> None:
    options = ["-m", "hvdlm", "--task", application, *APPLICATIONS[application], *data, "--data.vocab_size", "300"]
    options += ["--model.layers", "1", "--model.width", "16", "--model.heads", "2", "--train.batch_size", "8"]
    options += ["--train.warmup", "5", "--train.schedule", "constant", "--log.every", "1", "--train.epsilon", "1e-4"]

    def train(framework: str, ranks: int, name: str, *arguments: str) -> Path:
        run = tmp_path / name
        done = launch("threads", ranks, [*options, "--framework", framework, "--log.run", str(run), *arguments])
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        return run

    one = train("torch", 1, "one", "--train.steps", "12")
    two = train("tensorflow", 2, "two", "--train.steps", "8", "--parallel.zero", "1")
    assert losses(two) == pytest.approx(losses(one)[:8], abs=5e-5)
    # The checkpoint of two ranks resumes in the other framework on one rank.
    train("torch", 1, "two", "--train.steps", "12", "--checkpoint.resume", "auto")
    assert losses(two)[8] == pytest.approx(losses(one)[8], abs=2e-3)
    summary = json.loads((one / "summary.json").read_text())
    figure = {"digits": "accuracy", "speech": "word_error_rate", "translation": "bleu"}[application]
    assert 0 <= summary[figure] <= 100 and losses(one)[-1] < losses(one)[0]
    prompts = {"digits": data[1] + "/t10k-images-idx3-ubyte.gz", "speech": data[1] + "/1_anna_0.wav"}
    prompt = prompts.get(application, "ein Hund läuft .")
    generated = run_python(["-m", "hvdlm", "generate", "--run", str(one), "--prompt", prompt])
    assert generated.returncode == 0, generated.stderr


# Bad input


def refused(kind: Any, **data: Any) -> str:
    config = Config()
    for name, value in data.items():
        setattr(config.data, name, value)
    with pytest.raises(HvdlmError) as caught:
        kind(config)
    return str(caught.value)


def test_invalid_translation_data_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("one\ntwo\n")
    (tmp_path / "b").write_text("eins\n")
    (tmp_path / "c").write_bytes(b"\xff\xfe\n")
    a, b, c = (str(tmp_path / name) for name in "abc")
    assert "two files, the source and its translation" in refused(Translation, path=[a])
    assert "has 2 lines" in refused(Translation, path=[a, b])
    assert "data.validation_path: the task" in refused(Translation, path=[a, a])
    assert "give a readable UTF-8 text" in refused(Translation, path=[a, c])
    assert "No such file" in refused(Translation, path=[a, f"{a}x"])
    packed = gzip.compress(b"eins\nzwei\n" * 1000)
    for name, content in {"cut": packed[:-9], "torn": packed[:20] + b"\0" * 9 + packed[29:], "no": b"eins"}.items():
        (tmp_path / f"{name}.gz").write_bytes(content)
        assert "give a readable UTF-8 text" in refused(Translation, path=[a, str(tmp_path / f"{name}.gz")])
    (tmp_path / "bomb.gz").write_bytes(gzip.compress(bytes(9 << 23)))
    assert "unpacks to more than" in refused(Translation, path=[a, str(tmp_path / "bomb.gz")])


def test_invalid_recordings_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "recordings"
    folder.mkdir()
    assert "no recordings" in refused(Speech, path=str(folder))
    (folder / "1_anna_0.wav").write_bytes(b"RIFF nothing")
    assert "give WAV files of 16 bits" in refused(Speech, path=str(folder))
    write_wav(folder / "1_anna_0.wav", np.zeros(100), width=4)
    assert "samples of 32 bits" in refused(Speech, path=str(folder))
    tone(folder / "1_anna_0.wav", 400)
    tone(folder / "1_anna_1.wav", 400, rate=16000)
    assert "has 16000 samples a second, others 8000" in refused(Speech, path=str(folder))
    (tmp_path / "list.jsonl").write_text('{"audio": "x.wav"}\n')
    assert 'line 1: expected {"audio"' in refused(Speech, path=str(tmp_path / "list.jsonl"))
    (tmp_path / "list.jsonl").write_text('{"audio": "recordings/1_anna_0.wav", "text": " "}\n')
    assert "its transcript is empty" in refused(Speech, path=str(tmp_path / "list.jsonl"))


def test_invalid_images_are_refused(tmp_path: Path) -> None:
    assert "name the folder" in refused(Digits, path=str(tmp_path / "nowhere"))
    assert "holds neither" in refused(Digits, path=str(tmp_path))
    write_idx(tmp_path / "t10k-images-idx3-ubyte.gz", np.zeros((3, 28, 28)))
    write_idx(tmp_path / "t10k-labels-idx1-ubyte.gz", np.zeros(2))
    assert "3 images of t10k have 2 labels" in refused(Digits, path=str(tmp_path))
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(b"nonsense"))
    assert "not an idx file of 1 dimension" in refused(Digits, path=str(tmp_path))
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(9999))[:-9])
    assert "can't be unpacked" in refused(Digits, path=str(tmp_path))
    write_idx(tmp_path / "t10k-images-idx3-ubyte.gz", np.zeros((2, 40, 28)))
    write_idx(tmp_path / "t10k-labels-idx1-ubyte.gz", np.zeros(2))
    assert "40 x 28 pixels, expected 8 x 8 to 28 x 28" in refused(Digits, path=str(tmp_path))
    write_idx(tmp_path / "t10k-images-idx3-ubyte.gz", np.zeros((2, 1, 1)))  # millions would be padded to fill memory
    assert "1 x 1 pixels, expected 8 x 8 to 28 x 28" in refused(Digits, path=str(tmp_path))


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["--task", "translation"], "reads tokens alone, task translation gives source, source_length"),
        (["--model.name", "ctc"], "reads frames, frame_count, task language_model gives tokens alone"),
        (["--task", "translation", "--translation.beams", "0"], "translation.beams has to be 1 or more"),
        (["--task", "speech", "--model.name", "ctc", "--speech.longest", "0"], "speech.shortest 1: expected"),
        (["--task", "digit"], "digits"),
        (["--task", "translation", "--speech.longest", "2"], "--speech.longest"),
        (["--train.label_smoothing", "1"], "train.label_smoothing is 1"),
        (["--model.name", "seq2seq", "--model.width", "30"], "model.width 30 is not a multiple of model.heads 4"),
    ],
)
def test_incompatible_settings_are_refused_in_one_sentence(
    options: list[str], sentence: str, pairs: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [f"[{','.join(group)}]" for group in (pairs.data.path, pairs.data.validation_path)]
    given = ["--data.path", paths[0], "--data.validation_path", paths[1]] if "translation" in options else []
    assert cli.main([*options, *given, "--log.run", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1 and not (tmp_path / "run").exists(), error
