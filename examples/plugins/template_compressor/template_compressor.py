"""A template of a compressor: the largest of every few neighbours stays, the others are dropped.

Copy this folder, rename what is called template_compressor, and write ``compress`` and ``decompress`` anew, on
``keras.ops``: they run in both frameworks. What was dropped is added to the next gradient (error feedback) by hvdlm, as
``biased`` says. Shapes and dtypes of the payload have to follow from the tensor's shape alone.
"""

from hvdlm import hookimpl

BLOCK = 16  # neighbours of which one stays: its value (4 bytes) and its place (1 byte) travel


def make(settings, seed, place, ranks):
    """Return the compressor. keras is imported here, when the environment says on which framework it runs."""
    from keras import ops

    from hvdlm_compression.base import Compressor, blocks

    class LargestOfBlock(Compressor):
        collective = "all_gather"  # other ranks chose other places: payloads don't add up
        biased = True

        def compress(self, tensor, step):
            """[n] -> values [n / 16] and places [n / 16]; step is what random numbers would follow from."""
            rows = blocks(tensor, BLOCK)  # [n / 16, 16], zeros at the end
            places = ops.argmax(ops.abs(rows), axis=1)
            values = ops.take_along_axis(rows, places[:, None], axis=1)[:, 0]
            return [values, ops.cast(places, "uint8")]

        def decompress(self, payload, shape, step):
            """Payload -> [n]."""
            values, places = payload
            rows = ops.one_hot(ops.cast(places, "int32"), BLOCK) * values[:, None]
            return ops.reshape(rows, (-1,))[: shape[0]]

    return LargestOfBlock(settings, seed, place, ranks)


@hookimpl
def hvdlm_compressors():
    """The name that --communication.compression.algorithm takes; the entry point has the same."""
    return {"template_compressor": make}
