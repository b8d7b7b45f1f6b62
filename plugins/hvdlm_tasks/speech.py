"""Speech recognition: the characters that are said in a recording (Graves et al. 2006)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from hvdlm_tasks.ctc_beam import prefix_beam_search
from hvdlm_tasks.items import ShuffledItems, dealt, up_to
from hvdlm_tasks.mel import HOP, frames_of, log_mel
from hvdlm_tasks.models.ctc import BANDS, READS, scored
from hvdlm_tasks.pairs import padded
from hvdlm_tasks.recordings import Recording, Recordings, read_recordings, read_sound
from hvdlm_tasks.rescoring import likeliest

from hvdlm import hookimpl
from hvdlm.config import Config
from hvdlm.data.tokenizers import CharTokenizer
from hvdlm.errors import HvdlmError
from hvdlm.models.spec import ModelSpec
from hvdlm.protocols.task import OpenScorer, Scorer
from hvdlm.protocols.trainable import Trainable
from hvdlm.protocols.types import Batch
from hvdlm.tasks.language_model import loss_figures
from hvdlm.tasks.likelihood import log_softmax

_BLANK = "\0"
_FRAMES, _TARGETS = 64, 16  # frames and characters by which batches differ in length


@dataclass
class SpeechOptions:
    """Recognising.

    Args:
        shortest: how many recordings are joined to one utterance to train on, at least
        longest: at most
        validation_shortest: how many recordings are joined to one utterance to test on, at least
        validation_longest: at most
        gap: longest silence between joined recordings (seconds)
        masks: how many bands of frequencies, and of times, are hidden while training (Park et al. 2019)
        beams: texts of an utterance that are followed when it is recognised; 1: each frame's likeliest character
        language_model: the folder of a language model's run, which helps to choose among them; None: none does
        language_model_weight: what its log-probability of a text counts, where that of the sound counts 1
        word_bonus: what every word of a text adds to its log-probability (nats), since language models prefer few
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
    """Recordings, and how they are joined: utterance number i is a function of the seed and i."""

    def __init__(self, items: Sequence[Recording], rate: int, joined: tuple[int, int], gap: float, seed: int) -> None:
        self._items, self._rate, self._joined, self._gap, self._seed = items, rate, joined, gap, seed

    def random(self, number: int, use: int) -> np.random.Generator:
        """Return what is drawn of utterance ``number`` is drawn from, for one use: 0 its parts, 1 its masks."""
        return np.random.default_rng([self._seed, number, use])

    def parts(self, number: int, first: int) -> tuple[list[int], list[int]]:
        """Return the recordings of an utterance that begins with ``first``, and the silence after each (samples)."""
        random = self.random(number, 0)
        count = int(random.integers(self._joined[0], self._joined[1] + 1))
        more = random.integers(len(self._items), size=count - 1).tolist()
        silences = random.integers(int(self._gap * self._rate) + 1, size=count - 1).tolist()
        return [first, *more], [*silences, 0]

    def size(self, number: int, first: int) -> tuple[int, int]:
        """Return how many frames and characters it has."""
        parts, silences = self.parts(number, first)
        samples = sum(len(self._items[i].sound) for i in parts) + sum(silences)
        return frames_of(samples, self._rate), len(self.text(parts))

    def text(self, parts: Sequence[int]) -> str:
        """Return what is said in recordings that follow each other."""
        return " ".join(self._items[i].text for i in parts)

    def frames(self, parts: Sequence[int], silences: Sequence[int]) -> np.ndarray:
        """Return its log-mel frames, float32 ``[frames, BANDS]``."""
        pieces = [np.pad(self._items[i].sound, (0, n)) for i, n in zip(parts, silences, strict=True)]
        return log_mel(np.concatenate(pieces), self._rate, BANDS)


