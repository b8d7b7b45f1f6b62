"""The papers' equations of the compressors in numpy, for all ranks at once.

Every function takes the vectors of all ranks ``[ranks, n]`` (or matrices) and returns (every rank's vector after
compression and decompression, the sum that all ranks receive).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

BLOCK = 256
Result = tuple[np.ndarray, np.ndarray]


def fp16(vectors: np.ndarray, step: int) -> Result:
    decoded = vectors.astype(np.float16)
    return decoded.astype(np.float32), decoded.sum(0, dtype=np.float16).astype(np.float32)


def _bf16(array: np.ndarray) -> np.ndarray:
    """Round to the nearest, ties to even: keep the upper 16 bits."""
    bits = array.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).view(np.float32)


def bf16(vectors: np.ndarray, step: int) -> Result:
    decoded = _bf16(vectors)
    return decoded, _bf16(decoded.sum(0))


def _keep_largest(vector: np.ndarray, ratio: float) -> np.ndarray:
    order = np.argsort(-np.abs(vector), kind="stable")[: max(1, round(len(vector) * ratio))]
    largest = np.zeros_like(vector)
    largest[order] = vector[order]
    return largest


def top_k(vectors: np.ndarray, step: int) -> Result:
    decoded = np.stack([_keep_largest(v, 0.01) for v in vectors])
    return decoded, decoded.sum(0)


def uniform(count: int, step: int, seed: int) -> np.ndarray:
    """Return uniform numbers from a 32-bit hash of position, step and seed, in exact integers."""
    values = []
    for i in range(count):
        h = (i * 0x9E3779B1 + seed * 0x85EBCA6B + step * 0xC2B2AE35) % 2**32
        h = (h ^ (h >> 16)) * 0x7FEB352D % 2**32
        h = (h ^ (h >> 15)) * 0x846CA68B % 2**32
        values.append(((h ^ (h >> 16)) >> 8) / 2**24)
    return np.array(values, np.float32)


def random_k(vectors: np.ndarray, step: int) -> Result:
    """Send one element of each of k strata, the same on all ranks (the seed is 1)."""
    n = vectors.shape[1]
    k = max(1, round(0.1 * n))
    edges = [stratum * n // k for stratum in range(k + 1)]
    first = np.random.Generator(np.random.Philox(key=1)).integers(0, np.diff(edges))
    decoded = np.zeros_like(vectors)
    for stratum in range(k):
        low, high = edges[stratum], edges[stratum + 1]
        index = low + (first[stratum] + step) % (high - low)
        decoded[:, index] = vectors[:, index]
    return decoded, decoded.sum(0)


def _blocks(vector: np.ndarray) -> list[np.ndarray]:
    return [vector[i : i + BLOCK] for i in range(0, len(vector), BLOCK)]


def _signs(values: np.ndarray) -> np.ndarray:
    return np.where(values >= 0, 1.0, -1.0).astype(np.float32)


def scaled_sign(vectors: np.ndarray, step: int) -> Result:
    """Karimireddy et al. 2019: C(x) = ||x||_1 / n sign(x)."""
    decoded = np.stack([np.concatenate([np.abs(p).mean() * _signs(p) for p in _blocks(v)]) for v in vectors])
    return decoded, decoded.sum(0)


def sign_majority(vectors: np.ndarray, step: int) -> Result:
    """Bernstein et al. 2018: sign(sum of signs), here times the sum of the ranks' scales."""
    decoded, _ = scaled_sign(vectors, step)
    sums = []
    for i in range(0, vectors.shape[1], BLOCK):
        block = vectors[:, i : i + BLOCK]
        vote = np.sign(np.sum([_signs(row) for row in block], axis=0))
        sums.append(vote * sum(np.abs(row).mean() for row in block))
    return decoded, np.concatenate(sums).astype(np.float32)


