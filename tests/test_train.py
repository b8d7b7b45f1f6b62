"""Training end to end: all launchers and both frameworks follow one curve, before and after a crash."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from builders import case
from launching import DATA, ONE_LAYER, SMALL, launch, losses, run_python, with_step_hook
from launching import STEPS as ALL_STEPS

STEPS = (*ALL_STEPS, *ONE_LAYER)


@pytest.mark.parametrize(
    ("framework", "launcher"),
    [
        ("torch", "mpirun"),
        ("torch", "horovodrun --gloo"),
        ("tensorflow", "mpirun"),
        ("tensorflow", "horovodrun"),
        case("torch", "horovodrun", covered_by="tensorflow; torch under mpirun, under horovodrun in test_launches.py"),
        case(
            "tensorflow",
            "horovodrun --gloo",
            covered_by="torch; tensorflow under it in test_launches.py and test_run_command.py",
        ),
    ],
)
def test_two_ranks_follow_the_curve_of_one(curve, framework: str, launcher: str) -> None:
    one = losses(curve(framework, 1, *STEPS))
    two = losses(curve(framework, 2, *STEPS, launcher=launcher))
    assert len(one) == len(two) == 30
    assert max(abs(a - b) for a, b in zip(one, two, strict=True)) < 1e-4
    assert one[-1] < one[0] - 0.5


@pytest.mark.parametrize("model", ["gpt", "llama", "rnn", "gru", "lstm"])
def test_both_frameworks_follow_one_curve(curve, model: str) -> None:
    # TensorFlow unrolls recurrent models; GPT has the options of the tests above.
    sequential = ("--data.sampling", "sequential", "--data.context", "8", "--data.validation_share", "0.0011")
    options = STEPS if model == "gpt" else (*STEPS, "--model.name", model, *sequential)
    torch, tensorflow = (losses(curve(framework, 1, *options)) for framework in ("torch", "tensorflow"))
    assert max(abs(a - b) for a, b in zip(torch, tensorflow, strict=True)) < 1e-3


@pytest.fixture(scope="session")
def killed(tmp_path_factory) -> Path:
    """Return the folder of a run of torch on 2 ranks that was killed after step 25, its last checkpoint at step 20."""
    run = tmp_path_factory.mktemp("killed") / "run"
    options = ["--framework", "torch", "--log.run", str(run), *SMALL, *STEPS, "--checkpoint.every", "10"]
    options += ["--checkpoint.asynchronous", "false"]  # else it may be killed while step 20 is being saved
    done = launch("mpirun", 2, [*with_step_hook("step == 25 and os.kill(os.getpid(), signal.SIGKILL)"), *options])
    assert done.returncode != 0
    return run


def resume(killed: Path, folder: Path, ranks: int, *options: str) -> list[float]:
    """Resume a copy of a killed run; return all its losses."""
    shutil.copytree(killed, folder)
    arguments = ["--log.run", str(folder), *SMALL, *STEPS, "--checkpoint.resume", "auto", *options]
    done = launch("mpirun", ranks, ["-m", "hvdlm", *arguments])
    assert done.returncode == 0, done.stderr[-3000:]
    return losses(folder)


def test_a_resumed_run_continues_bit_for_bit(curve, killed: Path, tmp_path: Path) -> None:
    assert resume(killed, tmp_path / "run", 2) == losses(curve("torch", 2, *STEPS))


STREAMING = ("--communication.exchange", "streaming_diloco", "--communication.local.steps", "5")
UPDATES = ("--train.optimizer", "sgd", "--train.momentum", "0", "--train.clip", "0")
FALLING = ("--train.schedule", "step", "--train.decay_start", "18", "--train.decay_every", "99")
CHUNKED = ("--communication.compression.algorithm", "chunked_top_k")
STATEFUL = {
    "top_k": ["--communication.compression.algorithm", "top_k"],
    "power_sgd": ["--communication.compression.algorithm", "power_sgd", "--communication.bucket_bytes", "30000"],
    "diloco": ["--communication.exchange", "diloco", "--communication.local.steps", "5"],
    "sparse_loco": ["--communication.exchange", "local_sgd", "--communication.local.steps", "5", *CHUNKED],
    "streaming_diloco": [*STREAMING, "--communication.compression.algorithm", "int4"],
    # From step 18 on, when the rate is a fifth of the peak's, the ranks agree after every fifth step.
    "zero_one_adam": [
        *("--communication.exchange", "zero_one_adam", "--communication.local.steps", "5", *UPDATES, *FALLING),
        *("--train.decay_factor", "0.2", "--train.beta2", "0.9", "--train.warmup", "0", "--train.steps", "24"),
    ],
}


@pytest.mark.parametrize(
    ("exchange", "framework"),
    [
        *((exchange, "torch") for exchange in STATEFUL),
        *((exchange, "tensorflow") for exchange in ("power_sgd", "streaming_diloco", "zero_one_adam")),
        case("top_k", "tensorflow", covered_by="torch; the error feedback of power_sgd, which is saved alike"),
        case(
            "diloco", "tensorflow", covered_by="torch: exchanges contain no framework; its momentum, streaming_diloco"
        ),
        case("sparse_loco", "tensorflow", covered_by="its error feedback by top_k, its rounds by diloco"),
    ],
)
def test_stateful_exchanges_resume_bit_for_bit(curve, exchange: str, framework: str, tmp_path: Path) -> None:
    """In checkpoints are error feedback, PowerSGD's factors, DiLoCo's momentum, sums in flight, and what ranks have of
    their own: optimizer states, and under streaming DiLoCo parameters.
    """
    steps = (*STEPS, "--train.steps", "14", "--train.eval_every", "0", "--checkpoint.every", "5")
    steps += ("--checkpoint.keep", "9")
    whole = curve(framework, 2, *steps, *STATEFUL[exchange])
    shutil.copytree(whole, tmp_path / "run")
    last = len(losses(whole))
    shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{last:08}")
    arguments = ["--framework", framework, "--log.run", str(tmp_path / "run"), *SMALL, *steps, *STATEFUL[exchange]]
    done = launch("threads", 2, ["-m", "hvdlm", *arguments, "--checkpoint.resume", "auto"])
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"steps {last - 4} to {last}" in done.stdout, done.stdout
    assert losses(tmp_path / "run") == losses(whole) and last in (14, 24)


def test_three_replicas_in_graphs_have_one_global_model(tmp_path: Path) -> None:
    """TensorFlow may change the order of a graph's additions: alike on all ranks only if their graphs are the same."""
    options = (*STREAMING, "--communication.compression.algorithm", "int4", "--train.batch_size", "6")
    options += ("--model.layers", "1", "--model.width", "96", "--model.heads", "6", "--data.context", "32")
    arguments = ["--framework", "tensorflow", "--log.run", str(tmp_path / "run"), *SMALL, *options]
    done = launch("threads", 3, ["-m", "hvdlm", *arguments])
    assert done.returncode == 0, done.stderr[-3000:]  # a save compares the replicas


