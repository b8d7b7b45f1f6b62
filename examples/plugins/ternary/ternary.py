"""TernGrad (Wen et al. 2017): -1, 0 or 1 times the largest magnitude, rounded at random; two bits an element."""

from hvdlm import hookimpl


def make(settings, seed, place, ranks):
    from keras import ops

    from hvdlm_compression.base import Compressor, blocks
    from hvdlm_compression.bits import pack, unpack
    from hvdlm_compression.noise import uniform

    class Ternary(Compressor):
        biased = False

        def compress(self, tensor, step):
            scale = ops.maximum(ops.max(ops.abs(tensor), keepdims=True), 1e-30)
            chance = uniform(tensor.shape[0], step, self.seed + 65537 * self.place)
            return [scale, pack(ops.floor(blocks(tensor / scale + 1.0 + chance, 4)), 2)]

        def decompress(self, payload, shape, step):
            return (ops.reshape(unpack(payload[1], 2), (-1,))[: shape[0]] - 1.0) * payload[0]

    return Ternary(settings, seed, place, ranks)


@hookimpl
def hvdlm_compressors():
    return {"ternary": make}
