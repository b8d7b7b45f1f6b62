"""Digit classification: MNIST, or without it the digits that ship with scikit-learn."""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hvdlm import hookimpl
from hvdlm.config import Config
from hvdlm.errors import HvdlmError
from hvdlm.io.untrusted_input import shown
from hvdlm.protocols.trainable import Trainable
from hvdlm.protocols.types import Batch
from hvdlm.protocols.world import World
from hvdlm_corpora import compression
from hvdlm_corpora.tokenizers import CharTokenizer
from hvdlm_language.language_model import loss_figures
from hvdlm_tasks.items import ShuffledItems, split_evenly, spread
from hvdlm_tasks.models.convnet import READS, SIDE

_MEAN, _STD = 0.1307, 0.3081  # of MNIST's training images: the usual normalisation
_MAX_BYTES = 1 << 26  # of a file
_MIN_SIDE = 8  # pixels, as in the data set of scikit-learn
_SPLITS = ("train", "t10k")


class _Digits(NamedTuple):
    images: np.ndarray  # uint8 [n, 28, 28]
    labels: np.ndarray  # uint8 [n]


class Digits:
    """The task ``digits``; the last ``data.validation_share`` of the images are the validation split."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self.tokenizer = CharTokenizer("0123456789")
        self.vocab = 10
        self.reads = READS
        digits = _read(config.data.paths)
        self.fingerprint = hashlib.sha256(digits.images.tobytes() + digits.labels.tobytes()).hexdigest()
        self._images = digits.images  # a quarter of the memory of their float32 values
        self._labels = digits.labels.astype(np.int32)
        self._train = int(len(self._labels) * (1 - config.data.validation_share))
        if not 0 < self._train < len(self._labels):
            raise HvdlmError(
                f"data.validation_share {config.data.validation_share} of {len(self._labels)} images leaves none to "
                "train or none to validate on: choose another."
            )
        self._items = ShuffledItems(self._train, config.train.batch_size, config.train.seed)
        self.epoch_rows = self._items.count

    def rows(self, first: int, last: int) -> Batch:
        """Return rows ``first:last`` of the global order."""
        return self._make_batch(self._items.rows(first, last)[0])

    def _make_batch(self, items: np.ndarray) -> Batch:
        labels = self._labels[items][:, None]
        return Batch(np.zeros_like(labels), labels, None, True, {"images": _normalised(self._images[items])})

    def validation(self, rank: int, size: int, limit: int | None = None) -> Iterator[Batch]:
        """Yield ``rank``'s part of the validation images."""
        items = self._train + spread(np.ones(len(self._labels) - self._train, np.int64), limit)
        return map(self._make_batch, split_evenly(items, rank, size, self._config.train.eval_batch_size))

    def count(self, trainable: Trainable, batch: Batch) -> dict[str, float]:
        """Return the number of images of the batch that are classified correctly."""
        return {"correct": float((trainable.predict(batch).argmax(-1) == batch.targets).sum())}

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Return val_loss, and accuracy: the share of validation images that are classified correctly."""
        return {"val_loss": loss_figures(sums)["val_loss"], "accuracy": sums["correct"] / sums["tokens"]}

    def respond(self, trainable: Trainable, prompt: str) -> str:
        """Return the digits of the images in an idx file, whose path is the prompt."""
        images = _idx(Path(prompt.strip()), 3)
        unused = np.zeros((len(images), 1), np.int32)
        batch = Batch(unused, unused, None, True, {"images": _normalised(_fitted(images))})
        return self.tokenizer.decode(trainable.predict(batch).argmax(-1)[:, 0].tolist())


def _normalised(images: np.ndarray) -> np.ndarray:
    return (images.astype(np.float32) / 255 - _MEAN) / _STD


def _read(paths: list[str]) -> _Digits:
    """Return the digits in a folder's idx files, or scikit-learn's."""
    if paths == ["embedded"]:
        return _scikit_learn()
    if len(paths) != 1 or not Path(paths[0]).is_dir():
        raise HvdlmError(
            f"data.path {', '.join(paths)}: the task digits reads one folder with MNIST's files, or scikit-learn's "
            "digits if none is given: name the folder."
        )
    folder, splits = Path(paths[0]), []
    for name in _SPLITS:
        files = [_find(folder, f"{name}-{kind}") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")]
        if None not in files:
            images, labels = (_idx(file, rank) for file, rank in zip(files, (3, 1), strict=True) if file)
            if len(images) != len(labels):
                raise HvdlmError(
                    f"{folder}: {len(images)} images of {name} have {len(labels)} labels: download them again."
                )
            splits.append(_Digits(_fitted(images), labels))
    if not splits:
        raise HvdlmError(
            f"data.path {folder}: it holds neither train-images-idx3-ubyte and train-labels-idx1-ubyte nor those of "
            "t10k (plain or .gz): name a folder with MNIST's files."
        )
    digits = _Digits(*(np.concatenate(arrays) for arrays in zip(*splits, strict=True)))
    if digits.labels.max(initial=0) > 9:
        raise HvdlmError(f"{folder}: a label is {digits.labels.max()}, expected 0 to 9: download the files again.")
    return digits


def _find(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _idx(path: Path, rank: int) -> np.ndarray:
    """Read an idx file: uint8 with ``rank`` dimensions.

    Raises:
        HvdlmError: the file can't be read, or is no idx file of ``rank`` dimensions.
    """
    try:
        content = compression.read_unpacked(path, _MAX_BYTES)
        shape = np.frombuffer(content, ">u4", rank, 4).tolist() if content[:4] == bytes([0, 0, 8, rank]) else None
        if shape is None or len(content) != 4 + 4 * rank + math.prod(shape):  # a product in int64 could overflow
            raise ValueError(f"not an idx file of {rank} dimension(s)")
        if 0 in shape:  # the other dimensions could be larger than NumPy's
            raise ValueError("it is empty")
    except (OSError, ValueError) as error:
        raise HvdlmError(f"{path}: {shown(str(error))}: give one of MNIST's files.") from error
    return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape)


def _fitted(images: np.ndarray) -> np.ndarray:
    """Return ``images``, 8 x 8 to 28 x 28 pixels, centred in 28 x 28 pixels."""
    if not all(_MIN_SIDE <= side <= SIDE for side in images.shape[1:]):  # millions of single pixels would fill memory
        raise HvdlmError(
            f"images have {images.shape[1]} x {images.shape[2]} pixels, expected {_MIN_SIDE} x {_MIN_SIDE} to {SIDE} x "
            f"{SIDE}: give MNIST's files."
        )
    height, width = (SIDE - n for n in images.shape[1:])  # of the margins
    return np.pad(images, ((0, 0), (height // 2, height - height // 2), (width // 2, width - width // 2)))


def _scikit_learn() -> _Digits:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise HvdlmError(
            "the task digits needs MNIST (--data.path FOLDER) or scikit-learn's digits: pip install scikit-learn."
        ) from error
    digits = load_digits()
    large = np.kron(digits.images * (255 / 16), np.ones((3, 3)))  # from 8 x 8 to 24 x 24 pixels
    return _Digits(_fitted(large.astype(np.uint8)), digits.target.astype(np.uint8))


@hookimpl
def hvdlm_run_started(config: Config, world: World, info: Mapping[str, Any]) -> None:
    """Print which digits are used where ``data.path`` names none."""
    if config.task == "digits" and config.data.paths == ["embedded"] and world.rank == 0:
        print("hvdlm: no --data.path: using scikit-learn's 1,797 digits, not MNIST", file=sys.stderr, flush=True)


@hookimpl
def hvdlm_make_task(name: str, config: Config) -> Digits | None:
    """Return the task ``digits``."""
    return Digits(config) if name == "digits" else None
