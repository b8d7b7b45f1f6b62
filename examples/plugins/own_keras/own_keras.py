"""A ``keras.Model`` as a model of hvdlm: dilated causal convolutions (van den Oord et al. 2016, WaveNet)."""

from hvdlm import hookimpl


def make(model, vocab, context):
    import keras
    from keras import layers

    from hvdlm_tensorflow.models.custom_module import describe

    def convolutions():
        tokens = keras.Input([None], dtype="int32")  # [rows, time] -> [rows, time, vocab]
        x = layers.Embedding(vocab, model.width)(tokens)
        for i in range(model.layers):
            y = layers.Conv1D(model.width, 2, dilation_rate=2**i, padding="causal", activation="relu")(x)
            x = layers.Dropout(model.dropout)(x + y)
        return keras.Model(tokens, layers.Dense(vocab)(layers.LayerNormalization()(x)))

    return describe(convolutions, vocab, context)


@hookimpl
def hvdlm_models():
    return {"keras_convolutions": make}
