"""Recordings with transcripts: a list in JSON lines, or the Free Spoken Digit Dataset."""

from __future__ import annotations

import hashlib
import io
import re
import tarfile
import wave
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from hvdlm.diagnostics.phases import process
from hvdlm.errors import HvdlmError
from hvdlm.io import text_decoding, untrusted_input
from hvdlm.io.untrusted_input import guarded, shown

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_DIGIT_FILE = re.compile(r"([0-9])_([a-z]+)_([0-9]+)\.wav")
_HELD_OUT = 5  # recordings 0 to 4 of every digit and speaker are the data set's test split
_MAX_BYTES = 1 << 28  # of a recording, or of a list
_RATES = (
    1_000,
    768_000,
)  # samples per second: a frame has samples at the lowest, features fit into memory at the highest


@dataclass(frozen=True)
class Recording:
    """A recording.

    Attributes:
        sound: float32 ``[samples]`` within +-1.
        text: its transcript.
        held_out: whether the data set has it in its test split; None: the data set has none.
    """

    sound: np.ndarray
    text: str
    held_out: bool | None = None


@dataclass(frozen=True)
class Recordings:
    """The recordings of a data set; ``rate``: samples per second; ``digest``: SHA-256 of sounds and texts."""

    items: list[Recording]
    rate: int
    digest: str


def read_recordings(paths: list[str], key: str) -> Recordings:
    """Read a folder or tar file of spoken digits, or a list in JSON lines.

    A line of a list: ``{"audio": "a.wav", "text": "its transcript"}``, the path relative to the list.

    Raises:
        HvdlmError: a recording can't be read, is no 16-bit PCM WAV file, or has another sampling rate than the first.
    """
    if len(paths) != 1:
        raise HvdlmError(
            f"{key}: the task speech reads one folder, tar file or .jsonl list, not {len(paths)}: name one."
        )
    path, items, rate, digest = Path(paths[0]), [], 0, hashlib.sha256()
    for name, content, text, held_out in _sources(path, key):
        process.alive()
        _check_transcript(text, f"{key} {shown(name)}")
        sound, file_rate = _decode(name, content)
        if rate and file_rate != rate:
            raise HvdlmError(
                f"{key} {shown(name)}: has {file_rate} samples a second, others {rate}: convert all to one rate."
            )
        rate = file_rate
        digest.update(content + text.encode())
        items.append(Recording(sound, text, held_out))
    if not items:
        raise HvdlmError(
            f"{key} {path}: no recordings: give a .jsonl list, or a folder or tar file of spoken digits "
            "(7_george_12.wav)."
        )
    return Recordings(items, rate, digest.hexdigest())


def _check_transcript(text: str, where: str) -> None:
    if not text.strip():
        raise HvdlmError(f"{where}: its transcript is empty: leave it out.")
    if bad := next((c for c in text if c == "\0" or "\ud800" <= c <= "\udfff"), None):
        raise HvdlmError(f"{where}: its transcript holds {bad!r}, which is no character of a text: correct it.")


def _sources(path: Path, key: str) -> Iterator[tuple[str, bytes, str, bool | None]]:
    """Yield (name, content of the WAV file, transcript, whether it is held out)."""
    try:
        if path.suffix == ".jsonl":
            yield from _listed(path, key)
        elif path.is_dir():
            for wav in sorted(path.rglob("*.wav")):
                if match := _DIGIT_FILE.fullmatch(wav.name):
                    yield str(wav), untrusted_input.read(wav, _MAX_BYTES, path), *_digit(match)
        else:
            yield from _archived(path)
    except (OSError, ValueError) as error:
        raise HvdlmError(
            f"{key} {path}: {shown(str(error), 200)}: give a .jsonl list, a folder or a tar file."
        ) from error


def _archived(path: Path) -> Iterator[tuple[str, bytes, str, bool | None]]:
    """Yield the recordings of a tar file; members of more than 256 MB, and sparse ones, are left out."""
    untrusted_input.size(path)  # refuses pipes and devices
    with guarded(lambda: tarfile.open(path)) as archive:
        members = [m for m in guarded(archive.getmembers) if m.isreg() and not m.issparse() and m.size <= _MAX_BYTES]
        for member in sorted(members, key=lambda m: m.name):
            match = _DIGIT_FILE.fullmatch(Path(member.name).name)
            file = guarded(partial(archive.extractfile, member)) if match else None
            if match and file:
                yield member.name, guarded(file.read), *_digit(match)


def _digit(match: re.Match[str]) -> tuple[str, bool]:
    return WORDS[int(match[1])], int(match[3]) < _HELD_OUT


def _listed(path: Path, key: str) -> Iterator[tuple[str, bytes, str, bool | None]]:
    # Not splitlines(): a transcript may hold a line separator (U+2028).
    for number, line in enumerate(text_decoding.decode(untrusted_input.read(path, _MAX_BYTES)).split("\n"), 1):
        entry = untrusted_input.parse_json(line) if line.strip() else None
        if entry is None:
            continue
        if not isinstance(entry, dict) or not all(isinstance(entry.get(k), str) for k in ("audio", "text")):
            raise HvdlmError(f'{key} {path}, line {number}: expected {{"audio": "FILE.wav", "text": "..."}}.')
        yield entry["audio"], untrusted_input.read(path.parent / entry["audio"], _MAX_BYTES), entry["text"], None


def _decode(name: str, content: bytes) -> tuple[np.ndarray, int]:
    """Return the samples of a WAV file, float32 within +-1, channels averaged, and its samples per second."""
    try:
        return guarded(lambda: _samples(content))  # wave raises errors of many kinds, even RuntimeError
    except ValueError as error:
        raise HvdlmError(f"{shown(name)}: {error}: give WAV files of 16 bits (PCM).") from error


def _samples(content: bytes) -> tuple[np.ndarray, int]:
    with wave.open(io.BytesIO(content)) as file:
        if file.getsampwidth() != 2:
            raise ValueError(f"samples of {8 * file.getsampwidth()} bits")
        content = file.readframes(file.getnframes())
        if len(content) != 2 * file.getnframes() * file.getnchannels():
            raise ValueError(f"it claims {file.getnframes():,} samples and holds fewer")
        samples = np.frombuffer(content, "<i2").astype(np.float32) / 32768
        sound = samples.reshape(-1, file.getnchannels()).mean(1)
        if not len(sound):
            raise ValueError("it holds no sound")
        if not _RATES[0] <= file.getframerate() <= _RATES[1]:
            raise ValueError(f"{file.getframerate()} samples a second, expected {_RATES[0]:,} to {_RATES[1]:,}")
        return sound, file.getframerate()


def read_sound(path: Path, rate: int) -> np.ndarray:
    """Read one WAV file: float32 ``[samples]``.

    Raises:
        HvdlmError: it can't be read, or has another sampling rate.
    """
    try:
        content = untrusted_input.read(path, _MAX_BYTES)
    except (OSError, ValueError) as error:
        raise HvdlmError(f"{path}: {error}: name a WAV file.") from error
    sound, file_rate = _decode(str(path), content)
    if file_rate != rate:
        raise HvdlmError(f"{path}: has {file_rate} samples a second, the model was trained on {rate}: convert it.")
    return sound
