"""Template of a compressor: of every 16 neighbouring elements only the largest is sent.

Copy this folder, rename template_compressor everywhere, and rewrite ``compress`` and ``decompress`` with ``keras.ops``,
which runs in both frameworks. Since ``biased`` is True, hvdlm adds the dropped elements to the next gradient (error
feedback). The payload's shapes and dtypes must depend on the tensor's shape alone.
"""

from hvdlm import hookimpl

BLOCK = 16  # elements of which one is sent: its value (4 bytes) and its index (1 byte)


def make(settings, seed, group_rank, ranks):
    """Return the compressor. keras is imported here, after hvdlm has chosen its framework by environment variables."""
    from keras import ops

    from hvdlm_compression.compressor import Compressor, blocks

    class LargestOfBlock(Compressor):
        collective = "all_gather"  # ranks choose different indices, so that payloads can't be summed
        biased = True

        def compress(self, tensor, step):
            """[n] -> values [n / 16] and indices [n / 16]; random numbers would be a function of step."""
            rows = blocks(tensor, BLOCK)  # [n / 16, 16], padded with zeros
            indices = ops.argmax(ops.abs(rows), axis=1)
            values = ops.take_along_axis(rows, indices[:, None], axis=1)[:, 0]
            return [values, ops.cast(indices, "uint8")]

        def decompress(self, payload, shape, step):
            """Payload -> [n]."""
            values, indices = payload
            rows = ops.one_hot(ops.cast(indices, "int32"), BLOCK) * values[:, None]
            return ops.reshape(rows, (-1,))[: shape[0]]

    return LargestOfBlock(settings, seed, group_rank, ranks)


@hookimpl
def hvdlm_compressors():
    """Return the compressor by the name for --communication.compression.algorithm, which is the entry point's, too."""
    return {"template_compressor": make}
