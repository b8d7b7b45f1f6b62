"""Horovod on 512 P100, docs/benchmarks.rst and arXiv 1802.05799: tf_cnn_benchmarks, a batch of 64 images a GPU."""

from __future__ import annotations

from collections.abc import Sequence

from hvdlm.parallel.mesh import Mesh
from hvdlm.planning.hardware import Hardware
from hvdlm.planning.rates import Computation, Network
from hvdlm.planning.step_time import step_time
from hvdlm.planning.work import Bucket, Collective, Pass, Segment, Work

# Parameters in millions and multiplications in billions of the layers, first to last; of Inception, of its modules, the
# multiplications from their parameters and the size of their images.
VGG16 = (
    (0.002, 0.087), (0.037, 1.85), (0.074, 0.925), (0.148, 1.85), (0.295, 0.925), (0.59, 1.85), (0.59, 1.85),
    (1.18, 0.925), (2.36, 1.85), (2.36, 1.85), (2.36, 0.462), (2.36, 0.462), (2.36, 0.462), (102.76, 0.103),
    (16.78, 0.017), (4.1, 0.004),
)  # fmt: skip
INCEPTION_V3 = (
    (0.21, 1.35), (0.256, 0.314), (0.278, 0.34), (0.285, 0.349), (1.15, 0.402), (1.29, 0.373), (1.69, 0.488),
    (1.69, 0.488), (2.14, 0.618), (1.7, 0.29), (5.04, 0.322), (6.07, 0.388), (2.05, 0.002),
)  # fmt: skip
# Images a second of one P100 (DGX-1), tensorflow.org/performance/benchmarks, May 2017.
IMAGES = {"Inception V3": (INCEPTION_V3, 142.0, 0.90), "VGG-16": (VGG16, 154.0, 0.68)}


def work_of(layers: Sequence[tuple[float, float]], seconds: float) -> Work:
    """Return the work of a step of ``seconds``, a third of it forward; every layer is a bucket."""
    total = sum(multiplications for _, multiplications in layers)
    segments, buckets = [], []
    for index, (parameters, multiplications) in enumerate(layers):
        share = seconds * multiplications / total
        segments.append(Segment(f"layers.{index}", Pass(seconds=share / 3), Pass(seconds=2 * share / 3)))
        elements = 1e6 * parameters
        buckets.insert(0, Bucket(index, elements, (Collective("all_reduce", 4.0 * elements, "data"),)))
    return Work(tuple(segments), 1, buckets=tuple(buckets))


def efficiency(hardware: Hardware, name: str, ranks: int = 512) -> float:
    """Return images a second of ``ranks`` GPUs, divided by those of as many single ones."""
    layers, images, _ = IMAGES[name]
    seconds = 64 / images
    computation = Computation(hardware, "tensorflow", "fp32", hardware.ranks_per_node, ranks)
    time = step_time([work_of(layers, seconds)], "1f1b", computation, Network(hardware, Mesh(ranks, 1, 1)))
    return seconds / time.seconds
