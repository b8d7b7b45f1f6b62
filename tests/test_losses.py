"""The chunked cross entropy of PyTorch: the losses, gradients and updates of the plain one, in less memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from builders import (
    configured_spec,
    encoder_batch,
    parameters,
    single_rank_trainable,
    small_config,
    small_trainable,
    token_batch,
)
from hvdlm_language.loss_terms import LossTerms
from hvdlm_torch import kernels, losses

VOCAB, EMBED, TARGETS, ROWS = 101, 16, 50, 7  # an odd vocabulary, and a last chunk of one target
SGD = {"optimizer": "sgd", "momentum": 0.0, "clip": 0.0, "bias": False}


@pytest.fixture(params=[0, 27], ids=["", "padded"])
def rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Have chunks of 7 targets, with as many logits as there are, or padded to 128 as on a GPU."""
    monkeypatch.setattr(losses, "rows_of_chunk", lambda vocab, device: ROWS)
    monkeypatch.setattr(losses, "missing_outputs", lambda x, weight: request.param)
    return ROWS


def inputs() -> list[torch.Tensor]:
    """Return hidden states, a head and its bias."""
    random = torch.Generator().manual_seed(0)
    return [torch.randn(*s, generator=random).requires_grad_() for s in ((TARGETS, EMBED), (VOCAB, EMBED), (VOCAB,))]


def targets_and_weights() -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    weights = torch.rand(TARGETS, generator=random)
    return torch.randint(0, VOCAB, (TARGETS,), generator=random), weights * (weights > 0.3)