def _quantised(vector: np.ndarray, levels: int, norm: str, step: int, seed: int) -> np.ndarray:
    """Alistarh et al. 2017, section 3.1: |x| / scale is rounded at random to level l / s or (l + 1) / s."""
    rows = -(-len(vector) // BLOCK)
    offsets = np.random.Generator(np.random.Philox(key=seed)).random((rows, 1), np.float32)
    chance = (uniform(BLOCK, step, seed) + offsets) % np.float32(1.0)
    quantised = []
    for row, block in enumerate(_blocks(vector)):
        scale = np.sqrt(np.sum(block * block)) if norm == "l2" else np.abs(block).max()
        level = block / scale * levels if scale else np.zeros_like(block)
        below = np.floor(level)
        up = chance[row, : len(block)] >= 1 - (level - below)
        quantised.append((below + up) * scale / levels)
    return np.concatenate(quantised).astype(np.float32)


def qsgd(vectors: np.ndarray, step: int) -> Result:
    decoded = np.stack([_quantised(v, 7, "l2", step, 65537 + rank) for rank, v in enumerate(vectors)])
    return decoded, decoded.sum(0)


def int8(vectors: np.ndarray, step: int) -> Result:
    decoded = np.stack([_quantised(v, 127, "max", step, 65537 + rank) for rank, v in enumerate(vectors)])
    return decoded, decoded.sum(0)


def int4(vectors: np.ndarray, step: int) -> Result:
    """The nearest of 15 levels, scaled by the block's largest magnitude."""

    def rounded(block: np.ndarray) -> np.ndarray:
        scale = np.abs(block).max()
        return np.floor(block * 7 / scale + 0.5) * scale / 7 if scale else block

    decoded = np.stack([np.concatenate([rounded(block) for block in _blocks(v)]) for v in vectors])
    return decoded.astype(np.float32), decoded.sum(0).astype(np.float32)


def _two_bits(chunk: np.ndarray, sent: int) -> np.ndarray:
    """Keep the ``sent`` largest: their signs times the mean of the magnitudes above, or of those below, the mean."""
    kept = np.zeros_like(chunk)
    order = np.argsort(-np.abs(chunk), kind="stable")[:sent]
    sizes = np.abs(chunk[order])
    high = sizes > sizes.mean()
    upper, lower = (sizes[side].mean() if side.any() else 0.0 for side in (high, ~high))
    kept[order] = np.where(chunk[order] >= 0, 1, -1) * np.where(high, upper, lower)
    return kept


class ChunkedTopK:
    """Sarfi et al. 2025, algorithm 1: what is not sent is kept, times ``decay`` in every step."""

    def __init__(self, ranks: int, count: int, sent: int, decay: float) -> None:
        self.error = np.zeros((ranks, count), np.float32)
        self.sent = sent
        self.decay = np.float32(decay)

    def __call__(self, vectors: np.ndarray, step: int) -> Result:
        corrected = self.decay * self.error + vectors
        missing = -corrected.shape[1] % BLOCK
        padded = np.pad(corrected, ((0, 0), (0, missing)))
        decoded = np.stack([np.concatenate([_two_bits(c, self.sent) for c in _blocks(v)]) for v in padded])
        decoded = decoded[:, : corrected.shape[1]].astype(np.float32)
        self.error = corrected - decoded
        return decoded, decoded.sum(0)


class PowerSGD:
    """Vogels et al. 2019, algorithm 1, on the ranks' matrices; QR instead of Gram-Schmidt spans the same space."""

    def __init__(self, shape: tuple[int, int], rank: int) -> None:
        random = np.random.Generator(np.random.Philox(key=1))
        self.factor = random.normal(size=(shape[1], rank)).astype(np.float32)

    def __call__(self, matrices: np.ndarray, step: int) -> Result:
        left, triangle = np.linalg.qr(matrices.sum(0) @ self.factor)
        left = left * np.sign(np.diag(triangle))
        right = np.stack([m.T @ left for m in matrices])
        self.factor = right.sum(0)
        return np.stack([left @ q.T for q in right]), left @ self.factor.T


class DGC:
    """Lin et al. 2018, equations 5 to 7, with their own error feedback."""

    def __init__(self, ranks: int, count: int, momentum: float, clip: float, warmup: int) -> None:
        self.u, self.v = np.zeros((ranks, count), np.float32), np.zeros((ranks, count), np.float32)
        self.momentum, self.clip, self.warmup = momentum, clip, warmup

    def __call__(self, vectors: np.ndarray, step: int) -> Result:
        limit = self.clip * len(vectors) ** -0.5
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        self.u = self.momentum * self.u + vectors * np.minimum(1, limit / norms)
        self.v = self.v + self.u
        ratio = max(0.01, 0.25 ** (1 + 4 * step // self.warmup)) if step < self.warmup else 0.01
        decoded = np.stack([_keep_largest(v, ratio) for v in self.v])
        self.u, self.v = np.where(decoded != 0, 0, self.u), np.where(decoded != 0, 0, self.v)
        return decoded, decoded.sum(0)


def with_feedback(compress: object, gradients: np.ndarray, feedback: bool) -> np.ndarray:
    """Return the sums of every step of ``gradients`` ``[steps, ranks, ...]`` (Karimireddy et al. 2019, algorithm 2)."""
    error, sums = np.zeros_like(gradients[0]), []
    for step, gradient in enumerate(gradients):
        corrected = gradient + error
        decoded, total = compress(corrected, step)  # type: ignore[operator]
        error = corrected - decoded if feedback else error
        sums.append(total)
    return np.stack(sums)


def one_bit_adam(
    gradients: np.ndarray, beta1: float, beta2: float, epsilon: float, freeze: int, compresses: bool = True
) -> np.ndarray:
    """Tang et al. 2021, algorithm 1: the directions ``[steps, n]`` from all ranks' gradients ``[steps, ranks, n]``.

    Adam until step ``freeze``; then momentum, compressed by every rank and once more in one chunk for each rank.
    """
    steps, ranks, n = gradients.shape
    width = -(-n // (BLOCK * ranks)) * BLOCK  # of a chunk
    first, second = np.zeros(n), np.zeros(n)
    errors, chunk_errors = np.zeros((ranks, n)), np.zeros((ranks, width))
    directions = []
    for step in range(steps):
        own = beta1 * first + (1 - beta1) * gradients[step].astype(np.float64)
        if step == freeze:
            second = second / (1 - beta2**step)
        if step < freeze:
            first = own.mean(0)
            second = beta2 * second + (1 - beta2) * gradients[step].astype(np.float64).mean(0) ** 2
            corrected = first / (1 - beta1 ** (step + 1)), second / (1 - beta2 ** (step + 1))
            directions.append(corrected[0] / (np.sqrt(corrected[1]) + epsilon))
            continue
        first = compressed_mean(own, errors, chunk_errors) if compresses else own.mean(0)
        directions.append(bounded(first / (np.sqrt(second) + epsilon)))
    return np.stack(directions)


def bounded(direction: np.ndarray) -> np.ndarray:
    """Kingma and Ba 2015, section 2.1: |m| / sqrt(v) is about 1 at most, which compression of m does not keep."""
    return np.clip(direction, -1.0, 1.0)


def compressed_mean(own: np.ndarray, errors: np.ndarray, chunk_errors: np.ndarray) -> np.ndarray:
    """Tang et al. 2021, section 4: the mean of ``own`` ``[ranks, n]``, compressed by each, and once more by chunk.

    ``errors`` ``[ranks, n]`` and ``chunk_errors`` ``[ranks, width of a chunk]`` are updated in place.
    """
    (ranks, n), width = own.shape, chunk_errors.shape[1]
    own = own + errors
    decoded = np.stack([np.concatenate([np.abs(p).mean() * _signs(p) for p in _blocks(v)]) for v in own])
    errors[:] = own - decoded
    # The ranks' last blocks are padded: their signs of zero are positive.
    padded = np.zeros((ranks, ranks * width))
    padded[:, :n] = decoded
    for rank in range(ranks):
        last = decoded[rank, -1] if n % BLOCK else 0.0
        padded[rank, n : -(-n // BLOCK) * BLOCK] = abs(last)
    chunks = padded.mean(0).reshape(ranks, width) + chunk_errors
    sent = np.stack([np.concatenate([np.abs(p).mean() * _signs(p) for p in _blocks(c)]) for c in chunks])
    chunk_errors[:] = chunks - sent
    return sent.reshape(-1)[:n]


def zero_one_adam(
    gradients: np.ndarray,
    rates: Sequence[float],
    phases: Sequence[str],
    beta1: float,
    beta2: float,
    epsilon: float,
    compresses: bool = True,
) -> np.ndarray:
    """Lu et al. 2022, algorithm 1: every rank's parameters ``[steps, ranks, n]``, from 0, without weight decay.

    ``gradients``: all ranks', ``[steps, ranks, n]``. ``phases``: adam, a step of T_v and T_u whose momentum moves by
    the mean gradient; compressed and sync, a step of T_u; local. Moments are corrected as in Adam.
    """
    _, ranks, n = gradients.shape
    first, since_sync, values = np.zeros((ranks, n)), np.zeros((ranks, n)), np.zeros((ranks, n))
    errors, chunk_errors = np.zeros((ranks, n)), np.zeros((ranks, -(-n // (BLOCK * ranks)) * BLOCK))
    second, anchor, total, updates, trajectory = np.zeros(n), np.zeros(n), 0.0, 0, []
    for step, (rate, phase) in enumerate(zip(rates, phases, strict=True)):
        own = gradients[step].astype(np.float64)
        if phase == "adam":
            own = np.repeat(own.mean(0)[None], ranks, axis=0)
            updates, second = updates + 1, beta2 * second + (1 - beta2) * own[0] ** 2
        first = beta1 * first + (1 - beta1) * own
        denominator = np.sqrt(second / (1 - beta2**updates)) + epsilon
        correction = 1 / (1 - beta1 ** (step + 1))
        total += rate
        direction = first * correction / denominator
        values = values - rate * (direction if phase == "adam" else bounded(direction))
        since_sync += rate * first
        if phase in ("compressed", "sync"):
            mean = compressed_mean(since_sync, errors, chunk_errors) if compresses else since_sync.mean(0)
            first = np.repeat((mean / total)[None], ranks, axis=0)
            step_of_all = total * bounded(mean / total * correction / denominator)
            values = np.repeat((anchor - step_of_all)[None], ranks, axis=0)
        if phase != "local":
            anchor, total, since_sync = values[0], 0.0, np.zeros((ranks, n))
        trajectory.append(values)
    return np.stack(trajectory)


def momenta(gradients: np.ndarray, decay: float) -> np.ndarray:
    """Return m = decay m + g after every step."""
    values, momentum = [], np.zeros_like(gradients[0])
    for gradient in gradients:
        momentum = decay * momentum + gradient
        values.append(momentum)
    return np.stack(values)


def _cosines(side: int) -> np.ndarray:
    """Return the orthonormal DCT-II as a matrix, from its definition value by value."""
    rows = []
    for k in range(side):
        scale = np.sqrt((1 if k == 0 else 2) / side)
        rows.append([scale * np.cos(np.pi * (j + 0.5) * k / side) for j in range(side)])
    return np.array(rows)


def demo(gradients: np.ndarray, decay: float, count: int, side: int = 64) -> np.ndarray:
    """Peng et al. 2024, algorithm 1: directions ``[steps, rows, columns]`` of gradients ``[steps, ranks, ...]``."""
    steps, ranks, rows, columns = gradients.shape
    basis, momentum, directions = _cosines(side), np.zeros((ranks, rows, columns)), []
    for step in range(steps):
        total = np.zeros((rows, columns))
        for rank in range(ranks):
            momentum[rank] = decay * momentum[rank] + gradients[step, rank]
            for top in range(0, rows, side):
                for left in range(0, columns, side):
                    area = np.s_[top : top + side, left : left + side]
                    block = np.zeros((side, side))
                    own = momentum[rank][area]
                    block[: own.shape[0], : own.shape[1]] = own
                    components = (basis @ block @ basis.T).reshape(-1)
                    sent = np.zeros_like(components)
                    largest = np.argsort(-np.abs(components), kind="stable")[:count]
                    sent[largest] = _bf16(components[largest].astype(np.float32))
                    decoded = (basis.T @ sent.reshape(side, side) @ basis)[: own.shape[0], : own.shape[1]]
                    momentum[rank][area] -= decoded
                    total[area] += decoded
        directions.append(np.sign(total))
    return np.stack(directions)
