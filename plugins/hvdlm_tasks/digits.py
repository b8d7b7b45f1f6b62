"""Digits in images: the smallest example. MNIST where it is at hand, else the digits that ship with scikit-learn."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from hvdlm_tasks.items import ShuffledItems, dealt
from hvdlm_tasks.models.convnet import READS, SIDE

from hvdlm import hookimpl
from hvdlm.config import Config
from hvdlm.data.tokenizers import CharTokenizer
from hvdlm.errors import HvdlmError
from hvdlm.io import untrusted_input
from hvdlm.protocols.trainable import Trainable
from hvdlm.protocols.types import Batch
from hvdlm.protocols.world import World
from hvdlm.tasks.language_model import loss_figures

_MEAN, _DEVIATION = 0.1307, 0.3081  # of MNIST's training images, as everybody takes them
_LIMIT = 1 << 26  # bytes
_FILES = ("train", "t10k")


class _Digits(NamedTuple):
    images: np.ndarray  # uint8 [n, 28, 28]
    labels: np.ndarray  # uint8 [n]


class Digits:
    """The task ``digits``: the last ``data.validation_share`` of the images are held out."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self.tokenizer, self.vocab, self.reads = CharTokenizer("0123456789"), 10, READS
        found = _read(config.data.paths)
        self.fingerprint = hashlib.sha256(found.images.tobytes() + found.labels.tobytes()).hexdigest()
        self._images = (found.images.astype(np.float32) / 255 - _MEAN) / _DEVIATION
        self._labels = found.labels.astype(np.int32)
        self._train = int(len(self._labels) * (1 - config.data.validation_share))
        if not 0 < self._train < len(self._labels):
            raise HvdlmError(
                f"data.validation_share {config.data.validation_share} of {len(self._labels)} images leaves none to "
                "train on, or none to test on: choose another."
            )
        self._items = ShuffledItems(self._train, config.train.batch_size, config.train.seed)

    def batch(self, number: int, first: int, last: int) -> Batch:
        """Return rows ``first:last`` of global batch ``number``."""
        return self._of(self._items.rows(number, first, last)[0])

    def _of(self, items: np.ndarray) -> Batch:
        labels = self._labels[items][:, None]
        return Batch(np.zeros_like(labels), labels, None, True, {"images": self._images[items]})

    def validation(self, rank: int, size: int) -> Iterator[Batch]:
        """Return ``rank``'s share of the held-out images."""
        items, rows = np.arange(self._train, len(self._labels)), self._config.train.eval_batch_size
        return map(self._of, dealt(items, rank, size, rows))

    def count(self, trainable: Trainable, batch: Batch) -> dict[str, float]:
        """Return how many of the batch's images are recognised."""
        return {"right": float((trainable.predict(batch).argmax(-1) == batch.targets).sum())}

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Return val_loss, and accuracy: the share of held-out images that are recognised."""
        return {"val_loss": loss_figures(sums)["val_loss"], "accuracy": sums["right"] / sums["tokens"]}

    def respond(self, trainable: Trainable, prompt: str) -> str:
        """Return the digits of the images in an idx file, whose path is the prompt."""
        images = _idx(Path(prompt.strip()), 3)
        pixels = (_fitted(images).astype(np.float32) / 255 - _MEAN) / _DEVIATION
        none = np.zeros((len(pixels), 1), np.int32)
        said = trainable.predict(Batch(none, none, None, True, {"images": pixels})).argmax(-1)
        return self.tokenizer.decode(said[:, 0].tolist())


def _read(paths: list[str]) -> _Digits:
    """Return the images of a folder's idx files, or scikit-learn's."""
    if paths == ["embedded"]:
        return _scikit_learn()
    if len(paths) != 1 or not Path(paths[0]).is_dir():
        raise HvdlmError(
            f"data.path {', '.join(paths)}: the task digits reads one folder with MNIST's files, or, where none is "
            "given, scikit-learn's digits: name the folder."
        )
    folder, parts = Path(paths[0]), []
    for name in _FILES:
        files = [_one_of(folder, f"{name}-{kind}") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")]
        if None not in files:
            images, labels = (_idx(file, rank) for file, rank in zip(files, (3, 1), strict=True) if file)
            if len(images) != len(labels):
                raise HvdlmError(f"{folder}: {len(images)} images of {name} have {len(labels)} labels: get them anew.")
            parts.append(_Digits(_fitted(images), labels))
    if not parts:
        raise HvdlmError(
            f"data.path {folder}: it holds neither train-images-idx3-ubyte and train-labels-idx1-ubyte nor those of "
            "t10k (.gz or not): name a folder with MNIST's files."
        )
    whole = _Digits(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
    if whole.labels.max(initial=0) > 9:
        raise HvdlmError(f"{folder}: a label is {whole.labels.max()}, digits go from 0 to 9: get the files anew.")
    return whole


def _one_of(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _idx(path: Path, rank: int) -> np.ndarray:
    """Return the array in an idx file, uint8 with ``rank`` dimensions.

    Raises:
        HvdlmError: it can't be read, or is none.
    """
    try:
        content = untrusted_input.read_unpacked(path, _LIMIT)
        shape = tuple(np.frombuffer(content, ">u4", rank, 4)) if content[:4] == bytes([0, 0, 8, rank]) else None
        if shape is None or len(content) != 4 + 4 * rank + int(np.prod(shape, dtype=np.int64)):
            raise ValueError(f"no idx file of {rank} dimension(s)")
    except (OSError, ValueError) as error:
        raise HvdlmError(f"{path}: {error}: give one of MNIST's files.") from error
    return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape)


def _fitted(images: np.ndarray) -> np.ndarray:
    """Return images of at most 28 x 28 pixels in the middle of such."""
    high, wide = (SIDE - n for n in images.shape[1:])
    if high < 0 or wide < 0:
        raise HvdlmError(f"images of {images.shape[1]} x {images.shape[2]} pixels are larger than 28 x 28.")
    return np.pad(images, ((0, 0), (high // 2, high - high // 2), (wide // 2, wide - wide // 2)))


def _scikit_learn() -> _Digits:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise HvdlmError(
            "the task digits needs MNIST (--data.path FOLDER) or scikit-learn's digits: pip install scikit-learn."
        ) from error
    found = load_digits()
    large = np.kron(found.images * (255 / 16), np.ones((3, 3)))  # 8 x 8 pixels: 24 x 24
    return _Digits(_fitted(large.astype(np.uint8)), found.target.astype(np.uint8))


@hookimpl
def hvdlm_run_started(config: Config, world: World, info: Mapping[str, Any]) -> None:
    """Say which digits these are, where nobody has named any."""
    if config.task == "digits" and config.data.paths == ["embedded"] and world.rank == 0:
        print("hvdlm: no --data.path, so these are scikit-learn's 1,797 digits, not MNIST", file=sys.stderr, flush=True)


@hookimpl
def hvdlm_make_task(name: str, config: Config) -> Digits | None:
    """Answer to ``digits``."""
    return Digits(config) if name == "digits" else None