def near(ours: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    assert ours.shape == expected.shape and ours.dtype == expected.dtype
    return bool((ours - expected).norm() <= tolerance * expected.norm())


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("terms", [LossTerms(), LossTerms(smoothing=0.1), LossTerms(0.2, 0.05)], ids=str)
def test_losses_and_gradients_are_the_plain_ones(rows: int, terms: LossTerms, biased: bool, weighted: bool) -> None:
    hidden, head, bias = inputs()
    leaves = [hidden, head, bias] if biased else [hidden, head]
    targets, weights = targets_and_weights()
    scores = F.linear(*leaves)
    plain = F.cross_entropy(scores, targets, reduction="none", label_smoothing=terms.smoothing)
    plain = plain + terms.z_loss * scores.logsumexp(-1) ** 2
    plain = plain * weights if weighted else plain
    ours = losses.chunked_cross_entropy(
        hidden, head, bias if biased else None, targets, weights if weighted else None, terms, torch.float32
    )
    assert near(ours, plain, 1e-6)
    for a, b in zip(*(torch.autograd.grad(x.sum() * 0.37, leaves) for x in (ours, plain)), strict=True):
        assert near(a, b, 1e-6)


def test_bf16_products_have_float32_losses(rows: int) -> None:
    hidden, head, _ = inputs()
    targets, _ = targets_and_weights()
    scores = F.linear(hidden.bfloat16(), head.bfloat16()).float()
    plain = F.cross_entropy(scores, targets, reduction="none")
    ours = losses.chunked_cross_entropy(hidden, head, None, targets, None, LossTerms(), torch.bfloat16)
    assert near(ours, plain, 1e-6)
    for a, b in zip(*(torch.autograd.grad(x.sum(), [hidden, head]) for x in (ours, plain)), strict=True):
        assert near(a, b, 1e-2)


def test_large_logits_have_exact_losses(rows: int) -> None:
    hidden, head, _ = inputs()
    targets, _ = targets_and_weights()
    plain = F.cross_entropy(F.linear(hidden * 1e3, head).double(), targets, reduction="none").float()
    ours = losses.chunked_cross_entropy(hidden * 1e3, head, None, targets, None, LossTerms(), torch.float32)
    assert torch.isfinite(ours).all() and near(ours, plain, 1e-6)


def test_a_gradient_that_differs_by_target_is_refused(rows: int) -> None:
    hidden, head, _ = inputs()
    targets, weights = targets_and_weights()
    ours = losses.chunked_cross_entropy(hidden, head, None, targets, None, LossTerms(), torch.float32)
    with pytest.raises(RuntimeError, match="sum of its losses only"):
        (ours * weights).sum().backward()


class Largest(TorchDispatchMode):
    """Records the elements of the largest tensor, and the calls, of the operations inside."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        sizes = [t.untyped_storage().nbytes() // t.element_size() for t in tree_leaves(result) if torch.is_tensor(t)]
        self.elements, self.calls = max([self.elements, *sizes]), self.calls + 1
        return result


@pytest.mark.parametrize("training", [True, False])
def test_no_tensor_holds_the_logits_of_the_whole_batch(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    vocab, context = 1000, 64
    monkeypatch.setitem(losses._CHUNK, "cpu", 8 * vocab)
    config = small_config("torch")
    config.data.context = context
    trainable = single_rank_trainable(configured_spec(config, vocab), config)
    batch = token_batch(shape=(4, context), vocab=50)
    trainable.train_step([batch], 0.01, 0)  # the first step measures what it keeps, in Python
    with Largest() as largest:
        trainable.train_step([batch], 0.01, 1) if training else trainable.eval_step(batch)
    flat = sum(a.size for a in parameters(trainable).values())
    assert largest.calls > 100 and largest.elements <= flat + 1024 < 4 * context * vocab


MODELS: list[tuple[str, dict[str, Any]]] = [
    ("gpt", {}),
    ("gpt", {"tie_embeddings": False}),
    ("llama", {}),
    ("lstm", {}),
    ("seq2seq", {}),
    ("gpt", {"label_smoothing": 0.1, "z_loss": 0.01}),
    ("gpt", {"activation_checkpointing": True}),
    ("gpt", {"lora": {"rank": 4, "layers": "*"}}),
]


@pytest.mark.parametrize("model, options", MODELS, ids=lambda value: value if isinstance(value, str) else "")
def test_chunks_change_no_update(model: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    apply = losses._ChunkedCrossEntropy.apply

    def counted(*arguments: Any) -> torch.Tensor:
        calls.append(len(arguments[0]))
        return apply(*arguments)

    monkeypatch.setattr(losses._ChunkedCrossEntropy, "apply", counted)
    batches = [encoder_batch(model, s) if model == "seq2seq" else token_batch(s, weights=True) for s in range(3)]
    outcomes = []
    for chunk in (2**22, 5 * 50):
        monkeypatch.setitem(losses._CHUNK, "cpu", chunk)
        trainable = small_trainable("torch", model, **SGD, **options)
        steps = [trainable.train_step([batch], 0.1, number) for number, batch in enumerate(batches)]
        outcomes.append((steps, trainable.eval_step(batches[0]), parameters(trainable)))
        assert bool(calls) == (chunk < 2**22)
    (steps, evaluated, plain), (chunked_steps, chunked_evaluated, chunked) = outcomes
    np.testing.assert_allclose([s.loss for s in chunked_steps], [s.loss for s in steps], rtol=1e-6)
    np.testing.assert_allclose([s.grad_norm for s in chunked_steps], [s.grad_norm for s in steps], rtol=1e-5)
    np.testing.assert_allclose(chunked_evaluated, evaluated, rtol=1e-6)
    for name in plain:
        np.testing.assert_allclose(chunked[name], plain[name], rtol=1e-5, atol=2e-6, err_msg=name)


def test_what_chunks_do_not_serve_stays_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled steps, fp16 and ranks that share a vocabulary."""
    monkeypatch.setitem(losses._CHUNK, "cpu", 50)
    targets = torch.zeros(8, 12, dtype=torch.int64)
    forward = small_trainable("torch", precision="bf16")._forward
    assert forward._chunked_head(targets) is forward.model.head
    assert forward._chunked_head(targets[:1, :1]) is None  # one chunk
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert forward._chunked_head(targets) is None
    with monkeypatch.context() as patch:
        patch.setattr(forward, "half", torch.float16)
        assert forward._chunked_head(targets) is None
    forward.collectives.size = 2
    assert forward._chunked_head(targets) is None


@pytest.mark.parametrize("biased", [False, True])
def test_padded_outputs_are_dropped(biased: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "ONEDNN_IS_FASTER", False)
    monkeypatch.setattr(kernels, "missing_outputs", lambda x, weight: 27)
    hidden, head, bias = inputs()
    leaves = [hidden, head, bias] if biased else [hidden, head]
    ours, plain = kernels.linear_rows(*leaves), F.linear(*leaves)
    assert near(ours, plain, 1e-6)
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), leaves) for y in (ours, plain)), strict=True):
        assert near(a, b, 1e-6)


@pytest.mark.parametrize(("vocab", "missing"), [(50257, 47), (50304, 0), (64, 0), (65, 63)])
def test_outputs_are_padded_to_64_on_gpus(vocab: int, missing: int) -> None:
    class OnGPU:
        device = torch.device("cuda")

        def __init__(self, *shape: int) -> None:
            self.shape = shape

        def numel(self) -> int:
            return int(np.prod(self.shape))

        def __len__(self) -> int:
            return self.shape[0]

    assert kernels.missing_outputs(OnGPU(12, 1024, 768), OnGPU(vocab, 768)) == missing
    assert kernels.missing_outputs(OnGPU(1, 1, 768), OnGPU(vocab, 768)) == 0  # a token that is generated
    assert kernels.missing_outputs(torch.zeros(12, 1024, 1), torch.zeros(vocab, 1)) == 0