@pytest.mark.parametrize("framework", ["torch", "tensorflow"])
def test_streaming_diloco_saves_the_global_parameters(curve, framework: str, tmp_path: Path) -> None:
    """At any step; training continues from the replicas' own, and on another number of ranks from the global ones."""
    steps = (*STEPS, "--train.steps", "12", "--checkpoint.every", "7", "--train.schedule", "constant")
    never, often = (
        curve(framework, 2, *steps, *STREAMING, "--train.eval_every", every, "--checkpoint.keep", "9")
        for every in ("0", "3")
    )
    assert losses(never) == losses(often)
    figures = metrics(often, "val_loss")
    assert len(figures) == 4 and figures[-1] < figures[0] and len(set(figures)) == 4
    assert json.loads((never / "summary.json").read_text())["val_loss"] == figures[-1]
    done = run_python(["-m", "hvdlm", "evaluate", "--run", str(often), "--framework", framework])
    assert json.loads(done.stdout.splitlines()[-1])["val_loss"] == pytest.approx(figures[-1], abs=1e-6), done.stderr
    shutil.copytree(often, tmp_path / "run")
    options = [*SMALL, *steps, *STREAMING, "--train.steps", "14", "--framework", framework, "--train.eval_every", "1"]
    resumed = ["-m", "hvdlm", *options, "--log.run", str(tmp_path / "run"), "--checkpoint.resume", "auto"]
    done = launch("threads", 1, resumed)
    assert done.returncode == 0, done.stderr[-3000:]
    # With overlap 2, the first sums of the single rank are applied after two steps: until then nothing changes.
    assert metrics(tmp_path / "run", "val_loss")[-2] == pytest.approx(figures[-1], abs=1e-6)


@pytest.mark.parametrize(
    ("layout", "framework"),
    [
        ("--parallel.tensor", "torch"),
        ("--parallel.tensor", "tensorflow"),
        ("--parallel.pipeline", "torch"),
        case(
            "--parallel.pipeline",
            "tensorflow",
            covered_by="the case of tensor ranks, and test_launches.py's layouts with stages",
        ),
    ],
)
def test_streaming_diloco_trains_replicas_of_two_ranks(curve, layout: str, framework: str) -> None:
    """With one fragment, all elements of a parameter synchronise after the same steps, however it is sharded."""
    layers = ("--model.layers", "2") if "pipeline" in layout else ONE_LAYER
    steps = (*ALL_STEPS, *layers, "--model.tie_embeddings", "false", "--train.steps", "12")
    options = (*steps, *STREAMING, "--communication.local.fragments", "1", "--train.eval_every", "4")
    whole, sharded = curve(framework, 2, *options), curve(framework, 4, *options, layout, "2")
    assert losses(whole) == pytest.approx(losses(sharded), abs=1e-4)
    assert metrics(whole, "val_loss") == pytest.approx(metrics(sharded, "val_loss"), abs=1e-4)


