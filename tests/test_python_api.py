"""The Python API: ``hvdlm.Config``, ``train`` and ``load``, on one rank and under launchers."""

from __future__ import annotations

import math
import os
import random
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import hvdlm
from builders import read_json
from hvdlm import cli
from hvdlm.configuration.parsing import parse_config
from hvdlm.training.run import plan
from launching import ONE_LAYER, launch, losses, run_python

PROGRAM = str(Path(__file__).with_name("api_program.py"))
OPTIONS = (*ONE_LAYER, "--train.steps", "8", "--train.warmup", "2", "--train.eval_every", "4")


def run_program(action: str, folder: Path, framework: str, launcher: str = "", ranks: int = 1) -> list[Any]:
    """Return what every rank of ``api_program.py`` got."""
    done = launch(launcher, ranks, [PROGRAM, action, str(folder), "--framework", framework])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return [read_json(folder / f"result-{rank}.json") for rank in range(ranks)]


@pytest.mark.parametrize(
    "framework, launcher, ranks",
    [
        ("torch", "", 1),
        pytest.param("tensorflow", "", 1, marks=pytest.mark.full(covered_by="one rank of torch, two of tensorflow")),
        ("tensorflow", "mpirun", 2),
        ("torch", "horovodrun --gloo", 2),
    ],
)
def test_trainings_follow_one_another_in_one_process(
    framework: str, launcher: str, ranks: int, tmp_path: Path, curve: Callable[..., Path]
) -> None:
    first, *others = run_program("trainings", tmp_path, framework, launcher, ranks)
    assert all(other == first for other in others)  # the result is the same on every rank
    assert first["restored"] and first["step"] == 8
    (status, reason, steps, val_loss, best), second = first["reached"]
    assert (status, reason, steps, best) == ("done", None, 8, val_loss) and second == first["reached"][0]
    assert first["checkpoints"] == [
        str(tmp_path / run / "checkpoints" / "step-00000008") for run in ("first", "second")
    ]
    assert first["metrics"]["val_loss"] == pytest.approx(val_loss, abs=1e-6)
    assert first["text"][0] == first["text"][1] and len(first["text"][0]) == 24
    by_command = curve(framework, ranks, *OPTIONS)
    assert losses(tmp_path / "first") == losses(tmp_path / "second") == losses(by_command)
    assert not list(tmp_path.glob("*/flight_recorder")) and not list(tmp_path.glob("*/.lock"))


@pytest.mark.parametrize("framework, launcher, ranks", [("torch", "", 1), ("torch", "mpirun", 2)])
def test_an_exception_of_all_ranks_lets_the_program_continue(
    framework: str, launcher: str, ranks: int, tmp_path: Path
) -> None:
    results = run_program("failures", tmp_path, framework, launcher, ranks)
    assert all(result == results[0] for result in results)
    for result in results:
        prompt, temperature, *calls = result["refused"]
        assert prompt.startswith("character '\u65e5' is not among the ") and temperature.startswith(
            "temperature is nan,"
        )
        assert [call.split(": ")[0] for call in calls] == [
            "all ranks make the same calls, but rank 0 is generating and rank 1 is evaluating"
        ][: ranks - 1]
        assert len(result["text"]) == 9  # after all this
        bad_value, no_data, not_finite = result["messages"]
        assert bad_value == "HvdlmError: train.steps is 0, expected 1 or more: set --train.steps."
        assert "none.txt" in no_data and not_finite.startswith("RankError: ")
        assert result["status"] == "done"


def test_a_rank_that_fails_alone_ends_all_of_them(tmp_path: Path) -> None:
    began = time.monotonic()
    done = launch("mpirun", 2, [PROGRAM, "alone", str(tmp_path), "--framework", "torch"])
    assert done.returncode and time.monotonic() - began < 100
    assert "missing.txt" in done.stderr and not list(tmp_path.glob("result-*.json"))


