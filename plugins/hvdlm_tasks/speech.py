"""Speech recognition by characters (CTC, Graves et al. 2006)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hvdlm import hookimpl
from hvdlm.config import Config
from hvdlm.errors import HvdlmError
from hvdlm.models.spec import ModelSpec
from hvdlm.protocols.trainable import Trainable
from hvdlm.protocols.types import Batch
from hvdlm_corpora.tokenizers import CharTokenizer
from hvdlm_language.language_model import loss_figures
from hvdlm_language.likelihood import log_softmax
from hvdlm_language.padding import pad_rows, round_up
from hvdlm_language.scorer import Scorer, open_scorer
from hvdlm_tasks.ctc_beam import prefix_beam_search
from hvdlm_tasks.items import ShuffledItems, split_evenly, spread
from hvdlm_tasks.mel import HOP, frame_count, log_mel
from hvdlm_tasks.models.ctc import BANDS, READS, output_frames
from hvdlm_tasks.recordings import Recording, Recordings, read_recordings, read_sound
from hvdlm_tasks.rescoring import rescore

_BLANK = "\0"
_FRAME_MULTIPLE, _TARGET_MULTIPLE = 64, 16  # frames and characters to a multiple of which batches are padded


@dataclass
class SpeechOptions:
    """Speech recognition.

    Args:
        shortest: minimum number of recordings joined to one training utterance
        longest: maximum number of recordings joined to one training utterance
        validation_shortest: minimum number of recordings joined to one validation utterance
        validation_longest: maximum number of recordings joined to one validation utterance
        gap: maximum silence between joined recordings (seconds)
        masks: number of frequency masks, and of time masks, in training (SpecAugment, Park et al. 2019)
        beams: beam width of the prefix search; 1: greedy decoding
        language_model: run folder of a language model that rescores the candidates; null: no rescoring
        language_model_weight: weight of the language model's log-probability; the acoustic model's weight is 1
        word_bonus: nats added per word, since language models prefer short texts
    """

    shortest: int = 1
    longest: int = 1
    validation_shortest: int = 1
    validation_longest: int = 1
    gap: float = 0.1
    masks: int = 1
    beams: int = 1
    language_model: str | None = None
    language_model_weight: float = 0.5
    word_bonus: float = 0.0


class _Utterances:
    """Utterances joined from recordings: each follows from the seed, its number and its first recording."""

    def __init__(self, items: Sequence[Recording], rate: int, joined: tuple[int, int], gap: float, seed: int) -> None:
        self._items = items
        self._rate = rate
        self._joined = joined
        self._gap = gap
        self._seed = seed

    def random(self, number: int, purpose: int) -> np.random.Generator:
        """Return the generator of utterance ``number`` for one purpose: 0 its recordings, 1 its masks."""
        return np.random.default_rng([self._seed, number, purpose])

    def recordings(self, number: int, first: int) -> tuple[list[int], list[int]]:
        """Return the recordings of an utterance that begins with ``first``, and the silence after each (samples)."""
        random = self.random(number, 0)
        count = int(random.integers(self._joined[0], self._joined[1] + 1))
        others = random.integers(len(self._items), size=count - 1).tolist()
        silences = random.integers(int(self._gap * self._rate) + 1, size=count - 1).tolist()
        return [first, *others], [*silences, 0]

    def size(self, number: int, first: int) -> tuple[int, int]:
        """Return the numbers of frames and of characters of an utterance."""
        recordings, silences = self.recordings(number, first)
        samples = sum(len(self._items[i].sound) for i in recordings) + sum(silences)
        return frame_count(samples, self._rate), len(self.text(recordings))

    def text(self, recordings: Sequence[int]) -> str:
        """Return the transcript of joined recordings."""
        return " ".join(self._items[i].text for i in recordings)

    def frames(self, recordings: Sequence[int], silences: Sequence[int]) -> np.ndarray:
        """Return the log-mel features of joined recordings, float32 ``[frames, BANDS]``."""
        sounds = [np.pad(self._items[i].sound, (0, n)) for i, n in zip(recordings, silences, strict=True)]
        return log_mel(np.concatenate(sounds), self._rate, BANDS)


class Speech:
    """The task ``speech``.

    The validation split is ``data.validation_path``, or the data set's own test split, or its last share.
    """

    reads = READS

    def __init__(self, config: Config) -> None:
        self._config = config
        self._options = config.own("speech", SpeechOptions)
        recordings = read_recordings(config.data.paths, "data.path")
        train, validation, digest = _split(recordings, config)
        characters = sorted(set("".join(item.text for item in train)) | {" "})
        self.tokenizer = CharTokenizer(_BLANK + "".join(characters))
        self.vocab = self.tokenizer.vocab
        self.rate = recordings.rate
        o = self._options
        self._scorer: Scorer | None = None
        if o.language_model is not None:
            self._scorer = open_scorer("speech.language_model", o.language_model, "".join(characters), config)
        scorer_fingerprint = self._scorer.fingerprint if self._scorer else ""
        self.fingerprint = hashlib.sha256(f"{digest} {o} {scorer_fingerprint}".encode()).hexdigest()
        seed, validation_joined = config.train.seed, (o.validation_shortest, o.validation_longest)
        self._train = _Utterances(train, self.rate, (o.shortest, o.longest), o.gap, seed)
        self._validation = _Utterances(validation, self.rate, validation_joined, o.gap, 0)
        self._validation_count = len(validation)
        self._items = ShuffledItems(len(train), config.train.batch_size, seed)
        self.epoch_rows = self._items.count

    def rows(self, first: int, last: int) -> Batch:
        """Return rows ``first:last`` of the global order."""
        size = self._config.train.batch_size
        items, whole = self._items.rows(first, last)
        begin = first // size * size
        sizes = [self._train.size(begin + index, int(item)) for index, item in enumerate(whole)]
        return self._make_batch(self._train, range(first, last), items, sizes, True)

    def _make_batch(
        self,
        utterances: _Utterances,
        numbers: Sequence[int],
        firsts: Sequence[int] | np.ndarray,
        sizes: Sequence[tuple[int, int]],
        training: bool,
    ) -> Batch:
        """Return utterances, by number and first item, padded for the longest of ``sizes``."""
        most_frames, most_characters = map(max, zip(*sizes, strict=True))
        rows, texts = [], []
        for number, first in zip(numbers, firsts, strict=True):
            recordings, silences = utterances.recordings(number, int(first))
            frames = utterances.frames(recordings, silences)
            if training:
                self._mask(frames, utterances.random(number, 1))
            rows.append(frames)
            texts.append(self.tokenizer.encode(utterances.text(recordings)))
        targets, weights = pad_rows(texts, round_up(most_characters, _TARGET_MULTIPLE))
        features = _features(rows, round_up(most_frames, _FRAME_MULTIPLE))
        return Batch(np.zeros_like(targets), targets, weights, True, features, np.asarray(numbers))

    def _mask(self, frames: np.ndarray, random: np.random.Generator) -> None:
        """Set random frequency bands and time spans of ``frames`` to their mean, which is 0."""
        for _ in range(self._options.masks):
            width = int(random.integers(BANDS // 5 + 1))
            low = int(random.integers(BANDS - width + 1))
            length = int(random.integers(min(len(frames) // 5, round(0.1 / HOP)) + 1))
            start = int(random.integers(len(frames) - length + 1))
            frames[:, low : low + width] = 0
            frames[start : start + length] = 0

    def validation(self, rank: int, size: int, limit: int | None = None) -> Iterator[Batch]:
        """Yield ``rank``'s part of the validation utterances, sorted by length."""
        sizes = [self._validation.size(i, i) for i in range(self._validation_count)]
        order = np.argsort([frames for frames, _ in sizes], kind="stable")
        order = order[spread(np.array([characters for _, characters in sizes])[order], limit)]
        for chosen in split_evenly(order, rank, size, self._config.train.eval_batch_size):
            items = chosen.tolist()
            yield self._make_batch(self._validation, items, items, [sizes[i] for i in items], False)

    def count(self, trainable: Trainable, batch: Batch) -> dict[str, float]:
        """Return the batch's numbers of words, of word errors, of utterances and of utterances without an error."""
        from rapidfuzz.distance import Levenshtein

        weights = batch.weights if batch.weights is not None else np.ones_like(batch.targets)
        targets = zip(batch.targets, weights, strict=True)
        references = [self.tokenizer.decode(ids[counts > 0].tolist()).split() for ids, counts in targets]
        transcripts = [text.split() for text in self._transcribe(trainable, batch)]
        pairs = list(zip(transcripts, references, strict=True))
        return {
            "words": float(sum(len(reference) for _, reference in pairs)),
            "word_errors": float(sum(Levenshtein.distance(transcript, reference) for transcript, reference in pairs)),
            "utterances": float(len(pairs)),
            "correct": float(sum(transcript == reference for transcript, reference in pairs)),
        }

    def _transcribe(self, trainable: Trainable, batch: Batch) -> list[str]:
        """Return the transcript of every row."""
        logits = trainable.predict(batch)
        lengths = output_frames(batch.features["frame_count"])
        o = self._options
        if o.beams == 1:
            return [self.tokenizer.decode(ids) for ids in _greedy(logits, lengths)]
        logs = log_softmax(logits)[..., : self.vocab]
        candidates = [
            [(transcript.log_probability, self.tokenizer.decode(transcript.ids)) for transcript in row]
            for row in prefix_beam_search(logs, lengths, o.beams)
        ]
        return rescore(candidates, self._scorer, o.language_model_weight, o.word_bonus)

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Return val_loss (nats per character), word_error_rate, and accuracy (share of utterances without errors)."""
        return {
            "val_loss": loss_figures(sums)["val_loss"],
            "word_error_rate": sums["word_errors"] / sums["words"],
            "accuracy": sums["correct"] / sums["utterances"],
        }

    def respond(self, trainable: Trainable, prompt: str) -> str:
        """Return the transcripts of the WAV files whose paths are the lines of ``prompt``."""
        transcripts: list[str] = []
        for path in prompt.split("\n"):
            if path.strip():
                frames = log_mel(read_sound(Path(path.strip()), self.rate), self.rate, BANDS)
                unused = np.zeros((1, 1), np.int32)
                features = _features([frames], round_up(len(frames), _FRAME_MULTIPLE))
                transcripts += self._transcribe(trainable, Batch(unused, unused, None, True, features))
        return "\n".join(transcripts)


def _greedy(logits: np.ndarray, lengths: np.ndarray) -> list[list[int]]:
    """Return the most probable ids of every row's frames, with repetitions merged and blanks removed."""
    rows = []
    for frames, length in zip(logits.argmax(-1), lengths, strict=True):
        ids = frames[:length]
        rows.append(ids[(ids != 0) & (ids != np.concatenate([[-1], ids[:-1]]))].tolist())
    return rows


