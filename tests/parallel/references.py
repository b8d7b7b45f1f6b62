"""The papers' equations in numpy, for all ranks at once: what the compressors are held against.

Every function takes the vectors of all ranks ``[ranks, n]`` (or matrices) and returns (what each rank's contribution
stands for, the sum that all ranks get).
"""

from __future__ import annotations

import numpy as np

BLOCK = 256
Answer = tuple[np.ndarray, np.ndarray]


def fp16(vectors: np.ndarray, step: int) -> Answer:
    seen = vectors.astype(np.float16)
    return seen.astype(np.float32), seen.sum(0, dtype=np.float16).astype(np.float32)


def _bf16(array: np.ndarray) -> np.ndarray:
    """Round to the nearest, ties to even: keep the upper 16 bits."""
    bits = array.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).view(np.float32)


def bf16(vectors: np.ndarray, step: int) -> Answer:
    seen = _bf16(vectors)
    return seen, _bf16(seen.sum(0))


def _keep_largest(vector: np.ndarray, ratio: float) -> np.ndarray:
    order = np.argsort(-np.abs(vector), kind="stable")[: max(1, round(len(vector) * ratio))]
    kept = np.zeros_like(vector)
    kept[order] = vector[order]
    return kept


def top_k(vectors: np.ndarray, step: int) -> Answer:
    seen = np.stack([_keep_largest(v, 0.01) for v in vectors])
    return seen, seen.sum(0)


def uniform(count: int, step: int, seed: int) -> np.ndarray:
    """The 32-bit hash of position, step and seed in exact integers."""
    found = []
    for i in range(count):
        h = (i * 0x9E3779B1 + seed * 0x85EBCA6B + step * 0xC2B2AE35) % 2**32
        h = (h ^ (h >> 16)) * 0x7FEB352D % 2**32
        h = (h ^ (h >> 15)) * 0x846CA68B % 2**32
        found.append(((h ^ (h >> 16)) >> 8) / 2**24)
    return np.array(found, np.float32)


def random_k(vectors: np.ndarray, step: int) -> Answer:
    """One place of each of k strata, the same on all ranks (the seed is 1)."""
    n = vectors.shape[1]
    k = max(1, round(0.1 * n))
    edges = [stratum * n // k for stratum in range(k + 1)]
    first = np.random.Generator(np.random.Philox(key=1)).integers(0, np.diff(edges))
    seen = np.zeros_like(vectors)
    for stratum in range(k):
        low, high = edges[stratum], edges[stratum + 1]
        place = low + (first[stratum] + step) % (high - low)
        seen[:, place] = vectors[:, place]
    return seen, seen.sum(0)


def _blocks(vector: np.ndarray) -> list[np.ndarray]:
    return [vector[i : i + BLOCK] for i in range(0, len(vector), BLOCK)]


def _signs(part: np.ndarray) -> np.ndarray:
    return np.where(part >= 0, 1.0, -1.0).astype(np.float32)


def scaled_sign(vectors: np.ndarray, step: int) -> Answer:
    """Karimireddy et al. 2019: C(x) = ||x||_1 / n sign(x)."""
    seen = np.stack([np.concatenate([np.abs(p).mean() * _signs(p) for p in _blocks(v)]) for v in vectors])
    return seen, seen.sum(0)


def sign_majority(vectors: np.ndarray, step: int) -> Answer:
    """Bernstein et al. 2018: sign(sum of signs), here times the sum of the ranks' scales."""
    seen, _ = scaled_sign(vectors, step)
    parts = []
    for i in range(0, vectors.shape[1], BLOCK):
        block = vectors[:, i : i + BLOCK]
        vote = np.sign(np.sum([_signs(row) for row in block], axis=0))
        parts.append(vote * sum(np.abs(row).mean() for row in block))
    return seen, np.concatenate(parts).astype(np.float32)


def _quantised(vector: np.ndarray, levels: int, norm: str, step: int, seed: int) -> np.ndarray:
    """Alistarh et al. 2017, section 3.1: |x| / scale between levels l / s and (l + 1) / s goes to either at random."""
    rows = -(-len(vector) // BLOCK)
    own = np.random.Generator(np.random.Philox(key=seed)).random((rows, 1), np.float32)
    chance = (uniform(BLOCK, step, seed) + own) % np.float32(1.0)
    parts = []
    for row, part in enumerate(_blocks(vector)):
        scale = np.sqrt(np.sum(part * part)) if norm == "l2" else np.abs(part).max()
        place = part / scale * levels if scale else np.zeros_like(part)
        below = np.floor(place)
        up = chance[row, : len(part)] >= 1 - (place - below)
        parts.append((below + up) * scale / levels)
    return np.concatenate(parts).astype(np.float32)


def qsgd(vectors: np.ndarray, step: int) -> Answer:
    seen = np.stack([_quantised(v, 7, "l2", step, 65537 + rank) for rank, v in enumerate(vectors)])
    return seen, seen.sum(0)


def int8(vectors: np.ndarray, step: int) -> Answer:
    seen = np.stack([_quantised(v, 127, "max", step, 65537 + rank) for rank, v in enumerate(vectors)])
    return seen, seen.sum(0)


class PowerSGD:
    """Vogels et al. 2019, algorithm 1, on the ranks' matrices; QR in place of Gram-Schmidt spans the same."""

    def __init__(self, shape: tuple[int, int], rank: int) -> None:
        random = np.random.Generator(np.random.Philox(key=1))
        self.factor = random.normal(size=(shape[1], rank)).astype(np.float32)

    def __call__(self, matrices: np.ndarray, step: int) -> Answer:
        left, triangle = np.linalg.qr(matrices.sum(0) @ self.factor)
        left = left * np.sign(np.diag(triangle))
        own = np.stack([m.T @ left for m in matrices])
        self.factor = own.sum(0)
        return np.stack([left @ q.T for q in own]), left @ self.factor.T


class DGC:
    """Lin et al. 2018, equations 5 to 7; keeps what it left out itself."""

    def __init__(self, ranks: int, count: int, momentum: float, clip: float, warmup: int) -> None:
        self.u, self.v = np.zeros((ranks, count), np.float32), np.zeros((ranks, count), np.float32)
        self.momentum, self.clip, self.warmup = momentum, clip, warmup

    def __call__(self, vectors: np.ndarray, step: int) -> Answer:
        limit = self.clip * len(vectors) ** -0.5
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        self.u = self.momentum * self.u + vectors * np.minimum(1, limit / norms)
        self.v = self.v + self.u
        ratio = max(0.01, 0.25 ** (1 + 4 * step // self.warmup)) if step < self.warmup else 0.01
        seen = np.stack([_keep_largest(v, ratio) for v in self.v])
        self.u, self.v = np.where(seen != 0, 0, self.u), np.where(seen != 0, 0, self.v)
        return seen, seen.sum(0)


def with_feedback(compress: object, gradients: np.ndarray, feedback: bool) -> np.ndarray:
    """Return the sums of every step of ``gradients`` ``[steps, ranks, ...]`` (Karimireddy et al. 2019, algorithm 2)."""
    error, found = np.zeros_like(gradients[0]), []
    for step, gradient in enumerate(gradients):
        corrected = gradient + error
        seen, total = compress(corrected, step)  # type: ignore[operator]
        error = corrected - seen if feedback else error
        found.append(total)
    return np.stack(found)
