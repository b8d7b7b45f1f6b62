"""Recordings and what is said in them: a list in JSON lines, or the Free Spoken Digit Dataset."""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
import wave
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hvdlm.errors import HvdlmError
from hvdlm.io import untrusted_input

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_DIGIT = re.compile(r"([0-9])_([a-z]+)_([0-9]+)\.wav")
_HELD_OUT = 5  # by the data set's convention, the recordings 0 to 4 of every digit and speaker
_LIMIT = 1 << 28  # bytes of one recording, or of a list


@dataclass(frozen=True)
class Recording:
    """One recording: float32 ``[samples]`` within +-1; ``held_out``: whether the data set keeps it for testing."""

    sound: np.ndarray
    text: str
    held_out: bool | None = None


@dataclass(frozen=True)
class Recordings:
    """What a path holds. ``rate``: samples per second; ``digest``: SHA-256 of all."""

    items: list[Recording]
    rate: int
    digest: str


def read_recordings(paths: list[str], key: str) -> Recordings:
    """Return the recordings of a folder or tar file of spoken digits, or of a list in JSON lines.

    A line of a list: ``{"audio": "a.wav", "text": "what is said"}``, its path relative to the list's.

    Raises:
        HvdlmError: one can't be read, is no 16-bit PCM WAV file, or has another rate than the first.
    """
    if len(paths) != 1:
        raise HvdlmError(
            f"{key}: the task speech reads one folder, tar file or .jsonl list, not {len(paths)}: name one."
        )
    path, items, rate, digest = Path(paths[0]), [], 0, hashlib.sha256()
    for name, content, text, held_out in _sources(path, key):
        if not text.strip():
            raise HvdlmError(f"{key} {name}: nothing is said in it: leave it out.")
        sound, own = _samples(name, content)
        if rate and own != rate:
            raise HvdlmError(f"{key} {name}: has {own} samples a second, others {rate}: convert all to the same rate.")
        rate = own
        digest.update(content + text.encode())
        items.append(Recording(sound, text, held_out))
    if not items:
        raise HvdlmError(
            f"{key} {path}: no recordings: give a .jsonl list, or a folder or tar file of spoken digits "
            "(7_george_12.wav)."
        )
    return Recordings(items, rate, digest.hexdigest())


def _sources(path: Path, key: str) -> Iterator[tuple[str, bytes, str, bool | None]]:
    """Yield (name, content of the WAV file, text, whether it is held out)."""
    try:
        if path.suffix == ".jsonl":
            yield from _listed(path, key)
        elif path.is_dir():
            for file in sorted(path.rglob("*.wav")):
                if match := _DIGIT.fullmatch(file.name):
                    yield str(file), untrusted_input.read(file, _LIMIT, path), *_digit(match)
        else:
            with tarfile.open(path) as archive:
                members = [m for m in archive.getmembers() if m.isfile() and m.size <= _LIMIT]
                for member in sorted(members, key=lambda m: m.name):
                    if (match := _DIGIT.fullmatch(Path(member.name).name)) and (part := archive.extractfile(member)):
                        yield member.name, part.read(), *_digit(match)
    except (OSError, ValueError, EOFError, tarfile.TarError) as error:
        raise HvdlmError(f"{key} {path}: {error}: give a .jsonl list, a folder or a tar file.") from error


def _digit(match: re.Match[str]) -> tuple[str, bool]:
    return WORDS[int(match[1])], int(match[3]) < _HELD_OUT


def _listed(path: Path, key: str) -> Iterator[tuple[str, bytes, str, bool | None]]:
    for number, line in enumerate(str(untrusted_input.read(path, _LIMIT), "utf-8").splitlines(), 1):
        entry = json.loads(line) if line.strip() else None
        if entry is None:
            continue
        if not isinstance(entry, dict) or not all(isinstance(entry.get(k), str) for k in ("audio", "text")):
            raise HvdlmError(f'{key} {path}, line {number}: expected {{"audio": "FILE.wav", "text": "..."}}.')
        yield entry["audio"], untrusted_input.read(path.parent / entry["audio"], _LIMIT), entry["text"], None


def _samples(name: str, content: bytes) -> tuple[np.ndarray, int]:
    """Return the samples of a WAV file, float32 within +-1, channels averaged, and how many a second has."""
    try:
        with wave.open(io.BytesIO(content)) as file:
            if file.getsampwidth() != 2:
                raise ValueError(f"samples of {8 * file.getsampwidth()} bits")
            samples = np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.float32) / 32768
            return samples.reshape(-1, file.getnchannels()).mean(1), file.getframerate()
    except (wave.Error, ValueError, EOFError) as error:
        raise HvdlmError(f"{name}: {error}: give WAV files of 16 bits (PCM).") from error


def read_sound(path: Path, rate: int) -> np.ndarray:
    """Return the samples of one WAV file, float32 ``[samples]``.

    Raises:
        HvdlmError: it can't be read, or has another rate.
    """
    try:
        content = untrusted_input.read(path, _LIMIT)
    except (OSError, ValueError) as error:
        raise HvdlmError(f"{path}: {error}: name a WAV file.") from error
    sound, own = _samples(str(path), content)
    if own != rate:
        raise HvdlmError(f"{path}: has {own} samples a second, the model was trained on {rate}: convert it.")
    return sound