def _features(rows: Sequence[np.ndarray], time: int) -> dict[str, np.ndarray]:
    padded = np.zeros((len(rows), time, BANDS), np.float32)
    for index, frames in enumerate(rows):
        padded[index, : len(frames)] = frames
    return {"frames": padded, "frame_count": np.array([len(frames) for frames in rows], np.int32)}


def _split(recordings: Recordings, config: Config) -> tuple[list[Recording], list[Recording], str]:
    """Return the training recordings, the validation recordings, and the digest of both."""
    items, digest = recordings.items, recordings.digest
    if config.data.validation_paths:
        other = read_recordings(config.data.validation_paths, "data.validation_path")
        if other.rate != recordings.rate:
            raise HvdlmError(
                f"data.validation_path has {other.rate} samples a second, data.path {recordings.rate}: convert one of "
                "them."
            )
        train, validation, digest = items, other.items, digest + other.digest
    elif any(item.held_out for item in items):
        train = [item for item in items if item.held_out is False]
        validation = [item for item in items if item.held_out]
    else:
        count = int(len(items) * (1 - config.data.validation_share))
        train, validation = items[:count], items[count:]
    if not train or not validation:
        raise HvdlmError(
            "data.path: no recordings to train on, or none to validate on: give more, or a data.validation_path."
        )
    return train, validation, digest


