"""TernGrad (Wen et al. 2017): -1, 0 or 1 times the largest magnitude, stochastically rounded; two bits an element."""

from hvdlm import hookimpl


def make(settings, seed, group_rank, ranks):
    from keras import ops

    from hvdlm_compression.bits import pack, unpack
    from hvdlm_compression.compressor import Compressor, blocks
    from hvdlm_compression.noise import uniform

    class Ternary(Compressor):
        biased = False

        def compress(self, tensor, step):
            scale = ops.maximum(ops.max(ops.abs(tensor), keepdims=True), 1e-30)
            noise = uniform(tensor.shape[0], step, self.seed + 65537 * self.group_rank)
            return [scale, pack(ops.floor(blocks(tensor / scale + 1.0 + noise, 4)), 2)]

        def decompress(self, payload, shape, step):
            return (ops.reshape(unpack(payload[1], 2), (-1,))[: shape[0]] - 1.0) * payload[0]

    return Ternary(settings, seed, group_rank, ranks)


@hookimpl
def hvdlm_compressors():
    return {"ternary": make}