class Speech:
    """The task ``speech``: held out is ``data.validation_path``, or what the data set holds out, or its last share."""

    reads = READS

    def __init__(self, config: Config, open_scorer: OpenScorer | None = None) -> None:
        self._config = config
        self._options = config.own("speech", SpeechOptions)
        found = read_recordings(config.data.paths, "data.path")
        train, held, digest = _split(found, config)
        characters = sorted(set("".join(item.text for item in train)) | {" "})
        self.tokenizer = CharTokenizer(_BLANK + "".join(characters))
        self.vocab, self.rate = self.tokenizer.vocab, found.rate
        o = self._options
        self._scorer: Scorer | None = None
        if o.language_model is not None and open_scorer is not None:
            self._scorer = open_scorer("speech.language_model", o.language_model, "".join(characters))
        helper = self._scorer.fingerprint if self._scorer else ""
        self.fingerprint = hashlib.sha256(f"{digest} {o} {helper}".encode()).hexdigest()
        seed, joined = config.train.seed, (o.validation_shortest, o.validation_longest)
        self._train = _Utterances(train, found.rate, (o.shortest, o.longest), o.gap, seed)
        self._held, self._held_count = _Utterances(held, found.rate, joined, o.gap, 0), len(held)
        self._items = ShuffledItems(len(train), config.train.batch_size, seed)

    def batch(self, number: int, first: int, last: int) -> Batch:
        """Return rows ``first:last`` of global batch ``number``."""
        size = self._config.train.batch_size
        own, whole = self._items.rows(number, first, last)
        begin = number * size + first // size * size
        sizes = [self._train.size(begin + place, int(item)) for place, item in enumerate(whole)]
        return self._of(self._train, range(number * size + first, number * size + last), own, sizes, True)

    def _of(
        self,
        utterances: _Utterances,
        numbers: Sequence[int],
        firsts: Sequence[int] | np.ndarray,
        sizes: Sequence[tuple[int, int]],
        training: bool,
    ) -> Batch:
        """Return utterances as long as the longest of ``sizes``."""
        frames, characters = map(max, zip(*sizes, strict=True))
        frames, characters = up_to(frames, _FRAMES), up_to(characters, _TARGETS)
        heard, texts = [], []
        for number, first in zip(numbers, firsts, strict=True):
            parts, silences = utterances.parts(number, int(first))
            found = utterances.frames(parts, silences)
            heard.append(self._masked(found, utterances.random(number, 1)) if training else found)
            texts.append(self.tokenizer.encode(utterances.text(parts)))
        targets, weights = padded(texts, characters)
        return Batch(np.zeros_like(targets), targets, weights, True, _features(heard, frames), np.asarray(numbers))

    def _masked(self, frames: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """Return ``frames`` with bands of frequencies and times set to their mean."""
        for _ in range(self._options.masks):
            wide = int(random.integers(BANDS // 5 + 1))
            low = int(random.integers(BANDS - wide + 1))
            long = int(random.integers(min(len(frames) // 5, round(0.1 / HOP)) + 1))
            start = int(random.integers(len(frames) - long + 1))
            frames[:, low : low + wide] = 0
            frames[start : start + long] = 0
        return frames

    def validation(self, rank: int, size: int) -> Iterator[Batch]:
        """Yield ``rank``'s share of the held-out utterances."""
        sizes = [self._held.size(i, i) for i in range(self._held_count)]
        order = np.argsort([frames for frames, _ in sizes], kind="stable")
        for found in dealt(order, rank, size, self._config.train.eval_batch_size):
            items = found.tolist()
            yield self._of(self._held, items, items, [sizes[i] for i in items], False)

    def count(self, trainable: Trainable, batch: Batch) -> dict[str, float]:
        """Return the words of the batch, those that are wrong, and the utterances, those that are right."""
        from rapidfuzz.distance import Levenshtein

        said = [text.split() for text in self._heard(trainable, batch)]
        counted = batch.weights if batch.weights is not None else np.ones_like(batch.targets)
        rows = zip(batch.targets, counted, strict=True)
        meant = [self.tokenizer.decode(row[c > 0].tolist()).split() for row, c in rows]
        pairs = list(zip(said, meant, strict=True))
        return {
            "words": float(sum(len(b) for _, b in pairs)),
            "wrong": float(sum(Levenshtein.distance(a, b) for a, b in pairs)),
            "rows": float(len(pairs)),
            "right": float(sum(a == b for a, b in pairs)),
        }

    def _heard(self, trainable: Trainable, batch: Batch) -> list[str]:
        """Return what is said in every row."""
        scores, lengths, o = trainable.predict(batch), scored(batch.features["frame_count"]), self._options
        if o.beams == 1:
            return [self.tokenizer.decode(ids) for ids in _likeliest_frames(scores, lengths)]
        logs = log_softmax(scores)[..., : self.vocab]
        found = [
            [(reading.log, self.tokenizer.decode(reading.ids)) for reading in row]
            for row in prefix_beam_search(logs, lengths, o.beams)
        ]
        return likeliest(found, self._scorer, o.language_model_weight, o.word_bonus)

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Return val_loss (nats per character), word_error_rate, and accuracy: the share of rows without an error."""
        rate, right = sums["wrong"] / sums["words"], sums["right"] / sums["rows"]
        return {"val_loss": loss_figures(sums)["val_loss"], "word_error_rate": rate, "accuracy": right}

    def respond(self, trainable: Trainable, prompt: str) -> str:
        """Return what is said in the WAV files whose paths are the lines of ``prompt``."""
        said = []
        for path in prompt.split("\n"):
            if path.strip():
                frames = log_mel(read_sound(Path(path.strip()), self.rate), self.rate, BANDS)
                none = np.zeros((1, 1), np.int32)
                features = _features([frames], up_to(len(frames), _FRAMES))
                said += self._heard(trainable, Batch(none, none, None, True, features))
        return "\n".join(said)


def _likeliest_frames(scores: np.ndarray, lengths: np.ndarray) -> list[list[int]]:
    """Return the likeliest ids of every row's frames: one of equal neighbours, no blanks."""
    found = []
    for row, length in zip(scores.argmax(-1), lengths, strict=True):
        own = row[:length]
        found.append(own[(own != 0) & (own != np.concatenate([[-1], own[:-1]]))].tolist())
    return found


def _features(heard: Sequence[np.ndarray], frames: int) -> dict[str, np.ndarray]:
    given = np.zeros((len(heard), frames, BANDS), np.float32)
    for place, one in enumerate(heard):
        given[place, : len(one)] = one
    return {"frames": given, "frame_count": np.array([len(one) for one in heard], np.int32)}


def _split(found: Recordings, config: Config) -> tuple[list[Recording], list[Recording], str]:
    """Return what to train on, what to test on, and the digest of both."""
    digest = found.digest
    if config.data.validation_paths:
        other = read_recordings(config.data.validation_paths, "data.validation_path")
        if other.rate != found.rate:
            raise HvdlmError(
                f"data.validation_path: has {other.rate} samples a second, data.path {found.rate}: convert one of them."
            )
        train, held, digest = found.items, other.items, digest + other.digest
    elif any(item.held_out for item in found.items):
        train, held = ([i for i in found.items if i.held_out == kind] for kind in (False, True))
    else:
        kept = int(len(found.items) * (1 - config.data.validation_share))
        train, held = found.items[:kept], found.items[kept:]
    if not train or not held:
        raise HvdlmError(
            "data.path: no recordings to train on, or none to test on: give more, or a data.validation_path."
        )
    return train, held, digest


@hookimpl
def hvdlm_options() -> Mapping[str, type]:
    """Bring ``--speech.longest`` and its like."""
    return {"speech": SpeechOptions}


@hookimpl
def hvdlm_check(config: Config, spec: ModelSpec) -> None:
    """Refuse figures out of their range."""
    if config.task != "speech":
        return
    o = config.own("speech", SpeechOptions)
    for low, high in (("shortest", "longest"), ("validation_shortest", "validation_longest")):
        if not 1 <= getattr(o, low) <= getattr(o, high):
            raise HvdlmError(f"speech.{low} {getattr(o, low)}: expected 1 or more, and at most speech.{high}.")
    if o.gap < 0 or o.masks < 0:
        raise HvdlmError("speech.gap and speech.masks are 0 or more.")
    _check_beams(o)


def _check_beams(o: SpeechOptions) -> None:
    if o.beams < 1:
        raise HvdlmError(f"speech.beams {o.beams}: expected 1 or more.")
    if o.beams == 1 and (o.language_model is not None or o.word_bonus):
        name = "word_bonus" if o.language_model is None else "language_model"
        raise HvdlmError(f"speech.{name} chooses among several texts: give --speech.beams 16, or leave it out.")
    if not (math.isfinite(o.language_model_weight) and o.language_model_weight >= 0 and math.isfinite(o.word_bonus)):
        raise HvdlmError("speech.language_model_weight is 0 or more, speech.word_bonus any number.")


@hookimpl
def hvdlm_make_task(name: str, config: Config, open_scorer: OpenScorer) -> Speech | None:
    """Answer to ``speech``."""
    return Speech(config, open_scorer) if name == "speech" else None