@hookimpl
def hvdlm_options() -> Mapping[str, type]:
    """Return the options ``--speech.*``."""
    return {"speech": SpeechOptions}


@hookimpl
def hvdlm_check(config: Config, spec: ModelSpec) -> None:
    """Check the ranges of the options."""
    if config.task != "speech":
        return
    o = config.own("speech", SpeechOptions)
    for low, high in (("shortest", "longest"), ("validation_shortest", "validation_longest")):
        if not 1 <= getattr(o, low) <= getattr(o, high):
            raise HvdlmError(f"speech.{low} {getattr(o, low)}: expected 1 or more, and at most speech.{high}.")
    if o.gap < 0 or o.masks < 0:
        raise HvdlmError("speech.gap and speech.masks have to be 0 or more.")
    _check_beams(o)


def _check_beams(o: SpeechOptions) -> None:
    if o.beams < 1:
        raise HvdlmError(f"speech.beams {o.beams}: expected 1 or more.")
    if o.beams == 1 and (o.language_model is not None or o.word_bonus):
        name = "word_bonus" if o.language_model is None else "language_model"
        raise HvdlmError(f"speech.{name} rescores several candidates: add --speech.beams 16, or leave it out.")
    if not (math.isfinite(o.language_model_weight) and o.language_model_weight >= 0 and math.isfinite(o.word_bonus)):
        raise HvdlmError("speech.language_model_weight has to be 0 or more, speech.word_bonus a finite number.")


@hookimpl
def hvdlm_make_task(name: str, config: Config) -> Speech | None:
    """Return the task ``speech``."""
    return Speech(config) if name == "speech" else None