def metrics(run: Path, name: str) -> list[float]:
    """Return the values of a figure in the order of the log."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def test_a_checkpoint_resumes_in_the_other_framework(curve, killed: Path, tmp_path: Path) -> None:
    whole = losses(curve("torch", 2, *STEPS))
    resumed = resume(killed, tmp_path / "run", 1, "--framework", "tensorflow")
    assert resumed[:20] == whole[:20] and len(resumed) == len(whole)
    assert max(abs(a - b) for a, b in zip(whole, resumed, strict=True)) < 1e-3


EXAMPLE_STEPS = 100 if "HVDLM_TEST_FULL" in os.environ else 42


@pytest.fixture(scope="module")
def shakespeare(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], list[float]]:
    """Return a function from a framework and a number of ranks to the example's first losses."""
    curves: dict[tuple[str, int], list[float]] = {}

    def train(framework: str, ranks: int) -> list[float]:
        if (framework, ranks) not in curves:
            run = tmp_path_factory.mktemp("shakespeare") / "run"
            options = ["--config", "examples/shakespeare_char.yaml", "--data.path", str(DATA / "tinyshakespeare.txt")]
            ends = "(self.world.gather_objects(0), time.sleep(0.5), os._exit(0))"
            stopped = with_step_hook(f"step == {EXAMPLE_STEPS} and {ends}")
            arguments = [*stopped, *options, "--framework", framework, "--log.run", str(run)]
            done = launch("threads", ranks, arguments)
            curves[framework, ranks] = losses(run)
            assert len(curves[framework, ranks]) == EXAMPLE_STEPS, done.stderr[-3000:]
        return curves[framework, ranks]

    return train


EXAMPLE = pytest.mark.skipif(not DATA.is_dir(), reason=f"tinyshakespeare.txt is not in {DATA}: set HVDLM_DATA")


@EXAMPLE
def test_the_first_losses_of_the_shakespeare_example_agree(shakespeare) -> None:
    torch, tensorflow = (shakespeare(framework, 1) for framework in ("torch", "tensorflow"))
    assert max(abs(a - b) for a, b in zip(torch, tensorflow, strict=True)) < 1e-3
    assert torch[-1] < 2.9 < torch[0]


@EXAMPLE
@pytest.mark.full(covered_by="test_two_ranks_follow_the_curve_of_one, with the same bar")
@pytest.mark.parametrize("framework", ["torch", "tensorflow"])
def test_two_ranks_have_the_losses_of_one_on_the_example(shakespeare, framework: str) -> None:
    one, two = (shakespeare(framework, ranks) for ranks in (1, 2))
    assert max(abs(a - b) for a, b in zip(one, two, strict=True)) < 1e-4


def test_either_framework_evaluates_and_generates(curve, tmp_path: Path) -> None:
    run = curve("torch", 1, *STEPS)
    (tmp_path / "prompt.txt").write_text("The ")
    summary = json.loads((run / "summary.json").read_text())
    texts = set()
    for framework in ("torch", "tensorflow"):
        done = run_python(["-m", "hvdlm", "evaluate", "--run", str(run), "--framework", framework])
        figures = json.loads(done.stdout.splitlines()[-1])
        assert figures["step"] == 30 and abs(figures["val_loss"] - summary["val_loss"]) < 1e-5
        command = ["generate", "--run", str(run), "--framework", framework, "--tokens", "80"]
        command += ["--prompt_file", str(tmp_path / "prompt.txt"), "--num_samples", "2"]
        done = run_python(["-m", "hvdlm", *command, "--top_k", "5", "--seed", "7"])
        first, second = done.stdout.split("----------------\n")
        assert done.returncode == 0 and len(first) == len(second) == 85 and first != second, done.stderr
        assert first.startswith("The ") and second.startswith("The ")
        texts.add(done.stdout)
    assert len(texts) == 1


def test_the_summary_has_every_figure(curve) -> None:
    summary = json.loads((curve("torch", 2, *STEPS, launcher="mpirun") / "summary.json").read_text())
    expected = """train_loss val_loss perplexity bits_per_byte tokens_per_second seconds steps world_size framework
        backend parameters bytes_communicated peak_memory_bytes"""
    assert set(expected.split()) <= set(summary)
    assert (summary["steps"], summary["world_size"], summary["backend"]) == (30, 2, "mpi")
    # Every rank sends all gradients as float32 and two float64 figures in each step.
    assert summary["bytes_communicated"] == 30 * 2 * (4 * summary["parameters"] + 16)


def test_the_printed_configuration_can_be_read_back(tmp_path: Path) -> None:
    printed = run_python(["-m", "hvdlm", "--model.layers", "7", "--print_config"])
    (tmp_path / "a.yaml").write_text(printed.stdout)
    again = run_python(["-m", "hvdlm", "--config", str(tmp_path / "a.yaml"), "--print_config"])
    assert "layers: 7" in printed.stdout and again.stdout == printed.stdout
