"""Log-mel features."""

from __future__ import annotations

from functools import cache

import numpy as np

WINDOW, HOP = 0.025, 0.008  # seconds
_FLOOR = 1e-6  # added to the energies, so that silence has a finite logarithm


def frame_count(samples: int, rate: int) -> int:
    """Return the number of frames of a recording of ``samples`` at ``rate`` samples per second."""
    return max(1, 1 + (samples - round(WINDOW * rate)) // round(HOP * rate))


def log_mel(sound: np.ndarray, rate: int, bands: int) -> np.ndarray:
    """Return the log energies of ``sound`` float32 ``[samples]`` in mel bands, float32 ``[frames, bands]``.

    They are normalised over the recording to mean 0 and standard deviation 1, which removes its loudness. Mel scale:
    2595 log10(1 + f / 700) (O'Shaughnessy 1987).
    """
    window, hop = round(WINDOW * rate), round(HOP * rate)
    sound = np.pad(sound, (0, max(0, window - len(sound))))
    frames = np.lib.stride_tricks.sliding_window_view(sound, window)[::hop] * np.hanning(window).astype(np.float32)
    power = np.abs(np.fft.rfft(frames, _fft_size(window))) ** 2
    logs = np.log(power @ _mel_filters(_fft_size(window), rate, bands) + _FLOOR)
    logs -= logs.mean()
    return (logs / (logs.std() + 1e-3)).astype(np.float32)


def _fft_size(window: int) -> int:
    return 1 << (window - 1).bit_length()


@cache
def _mel_filters(fft_size: int, rate: int, bands: int) -> np.ndarray:
    """Return triangular filters, equally wide on the mel scale, float64 ``[fft_size / 2 + 1, bands]``."""
    highest = 2595 * np.log10(1 + rate / 2 / 700)
    edges = 700 * (10 ** (np.linspace(0, highest, bands + 2) / 2595) - 1)  # Hz
    hertz = np.arange(fft_size // 2 + 1)[:, None] * rate / fft_size
    low, middle, high = edges[:-2], edges[1:-1], edges[2:]
    return np.maximum(0, np.minimum((hertz - low) / (middle - low), (high - hertz) / (high - middle)))
