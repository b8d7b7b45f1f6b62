"""Low-rank adapters (Hu et al. 2021): what is trained and kept, what stays; one body, parametrised by framework."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_huggingface import TEXT, write_pretrained

from builders import (
    CONTEXT,
    ENCODER_MODELS,
    ROWS,
    VOCAB,
    both_frameworks,
    configured_spec,
    encoder_batch,
    parameters,
    save_checkpoint,
    single_rank_trainable,
    small_config,
    small_trainable,
    token_batch,
    train_steps,
)
from hvdlm import cli
from hvdlm.checkpoints import discovery, load
from hvdlm.checkpoints.base_weights import attach, check
from hvdlm.config import Config, LoRAConfig, ModelConfig, ParallelConfig, TrainConfig
from hvdlm.errors import HvdlmError
from hvdlm.models.lora import adapt
from hvdlm.parallel.mesh import make_mesh
from hvdlm.planning.closed_forms import closed_form
from hvdlm_backends.local import LocalWorld
from hvdlm_language.presets import PRESETS
from hvdlm_language.rebuild_spec import spec_of
from launching import losses, run_python

SGD = {"optimizer": "sgd", "weight_decay": 0.0, "clip": 0.0}
HALF = {"precision": "bf16", "activation_checkpointing": True}
EVERY: dict[str, Any] = {"layers": "*"}
ALL = ["gpt", "llama", "qwen3", "lstm", *ENCODER_MODELS]


def adapted_config(framework: str, model: str, lora: dict[str, Any], **train: Any) -> Config:
    """Return the configuration of a small model of one layer with adapters; ``train``: options of that section."""
    config = small_config(framework, model, bias=False, layers=1)
    config.train = TrainConfig(batch_size=ROWS, warmup=0, **train)
    config.lora = LoRAConfig(**lora)
    return config


def lora_trainable(framework: str, model: str, lora: dict[str, Any] | None = None, **train: Any) -> Any:
    """Return a small trainable; without ``lora``, all of its weights are trained."""
    return small_trainable(framework, model, lora, bias=False, **train)


def batch_of(model: str, step: int = 0) -> Any:
    return encoder_batch(model, step) if model in ENCODER_MODELS else token_batch(step)


def set_parameters(trainable: Any, values: Mapping[str, np.ndarray]) -> None:
    trainable.load_state({**trainable.state(), **{f"parameters/{n}": v.astype(np.float32) for n, v in values.items()}})


@both_frameworks
@pytest.mark.parametrize("model, micro", [("gpt", 4), ("lstm", None)])
def test_adapter_gradients_follow_from_the_weight_gradients(framework: str, model: str, micro: int | None) -> None:
    """With W = base + s down up, dL/d down = s dL/dW up^T and dL/d up = s down^T dL/dW, for every weight at once."""
    config = adapted_config(framework, model, {"rank": 3, "alpha": 6.0, **EVERY}, micro_batch_size=micro, **SGD)
    spec, random = configured_spec(config), np.random.default_rng(0)
    low = single_rank_trainable(spec, config)
    full = lora_trainable(framework, model, layers=1, micro_batch_size=micro, **SGD)
    start = {name: 0.1 * random.normal(size=array.shape) for name, array in parameters(low).items()}
    whole = parameters(full)
    for one in spec.adapters:
        product = start[one.down] @ start[one.up].reshape(3, -1)
        whole[one.weight] = whole[one.weight] + 2.0 * product.reshape(whole[one.weight].shape)
    assert len(spec.adapters) == sum(p.name.endswith(("weight", "tokens", "positions")) for p in spec.frozen)
    set_parameters(low, start)
    set_parameters(full, whole)
    rows = batch_of(model)
    assert low.eval_step(rows)[0] == pytest.approx(full.eval_step(rows)[0], rel=1e-5)
    micro_batches = [rows.rows(i, i + micro) for i in range(0, ROWS, micro)] if micro else [rows]
    for trainable in (low, full):
        trainable.train_step(micro_batches, rate := 10.0, 0)
    after, gradients = parameters(low), {n: (whole[n] - v) / rate for n, v in parameters(full).items()}
    for one in spec.adapters:
        gradient = gradients[one.weight].reshape(len(gradients[one.weight]), -1)
        expected = {
            one.down: 2.0 * gradient @ start[one.up].reshape(3, -1).T,
            one.up: 2.0 * start[one.down].T @ gradient,
        }
        for name, value in expected.items():
            update, largest = (start[name] - after[name]).reshape(value.shape) / rate, np.abs(value).max()
            np.testing.assert_allclose(update, value, rtol=0, atol=1e-3 * largest, err_msg=name)
            assert largest > 1e-5, name


@pytest.mark.parametrize("model", ALL)
def test_both_frameworks_train_adapters_alike(model: str) -> None:
    """Losses within 2e-5 over 5 steps of AdamW; the first is that of the base."""
    lora = {"rank": 2, **(EVERY if model == "convnet" else {})}
    one, other = (lora_trainable(framework, model, lora, epsilon=1e-4) for framework in ("torch", "tensorflow"))
    base = lora_trainable("torch", model).eval_step(batch_of(model))
    assert one.eval_step(batch_of(model)) == pytest.approx(base, rel=1e-6)
    for step in range(5):
        a, b = (t.train_step([batch_of(model, step)], 0.03, step) for t in (one, other))
        assert a.loss == pytest.approx(b.loss, abs=2e-5) and a.grad_norm == pytest.approx(b.grad_norm, rel=2e-4)
    np.testing.assert_allclose(one.eval_step(batch_of(model)), other.eval_step(batch_of(model)), rtol=1e-5)
    assert one.eval_step(batch_of(model))[0] != pytest.approx(base[0], rel=1e-4)


@both_frameworks
@pytest.mark.parametrize("model", ["gpt", "gru"])
def test_only_adapters_have_gradients_and_optimizer_state(framework: str, model: str) -> None:
    config = adapted_config(framework, model, {"rank": 2})
    spec, trainable, base = configured_spec(config), None, lora_trainable(framework, model, layers=1)
    trainable = single_rank_trainable(spec, config)
    train_steps(trainable, 3)
    small, predicted = sum(p.size for p in spec.params), closed_form(config, spec, make_mesh(1, ParallelConfig()), 0)
    assert spec.parameters == small < 0.25 * spec.frozen_parameters == 0.25 * sum(p.size for p in spec.frozen)
    held = trainable.memory()
    assert held["optimizer"] == 8 * small and held["gradients"] == 4 * small
    assert predicted is not None
    assert {k: held[k] for k in held if k != "activations"} == {
        k: v for k, v in predicted.memory.items() if k != "activations"
    }
    assert {f"parameters/{p.name}" for p in spec.params} == {n for n in trainable.state() if n.startswith("param")}
    changed = trainable.eval_step(token_batch())
    set_parameters(trainable, {n: v * 0 for n, v in parameters(trainable).items()})
    assert trainable.eval_step(token_batch()) == base.eval_step(token_batch()) != changed


@both_frameworks
def test_bf16_and_recomputed_activations_work_with_adapters(framework: str) -> None:
    plain, other = (lora_trainable(framework, "gpt", {"rank": 2}, layers=1, **more) for more in ({}, HALF))
    a, b = train_steps(plain, 3), train_steps(other, 3)
    assert a[-1].loss != b[-1].loss and a[-1].loss == pytest.approx(b[-1].loss, abs=0.05)
    assert a[0].grad_norm == pytest.approx(b[0].grad_norm, rel=0.1)


@both_frameworks
def test_a_restored_state_continues_bit_for_bit(framework: str) -> None:
    first, second = (lora_trainable(framework, "gpt", {"rank": 2}, layers=1) for _ in range(2))
    train_steps(first, 3)
    second.load_state(first.state())
    for step in range(3, 6):
        a, b = (trainable.train_step([token_batch(step)], 0.01, step) for trainable in (first, second))
        assert a.loss == b.loss


def test_adapted_layers_are_chosen_by_pattern() -> None:
    spec = PRESETS["llama"](ModelConfig("llama"), VOCAB, CONTEXT)
    usual = adapt(spec, LoRAConfig(4)).adapters
    assert {one.weight.split(".", 2)[2] for one in usual} == {
        f"attention.{projection}.weight" for projection in ("query", "key", "value", "output")
    }
    few = adapt(spec, LoRAConfig(4, 8.0, ["layers.1.*.query", "*.mlp.up.weight"]))
    assert [one.weight for one in few.adapters] == [
        f"layers.{name}.weight" for name in ("0.mlp.up", "1.attention.query", "1.mlp.up", "2.mlp.up", "3.mlp.up")
    ]
    assert few.adapters[0].factor == 2.0 and few.params[0].shape == (128, 4) and few.params[1].shape == (4, 344)
    assert 0.6 * spec.flops_per_token < few.flops_per_token < adapt(spec, LoRAConfig(4, None, "*")).flops_per_token


COMMANDS = "import json, sys; from hvdlm import cli\nfor one in json.loads(sys.argv[1]): assert cli.main(one) == 0, one"


@pytest.fixture(scope="module", params=["torch", "tensorflow"])
def tuned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, str]:
    """Return (framework, a folder with a start, a run of 4 steps, its second half again; what was printed)."""
    framework, folder = request.param, tmp_path_factory.mktemp("tuned")
    write_pretrained({"torch": "gpt2", "tensorflow": "llama"}[framework], folder / "start")
    (folder / "text.txt").write_text(TEXT)
    common = ["--framework", framework, "--data.cache", str(folder / "cache"), "--log.every", "1"]
    run, step = folder / "run", folder / "run" / "checkpoints" / "step-00000002"
    options = [*common, "--model.pretrained", str(folder / "start"), "--data.path", str(folder / "text.txt")]
    options += ["--data.context", "16", "--train.batch_size", "8", "--train.steps", "4", "--checkpoint.every", "2"]
    options += ["--train.learning_rate", "0.03", "--train.warmup", "0", "--lora.rank", "2", "--log.run", str(run)]
    again = ["--config", str(run / "config.yaml"), "--checkpoint.resume", str(step), "--log.run"]
    opened = ["--run", str(run), "--data.cache", str(folder / "cache")]
    goes_on = [[*again, str(folder / "other"), "--framework", "tensorflow"]] if framework == "torch" else []
    commands = [
        options,
        [*again, str(folder / "again")],
        *goes_on,
        ["evaluate", *opened],
        ["generate", *opened, "--prompt", "To be", "--tokens", "5"],
    ]
    done = run_python(["-c", COMMANDS, json.dumps(commands), "--framework", framework])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return framework, folder, done.stdout


def test_adapters_resume_exactly_in_either_framework(tuned: tuple[str, Path, str]) -> None:
    framework, folder, printed = tuned
    whole, again = (losses(folder / name) for name in ("run", "again"))
    assert len(whole) == 4 and whole[0] > whole[-1]
    assert again == whole[2:]
    if framework == "torch":
        assert losses(folder / "other") == pytest.approx(whole[2:], abs=1e-4)
    summary = json.loads((folder / "run" / "summary.json").read_text())
    frozen = summary["frozen_parameters"]
    assert 0 < summary["parameters"] < 0.1 * frozen and f"parameters beside {frozen:,} frozen ones" in printed
    evaluated = next(json.loads(line) for line in printed.splitlines() if line.startswith('{"step": 4'))
    assert evaluated["val_loss"] == pytest.approx(summary["val_loss"], rel=1e-6)
    assert any(line.startswith("To be") for line in printed.splitlines())


def test_a_checkpoint_holds_adapters_only(tuned: tuple[str, Path, str]) -> None:
    _, folder, _ = tuned
    opened = discovery.find(folder / "run", "auto")
    assert opened is not None
    files = sum(path.stat().st_size for path in opened.path.glob("*.safetensors"))
    parameters = json.loads((folder / "run" / "summary.json").read_text())["parameters"]
    assert files < 12 * parameters + 10_000
    assert files < 0.4 * (folder / "start" / "model.safetensors").stat().st_size


@pytest.mark.parametrize("moved", [False, True])
def test_merged_adapters_have_the_same_logits_in_transformers(
    tuned: tuple[str, Path, str], tmp_path: Path, moved: bool
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    framework, folder, _ = tuned
    convert = ["convert", "--run", str(folder / "run"), "--output", str(tmp_path / "out")]
    if moved:
        (folder / "start").rename(folder / "elsewhere")
        convert += ["--base", str(folder / "elsewhere")]
    try:
        assert cli.main([*convert, "--format", "huggingface"]) == 0
        opened = discovery.find(folder / "run", "auto")
        assert opened is not None
        spec = spec_of(opened, convert[-1] if moved else None)
        ours = single_rank_trainable(spec, replace(Config(framework=framework), train=TrainConfig(batch_size=1)))
        ours.load_state(load.read_state(opened, ours.shards(), 0, 1))
    finally:
        if moved:
            (folder / "elsewhere").rename(folder / "start")
    read = np.array([[5, 3, 20, 0, 7, 11, 2, 2, 19]], np.int32)
    with torch.no_grad():
        logits = [
            AutoModelForCausalLM.from_pretrained(path)(torch.from_numpy(read).long()).logits[0, -1].numpy()
            for path in (tmp_path / "out", folder / "start")
        ]
    np.testing.assert_allclose(np.asarray(ours.logits(read)[0])[0], logits[0], atol=1e-4, rtol=0)
    assert np.abs(logits[0] - logits[1]).max() > 1e-2


def test_one_safetensors_file_has_the_merged_weights(tuned: tuple[str, Path, str], tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    _, folder, _ = tuned
    assert cli.main(["convert", "--run", str(folder / "run"), "--output", str(tmp_path / "all.safetensors")]) == 0
    opened, merged = discovery.find(folder / "run", "auto"), load_file(tmp_path / "all.safetensors")
    assert opened is not None
    spec = spec_of(opened)
    assert set(merged) == {param.name for param in spec.frozen}
    changed = {param.name for param in spec.frozen if not np.array_equal(merged[param.name], param.initial(0))}
    assert changed == {one.weight for one in spec.adapters}


@pytest.fixture
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)


REFUSED = {
    "nothing so called": (
        ["--lora.rank", "8", "--lora.layers", "*.q_proj"],
        "is called '*.q_proj'; there are",
    ),
    "one of several": (["--lora.rank", "8", "--lora.layers", "['*.query','x']"], "is called 'x'; there are"),
    "no attention": (
        ["--lora.rank", "8", "--model.name", "convnet"],
        "a convnet has no attention; there are",
    ),
    "rank": (["--lora.rank", "0"], "lora.rank is 0, expected 1 or more"),
    "alpha": (["--lora.rank", "1", "--lora.alpha", "0"], "lora.alpha is 0.0, expected above 0"),
    "without a rank": (["--lora.alpha", "4"], "which lora.rank enables"),
    "tensor ranks": (
        ["--lora.rank", "1", "--parallel.tensor", "2", "--dry_run"],
        "leave parallel.tensor and",
    ),
}


@pytest.mark.usefixtures("_own_folder")
@pytest.mark.parametrize("arguments, expected", REFUSED.values(), ids=list(REFUSED))
def test_unsupported_adapters_are_refused_in_one_sentence(
    capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str
) -> None:
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1, error


def test_adapters_to_a_custom_module_are_refused() -> None:
    spec = replace(PRESETS["gpt"](ModelConfig(), VOCAB, CONTEXT), kind="own")
    with pytest.raises(HvdlmError, match=r"hvdlm doesn't know the layers of a plugin's own module"):
        adapt(spec, LoRAConfig(2))


HOSTILE: list[dict[str, Any]] = [
    *({"rank": rank} for rank in (0, -1, "x", 2.5, True, [], 10**30)),
    *({"rank": 2, "alpha": alpha} for alpha in ("x", [], float("nan"), 3.0)),
    *({"rank": 2, "layers": layers} for layers in (3, [[]], {"a": 1}, "nothing", "*")),
    *({"rank": 2, "more": 1}, {"rank": None}, {"rank": 2, "base": {"weights": {}}}),
]


@pytest.mark.parametrize("settings", HOSTILE, ids=str)
def test_manifests_with_contradictory_adapters_are_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    config = Config(model=ModelConfig("gpt", 1, 8, 2), lora=LoRAConfig(2))
    spec = adapt(PRESETS["gpt"](config.model, VOCAB, config.data.context), config.lora)
    meta = {"config": config.to_dict(), "vocab": VOCAB, "base": attach(spec, None, config.train.seed)[1]}
    state = {f"parameters/{param.name}": param.initial(1) for param in spec.params}
    good = save_checkpoint(tmp_path / "checkpoints", 1, state, meta, LocalWorld())
    assert spec_of(load.open_checkpoint(good)).adapters == spec.adapters
    settings, base = dict(settings), settings.get("base", meta["base"])
    settings.pop("base", None)
    meta |= {"base": base, "config": {**config.to_dict(), "lora": settings}}
    path = save_checkpoint(tmp_path / "checkpoints", 2, state, meta, LocalWorld())
    with pytest.raises(HvdlmError) as caught:
        spec_of(load.open_checkpoint(path))
    assert str(path) in str(caught.value) or "lora.layers" in str(caught.value)


def test_adapters_are_not_loaded_from_whole_weights(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "checkpoints", 1, {"parameters/w": np.ones(2, np.float32)}, {}, LocalWorld())
    with pytest.raises(HvdlmError, match=r"holds whole weights and no adapters: leave --lora\.rank out"):
        check(load.open_checkpoint(path), {"weights": "x", "factor": 1.0})


@pytest.mark.usefixtures("_own_folder")
def test_missing_or_changed_base_weights_are_refused(
    tuned: tuple[str, Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, folder, _ = tuned
    run, start, kept = folder / "run", folder / "start", folder / "kept"
    opened = ["--run", str(run), "--data.cache", str(folder / "cache")]
    config = ["--config", str(run / "config.yaml"), "--checkpoint.resume", "auto"]
    convert = ["convert", "--run", str(run), "--format", "huggingface", "--output", str(tmp_path / "out")]
    shutil.copytree(start, kept)
    weights = start / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1

    def refused(expected: str, *more: list[str]) -> None:
        for arguments in (["evaluate", *opened], ["generate", *opened], [*config], convert, *more):
            assert cli.main(arguments) == 2
            assert expected in capsys.readouterr().err, arguments

    try:
        weights.write_bytes(data)
        refused("has adapters of other base weights: --model.pretrained has to be the folder")
        shutil.rmtree(start)
        refused("whose weights adapters are added to, is gone or no folder of a model: put it back, or say")
        assert cli.main(["evaluate", *opened, "--model.pretrained", str(kept), "--lora.alpha", "9"]) == 2
        assert "multiplied by 1.0, and lora.alpha / lora.rank is 4.5 here" in capsys.readouterr().err
        assert cli.main(["evaluate", *opened, "--model.pretrained", str(kept), "--lora.rank", "null"]) == 2
        assert "holds adapters: use the lora options" in capsys.readouterr().err
    finally:
        shutil.rmtree(start, ignore_errors=True)
        kept.rename(start)
    assert not (tmp_path / "out").exists()
