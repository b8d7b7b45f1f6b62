"""What a listening model is given of a sound: log-mel frames."""

from __future__ import annotations

from functools import cache

import numpy as np

WINDOW, HOP = 0.025, 0.008  # seconds
_FLOOR = 1e-6  # energy below which all is silence


def frames_of(samples: int, rate: int) -> int:
    """Return how many frames a sound of ``samples`` has."""
    return max(1, 1 + (samples - round(WINDOW * rate)) // round(HOP * rate))


def log_mel(sound: np.ndarray, rate: int, bands: int) -> np.ndarray:
    """Return the log energies of ``sound`` float32 ``[samples]`` in mel bands, float32 ``[frames, bands]``.

    Their mean over the sound is 0, their deviation 1: which bands are louder than others is what counts. The mel scale:
    2595 log10(1 + f / 700) (O'Shaughnessy 1987).
    """
    window, hop = round(WINDOW * rate), round(HOP * rate)
    sound = np.pad(sound, (0, max(0, window - len(sound))))
    pieces = np.lib.stride_tricks.sliding_window_view(sound, window)[::hop] * np.hanning(window).astype(np.float32)
    power = np.abs(np.fft.rfft(pieces, _points(window))) ** 2
    logs = np.log(power @ _filters(_points(window), rate, bands) + _FLOOR)
    logs -= logs.mean()
    return (logs / (logs.std() + 1e-3)).astype(np.float32)


def _points(window: int) -> int:
    return 1 << (window - 1).bit_length()


@cache
def _filters(points: int, rate: int, bands: int) -> np.ndarray:
    """Return triangles, equally wide on the mel scale, float64 ``[points / 2 + 1, bands]``."""
    highest = 2595 * np.log10(1 + rate / 2 / 700)
    edges = 700 * (10 ** (np.linspace(0, highest, bands + 2) / 2595) - 1)  # Hz
    hertz = np.arange(points // 2 + 1)[:, None] * rate / points
    low, middle, high = edges[:-2], edges[1:-1], edges[2:]
    return np.maximum(0, np.minimum((hertz - low) / (middle - low), (high - hertz) / (high - middle)))