def test_signals_stop_a_training_and_not_its_program(tmp_path: Path) -> None:
    [result] = run_program("interrupted", tmp_path, "torch")
    status, reason, steps = result["stopped"]
    assert (status, reason) == ("stopped", "signal") and 3 <= steps <= 5
    assert result["resumed"] == ["done", steps + 2]  # in a thread of the program
    assert result["refused"].startswith("hvdlm is in use in this process: ")
    assert result["ended"] == "at once" and result["restored"]


def test_a_configuration_is_loaded_from_files_and_mappings(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model: {layers: 3}\ntrain: {steps: 7}\ndata: {mixture: {a.txt: 2}}\n")
    options = {"train.steps": 9, "log": {"run": tmp_path / "run"}, "train": {"clip": np.float32(0.5)}}
    config = hvdlm.Config.load(tmp_path / "run.yaml", options)
    assert (config.model.layers, config.train.steps, config.train.clip) == (3, 9, 0.5)
    assert config.log.run == str(tmp_path / "run") and config.data.mixture == {"a.txt": 2}
    assert hvdlm.Config.load() == hvdlm.Config() and hvdlm.Config.load(config) == config
    assert hvdlm.Config.load(config, {"train.warmup": 0, "train.threads": None}).train.warmup == 0
    parsed = parse_config(["--model.layers", "3", "--train.steps", "9"])
    assert hvdlm.Config.load({"model": {"layers": 3}, "train.steps": 9}) == parsed
    plugin = hvdlm.Config.load({"task": "translation", "translation.beams": 3})
    assert plugin.plugin_options["translation"].beams == 3 and hvdlm.Config.load(plugin) == plugin


def test_configurations_share_no_values_and_load_in_threads() -> None:
    config, before = hvdlm.Config.load(), hvdlm.Config.load()
    config.plugins.append("x")
    config.data.path.append("y")
    config.model.layers += 1
    assert hvdlm.Config.load() == before == hvdlm.Config()
    with ThreadPoolExecutor(8) as pool:
        loaded = pool.map(lambda steps: hvdlm.Config.load({"train.steps": steps, "data.path": [str(steps)]}), range(40))
        assert [(one.train.steps, one.data.path) for one in loaded] == [(n, [str(n)]) for n in range(40)]


@pytest.mark.parametrize(
    "source, sentence",
    [
        ({"train.stepz": 5}, "--train.stepz: there is no such option; did you mean --train.steps?"),
        ({"train": {"steps": "many"}}, "--train.steps: got 'many', expected a whole number."),
        ({"train": 5}, "--train is a section"),
        ({"train.steps": None}, "--train.steps: got null"),
        ("none.yaml", "none.yaml: No such file or directory"),
        (None, "takes paths of YAML files, configurations and mappings of options, got a NoneType."),
        (b"run.yaml", "takes paths of YAML files, configurations and mappings of options, got a bytes."),
        ({"help": 1}, "--help: there is no such option"),
        ({"print_config": ""}, "--print_config: there is no such option"),
        ({"config": "run.yaml"}, "--config: there is no such option"),
        ({"train": {"steps": {1, 2}}}, "--train.steps: expected text, a path, a number, true or false, or a list"),
        ({"train.steps": np.array([1, 2])}, "--train.steps: got '[1, 2]', expected a whole number."),
    ],
    ids=str,
)
def test_a_wrong_option_in_python_is_one_sentence(source: Any, sentence: str) -> None:
    with pytest.raises(hvdlm.HvdlmError) as raised:
        hvdlm.Config.load(source)
    assert sentence in str(raised.value) and "\n" not in str(raised.value)


def test_a_section_is_taken_from_another_configuration() -> None:
    wide = hvdlm.Config.load({"model.width": 64, "train.steps": 3})
    config = hvdlm.Config.load({"model": wide.model})
    assert config.model == wide.model and config.train.steps == hvdlm.Config().train.steps


@pytest.mark.parametrize("name, near", [("train.stepz", "train.steps"), ("trian", "train"), ("log.rum", "log.run")])
def test_an_attribute_that_is_no_option_is_refused(name: str, near: str) -> None:
    config = hvdlm.Config()
    section, _, attribute = name.rpartition(".")
    setattr(getattr(config, section) if section else config, attribute, "5")
    with pytest.raises(hvdlm.HvdlmError, match=f"--{name}: there is no such option; did you mean --{near}"):
        hvdlm.train(config)


def test_assigned_values_are_checked_before_training() -> None:
    config = hvdlm.Config()
    config.train.steps = "many"  # type: ignore[assignment]
    with pytest.raises(hvdlm.HvdlmError, match=r"--train\.steps: got 'many', expected a whole number"):
        hvdlm.train(config)
    with pytest.raises(hvdlm.HvdlmError, match=r"takes a hvdlm\.Config, got a dict"):
        hvdlm.train({"train.steps": 5})  # type: ignore[arg-type]


SMALL: dict[str, Any] = {
    "model": {"layers": 1, "width": 16, "heads": 2, "dropout": 0.1},
    "data.context": 16,
    "data.validation_share": 0.02,
    "train": {"batch_size": 8, "steps": 2},
    "log": {"progress": False, "tensorboard": False},
}


@pytest.fixture(scope="module")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run of two steps."""
    return hvdlm.train(hvdlm.Config.load(SMALL, {"log.run": tmp_path_factory.mktemp("small") / "run"})).run


def open_folders(folder: Path) -> list[str]:
    links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    return [os.readlink(link) for link in links if os.path.exists(link) and os.readlink(link).startswith(str(folder))]


def test_calls_leave_the_program_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("KERAS_BACKEND", raising=False)

    def state() -> Any:
        numbers, places, *_ = np.random.get_state()[1:]  # type: ignore[misc]
        return dict(os.environ), random.getstate(), numbers.tolist(), places, torch.get_rng_state().tolist()

    before = state()
    result = hvdlm.train(hvdlm.Config.load(SMALL, {"log.run": tmp_path / "run", "train.threads": 2}))
    assert state() == before and open_folders(tmp_path) == []
    with hvdlm.load(result.run) as run:
        assert len(run.generate("The ", 3)) == 7
    assert state() == before and open_folders(tmp_path) == []
    with pytest.raises(hvdlm.HvdlmError):
        hvdlm.train(hvdlm.Config.load(SMALL, {"log.run": tmp_path / "none", "data.path": tmp_path / "none.txt"}))
    assert state() == before and "summary" not in repr(result)


def test_arguments_of_generation_are_checked(small_run: Path) -> None:
    wrong = [("prompt", None), ("prompt", b"a"), ("tokens", 0), ("tokens", 1.5), ("tokens", "5"), ("top_p", 0.0)]
    wrong += [("temperature", value) for value in (math.nan, math.inf, -1, "hot", None)]
    wrong += [(name, value) for name in ("top_k", "seed") for value in (-1, 1.5, None)]
    with hvdlm.load(small_run) as run:
        for name, value in wrong:
            with pytest.raises(hvdlm.HvdlmError, match=f"^{name}"):
                run.generate(**{"prompt": "The ", name: value})
        greedy = run.generate("The ", np.int64(5), temperature=0)
        assert run.generate("The ", 5, temperature=1e-320) == greedy and len(greedy) == 9


def test_several_texts_are_those_of_single_calls(small_run: Path) -> None:
    with hvdlm.load(small_run) as run:
        single = [run.generate(prompt, 30, seed=seed) for prompt in ("The ", "Once upon") for seed in (5, 6, 7)]
        assert run.generate(["The ", "Once upon"], 30, num_samples=3, seed=5, batch_size=4) == single
        assert run.generate("The ", 30, num_samples=1, seed=6) == single[1:2]
        assert run.generate(("Once upon",), 30, seed=5) == single[3:4] and len(set(single)) == 6
        for name, value in (("num_samples", 0), ("batch_size", 0), ("num_samples", "2"), ("prompt", ["a", 1])):
            with pytest.raises(hvdlm.HvdlmError, match=f"^{name}"):
                run.generate(**{"prompt": "The ", name: value})
        with pytest.raises(hvdlm.HvdlmError, match="prompt: the list is empty"):
            run.generate([])


def test_the_command_prints_texts_in_order(
    small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def printed(*arguments: str) -> str:
        capsys.readouterr()
        assert cli.main(["generate", "--run", str(small_run), "--tokens", "40", *arguments]) == 0
        return capsys.readouterr().out

    single = [printed("--prompt", prompt, "--seed", str(seed)) for prompt in ("The ", "Once upon") for seed in (5, 6)]
    together = ("-" * 16 + "\n").join(single)
    assert printed("--prompt", "The ", "--prompt", "Once upon", "--num_samples", "2", "--seed", "5") == together
    (tmp_path / "prompts.txt").write_text("The \n\nOnce upon\n")
    lines = "--prompt_per_line", "true", "--num_samples", "2", "--seed", "5", "--batch_size", "3"
    assert printed("--prompt_file", str(tmp_path / "prompts.txt"), *lines) == together
    monkeypatch.setattr("sys.stdin", StringIO("The \nOnce upon"))
    assert printed("--prompt", "-", *lines) == together


@pytest.mark.parametrize("options", ["run.yaml", ["train.steps"], hvdlm.Config()], ids=["path", "list", "config"])
def test_a_run_is_loaded_with_a_mapping_of_options(options: Any, small_run: Path) -> None:
    with pytest.raises(hvdlm.HvdlmError, match="options: expected a mapping such as"):
        hvdlm.load(small_run, options)
    with pytest.raises(hvdlm.HvdlmError, match=r"takes the folder of a run, such as Result\.run, got an? "):
        hvdlm.load(options if not isinstance(options, str) else None)  # type: ignore[arg-type]
    with pytest.raises(hvdlm.HvdlmError, match="checkpoint: expected a checkpoint's folder"):
        hvdlm.load(small_run, checkpoint=5)  # type: ignore[arg-type]


def test_threads_of_numpy_leave_the_notice_of_mpirun() -> None:
    code = """
import os, pathlib, signal, hvdlm
signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCONT})  # the process of the tests may have blocked it
hvdlm.train
tasks = {task.name: task / "status" for task in pathlib.Path("/proc/self/task").iterdir()}
masks = {name: path.read_text().split("SigBlk:")[1].split()[0] for name, path in tasks.items()}
blocked = {name: int(mask, 16) >> signal.SIGCONT - 1 & 1 for name, mask in masks.items()}
assert not blocked.pop(str(os.getpid())), "the program's own thread is as it was"
assert blocked and all(blocked.values()), blocked
"""
    done = run_python(["-c", code], OPENBLAS_NUM_THREADS="3")
    assert done.returncode == 0, done.stderr


def test_importing_hvdlm_imports_nothing_that_is_not_used() -> None:
    code = "import sys, hvdlm; assert dir(hvdlm) == sorted(hvdlm.__all__); hvdlm.hookimpl; "
    code += "assert not {'numpy', 'jsonargparse', 'torch', 'hvdlm.training'} & set(sys.modules); hvdlm.train; "
    done = run_python(["-c", code + "assert not {'torch', 'tensorflow', 'keras', 'mpi4py'} & set(sys.modules)"])
    assert done.returncode == 0, done.stderr


def test_keras_that_another_framework_has_loaded_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    loaded = SimpleNamespace(config=SimpleNamespace(backend=lambda: "tensorflow"))
    monkeypatch.setitem(sys.modules, "keras", loaded)
    config = hvdlm.Config.load({"log.run": tmp_path / "run", "communication.compression.algorithm": "int8"})
    with pytest.raises(hvdlm.HvdlmError, match="keras, which this run uses, was loaded for tensorflow"):
        plan(config)
    assert plan(hvdlm.Config.load({"log.run": tmp_path / "run"})).config.framework == "torch"
