"""What the library computes: losses, gradients and scores, from numpy arrays to numpy arrays.

The equations are those in ``hvdlm_language.gpt`` and ``hvdlm_language.rnn``. ``p``: the parameters by name; ``s``: the
model's settings. A recurrent model's state is ``[[array of rows, width, ...] of every layer]``, a GPT's is None.
"""

import numpy as np
import torch
import torch.nn.functional as F


def gradients(kind, s, parameters, batch, state, smoothing, z_loss):
    """Return (loss sum, {name: gradient of the loss sum}, state after the batch)."""
    p = {name: torch.tensor(array, requires_grad=True) for name, array in parameters.items()}
    losses, after = _losses(kind, s, p, batch, state, smoothing, z_loss)
    losses.sum().backward()
    return float(losses.sum(dtype=torch.float64)), {name: t.grad.numpy() for name, t in p.items()}, after


@torch.no_grad()
def loss_sum(kind, s, parameters, batch, state):
    """Return (loss sum, state after the batch)."""
    losses, after = _losses(kind, s, _tensors(parameters), batch, state)
    return float(losses.sum(dtype=torch.float64)), after


@torch.no_grad()
def scores(kind, s, parameters, tokens, state):
    """Return (logits ``[rows, time, vocab]``, state after the tokens)."""
    logits, after = MODELS[kind](s, _tensors(parameters), torch.as_tensor(tokens), state)
    return logits.numpy(), after


def _tensors(parameters):
    return {name: torch.as_tensor(array) for name, array in parameters.items()}


def _losses(kind, s, p, batch, state, smoothing=0.0, z_loss=0.0):
    logits, after = MODELS[kind](s, p, torch.as_tensor(batch.inputs), state)
    targets = torch.as_tensor(batch.targets.astype(np.int64)).flatten()
    logits = logits.flatten(0, 1)
    losses = F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
    losses = losses + z_loss * logits.logsumexp(-1).square()
    return (losses if batch.weights is None else losses * torch.as_tensor(batch.weights).flatten()), after


def _gpt(s, p, tokens, state):
    x = F.embedding(tokens, p["embed.tokens"])
    if s.positions == "learned":
        x = x + p["embed.positions"][: tokens.shape[1]]
    for i in range(s.layers):
        x = x + _attention(s, p, f"layers.{i}.attention", _norm(s, p, f"layers.{i}.attention_norm", x))
        h = _norm(s, p, f"layers.{i}.mlp_norm", x)
        up = _linear(p, f"layers.{i}.mlp.up", h)
        gated = F.silu(_linear(p, f"layers.{i}.mlp.gate", h)) * up if s.activation == "swiglu" else None
        x = x + _linear(p, f"layers.{i}.mlp.down", F.gelu(up, approximate="tanh") if gated is None else gated)
    return _norm(s, p, "final_norm", x) @ p["embed.tokens" if s.tie_embeddings else "head.weight"].T, None


def _attention(s, p, name, h):
    rows, time, _ = h.shape
    q, k, v = (_linear(p, f"{name}.{n}", h) for n in ("query", "key", "value"))
    q, k, v = (t.view(rows, time, -1, s.head_width).transpose(1, 2) for t in (q, k, v))
    if s.positions == "rotary":
        q, k = _rotate(s, q), _rotate(s, k)
    a = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=s.heads != s.kv_heads)
    return _linear(p, f"{name}.output", a.transpose(1, 2).reshape(rows, time, -1))


def _rotate(s, x):
    power = np.arange(0, s.head_width, 2) / s.head_width
    angle = np.tile(np.outer(np.arange(x.shape[2]), s.rotary_base**-power), 2)
    cos, sin = (torch.tensor(f(angle), dtype=torch.float32) for f in (np.cos, np.sin))
    half = s.head_width // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def _linear(p, name, x):
    product = x @ p[f"{name}.weight"]
    return product + p[f"{name}.bias"] if f"{name}.bias" in p else product


def _norm(s, p, name, x):
    if s.norm == "rmsnorm":
        return F.rms_norm(x, (s.width,), p[f"{name}.scale"], s.norm_epsilon)
    return F.layer_norm(x, (s.width,), p[f"{name}.scale"], p.get(f"{name}.bias"), s.norm_epsilon)


def _rnn(s, p, tokens, state):
    x, after = F.embedding(tokens, p["embed.tokens"]), []
    layer = {"rnn": torch.rnn_tanh, "gru": torch.gru, "lstm": torch.lstm}[s.cell]
    for i in range(s.layers):
        weights = [p[f"layers.{i}.{k}.weight"].flatten(1).T for k in ("input", "recurrent")]
        weights += [p[f"layers.{i}.{k}.bias"].flatten() for k in ("input", "recurrent")]
        zeros = [np.zeros((len(tokens), s.width), np.float32)] * s.carries
        before = [torch.as_tensor(array)[None] for array in (zeros if state is None else state[i])]
        x, *last = layer(x, before if s.cell == "lstm" else before[0], weights, True, 1, 0.0, False, False, True)
        after.append([t[0].detach().numpy() for t in last])  # no gradient flows through the state
    return x @ p["embed.tokens" if s.tie_embeddings else "head.weight"].T + p["head.bias"], after


MODELS = {"gpt": _gpt, "rnn": _rnn}
