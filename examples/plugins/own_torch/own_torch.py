"""A ``torch.nn.Module`` as a model of hvdlm: dilated causal convolutions (van den Oord et al. 2016, WaveNet)."""

from hvdlm import hookimpl


def make(model, vocab, context):
    import torch
    from torch import nn

    from hvdlm_torch.models.custom_module import describe

    class Convolutions(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(vocab, model.width)
            self.layers = nn.ModuleList(
                nn.Conv1d(model.width, model.width, 2, dilation=2**i) for i in range(model.layers)
            )
            self.norm, self.head = nn.LayerNorm(model.width), nn.Linear(model.width, vocab)

        def forward(self, tokens):  # [rows, time] -> [rows, time, vocab]
            x = self.embed(tokens).transpose(1, 2)
            for layer in self.layers:
                x = x + torch.relu(layer(nn.functional.pad(x, (layer.dilation[0], 0))))
            return self.head(self.norm(x.transpose(1, 2)))

    return describe(Convolutions, vocab, context)


@hookimpl
def hvdlm_models():
    return {"convolutions": make}
