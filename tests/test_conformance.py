"""``pytest --hvdlm-plugin``: built-in plugins and templates pass, and every fault of a faulty plugin is reported."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from builders import write_idx, write_wav
from launching import ROOT, describe_package, place_example, run_python

BUILT_IN = sorted(e.name for e in importlib.metadata.distribution("hvdlm").entry_points if e.group == "hvdlm")
TEMPLATES = ["template_compressor", "template_event", "template_model"]
TEMPLATES += ["template_task", "template_backend"]
# Reasons for skipping a test, and the plugins that may give them.
LEFT_OUT = {
    "makes no exchange of its own name": {"auto", "compression", "exact"},
    "backend nccl does not start here": {"nccl"},
    "there is nothing to compare": {"auto", "compression", "exact", "convnet", "ctc", "seq2seq"},
    # Models that read features.
    "it is tested": {"convnet", "ctc", "seq2seq"},
}


def run_suite(folder: Path, names: list[str], *options: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the suite on plugins, in a folder without other tests."""
    chosen = [option for name in names for option in ("--hvdlm-plugin", name)]
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen, *options]
    return run_python(command, cwd=folder, timeout=1800, **env)


def digits(folder: Path) -> dict:
    random = np.random.default_rng(1)
    write_idx(folder / "train-images-idx3-ubyte.gz", random.integers(0, 256, (40, 28, 28)))
    write_idx(folder / "train-labels-idx1-ubyte.gz", random.integers(0, 10, 40))
    return {"data": {"path": [str(folder)], "validation_share": 0.3}, "model": {"name": "convnet"}}


def speech(folder: Path) -> dict:
    random, lines = np.random.default_rng(1), []
    for number in range(12):
        write_wav(folder / f"{number}.wav", random.integers(-9000, 9000, 4000 + 100 * number))
        lines.append(json.dumps({"audio": f"{number}.wav", "text": ["one", "two", "six"][number % 3]}))
    (folder / "list.jsonl").write_text("\n".join(lines) + "\n")
    model = {"name": "ctc", "layers": 1, "width": 16, "heads": 2}
    return {"data": {"path": [str(folder / "list.jsonl")], "validation_share": 0.4}, "model": model}


def translation(folder: Path) -> dict:
    random = np.random.default_rng(1)
    for name, words in (("de", "ein mann geht mit dem hund"), ("en", "a man walks with the dog")):
        rows = [" ".join(random.choice(words.split(), 3 + i % 5)) for i in range(40)]
        (folder / name).write_text("\n".join(rows) + "\n")
    paths = [str(folder / "de"), str(folder / "en")]
    model = {"name": "seq2seq", "layers": 1, "width": 16, "heads": 2}
    data = {"path": paths, "validation_path": paths, "tokenizer": "word", "context": 12}
    return {"data": data, "model": model, "translation": {"bleu": False}}


# What ``make test`` leaves out, all of it with TensorFlow, whose graphs take most of the time: compressors that differ
# from those which stay in what they compute from a vector, not in how they are traced or sent; models beside gpt and
# rnn, which the framework's own check trains; exchanges whose curves and states test_launches.py compares (and whose
# steps those checks make: all_reduce); tasks that test_tasks.py trains in both frameworks; transports; runs of the
# framework, of which the check of mpi4py makes one, and test_train.py and test_exact.py many.
COVERED = ("fp16", "bf16", "top_k", "random_k", "scaled_sign", "sign_majority", "qsgd", "int4", "dgc", "chunked_top_k")
MODELS = ("gpt2", "llama", "mistral", "qwen2", "qwen3", "neox", "gemma", "gru", "lstm")
EXCHANGES = ("all_reduce", "local_sgd", "demo", "one_bit_adam", "zero_one_adam", "streaming_diloco")
TASKS = ("language_model", "digits", "speech", "translation")
LEFT = [f"compression-{name}" for name in COVERED] + [f"{name}-{name}" for name in MODELS]
IN_FULL = f"(tensorflow or same_losses) and ({' or '.join(LEFT)} or an_exchange and ({' or '.join(EXCHANGES)}))"
IN_FULL += f" or {' or '.join(f'evaluated_and_resumes[{name}-tensorflow]' for name in TASKS)}"
IN_FULL += " or runs_to_a_checkpoint and tensorflow"
IN_FULL += " or correct_collectives and tensorflow and not mpi4py and not template_backend"
Cases = dict[str, list[ElementTree.Element]]


def conformance_of(folder: Path, selected: str) -> Cases:
    """Run the tests that ``-k selected`` selects on all built-in plugins and the templates; return {plugin: cases}."""
    for name in TEMPLATES:  # test_templates.py installs them with pip
        place_example(name, folder / "installed")
    configs = []
    for make in (digits, speech, translation):
        (folder / make.__name__).mkdir()
        content = {"train": {"batch_size": 4}, **make(folder / make.__name__)}
        (folder / f"{make.__name__}.yaml").write_text(json.dumps(content))
        configs += ["--hvdlm-config", f"{make.__name__}={folder / make.__name__}.yaml"]
    report = folder / "report.xml"
    names = [*BUILT_IN, *TEMPLATES]
    path = os.pathsep.join([str(folder / "installed"), os.environ.get("PYTHONPATH", "")])
    done = run_suite(folder, names, "-k", selected, *configs, f"--junitxml={report}", PYTHONPATH=path)
    assert report.exists(), done.stdout[-3000:] + done.stderr[-3000:]
    cases: Cases = {name: [] for name in names}
    for case in ElementTree.parse(report).iter("testcase"):
        plugin = str(case.get("name")).partition("[")[2].rstrip("]").split("-")[0]
        cases.setdefault(plugin, []).append(case)
    return cases


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Cases:
    """Return the cases of one run, without those that other tests cover."""
    return conformance_of(tmp_path_factory.mktemp("conformance"), f"not ({IN_FULL})")


def messages(cases: list[ElementTree.Element], tag: str) -> Iterator[str]:
    for case in cases:
        for child in case.iter(tag):
            yield f"{case.get('name')}: {child.get('message')} {child.text}"


def assert_conforms(plugin: str, cases: list[ElementTree.Element]) -> None:
    failures = [*messages(cases, "failure"), *messages(cases, "error")]
    assert not failures, "\n".join(failures)
    for reason in messages(cases, "skipped"):
        assert any(text in reason and plugin in names for text, names in LEFT_OUT.items()), reason


@pytest.mark.parametrize("plugin", [*BUILT_IN, *TEMPLATES])
def test_built_in_plugins_and_templates_conform(results: Cases, plugin: str) -> None:
    assert len(results[plugin]) >= 4
    assert_conforms(plugin, results[plugin])


@pytest.mark.full(
    covered_by="test_launches.py, which runs every compressor, exchange and transport with TensorFlow; "
    "test_both_frameworks_follow_one_curve and test_applications_train_alike_in_both_frameworks; "
    "test_built_in_plugins_and_templates_conform, which runs them with PyTorch, and TensorFlow over mpi4py"
)
def test_the_others_conform_with_tensorflow(tmp_path: Path) -> None:
    cases = conformance_of(tmp_path, IN_FULL)
    assert len(cases["compression"]) == 2 * len(COVERED) and len(cases["mpi"]) == len(cases["gloo"]) == 1
    assert [len(cases[name]) for name in (*MODELS, *EXCHANGES)] == [2] * len(MODELS + EXCHANGES)
    assert [len(cases[name]) for name in TASKS] == [1] * len(TASKS)
    for plugin in cases:
        assert_conforms(plugin, cases[plugin])


def test_every_provided_component_was_tested(results: Cases) -> None:
    names = {str(case.get("name")) for cases in results.values() for case in cases}
    for framework in ("torch", "tensorflow"):
        for expected in ("a_model_trains_and_resumes[template_model-template_ngram", "an_exchange_trains[diloco"):
            name = expected.replace("trains[", "trains_and_resumes[")
            assert f"test_{name}-{framework}]" in names
        assert f"test_a_compressor_meets_its_contract[compression-power_sgd-{framework}]" in names
        assert f"test_a_task_is_evaluated_and_resumes[template_task-{framework}]" in names
        assert f"test_a_backend_has_correct_collectives[mpi4py-{framework}]" in names
    for name in COVERED:
        assert f"test_a_compressor_meets_its_contract[compression-{name}-torch]" in names
    assert "test_a_backend_has_correct_collectives[gloo-torch]" in names
    for name in TASKS:
        assert f"test_a_task_is_evaluated_and_resumes[{name}-torch]" in names
    # template_model, LEFT_OUT's, gpt and rnn
    assert len([name for name in names if "a_model_has_the_same_losses" in name]) == 6


FAULTY = Path(__file__).parent / "faulty_plugin.py"
REPORTS = [
    "importing faulty imports mpi4py: import it in the function that needs it",
    "faulty: the name gpt of its models is taken",
    "unseeded: parameter head.bias has other initial values every time: draw them from the seed",
    "unseeded: the parameter embed.tokens is described twice",
    "its payload of [3072] is 24576 bytes, dense is 12288",
    "compressor wrong_sign in torch: the mean of 20 sums has another direction than the gradient",
    "the same gradients, seed and steps give other sums: draw random numbers from the seed",
    "faulty: hvdlm_step_ended fails on rank 1, which would end the run: ZeroDivisionError",
    "faulty_hooks: there is no hook hvdlm_step_finished; did you mean step_ended?",
    "faulty_hooks: hvdlm_evaluated is never called: mark it with @hvdlm.hookimpl",
    "faulty_hooks: a hook takes an argument that does not exist",
    "the section train of its options is hvdlm's own",
    "--train.size has no default",
    "--train.size has no help: give it a line under Args: in the docstring",
    "faulty_writer: rank 1 writes run/notes.txt: files are rank 0's to write",
    "targets of 4 rows are int64 [4, 8], expected int32 [rows, time]",
    "rows of batch 1, divided at (0, 2, 4) between ranks, differ from the whole batch",
    "2 ranks together count 64 targets of the validation split, one rank 32",
    "hvdlm_make_backend returns a backend for every name",
    "faulty_data: the name char of its tokenizers is taken",
    "tokenizer letters: encode returns int64 [1640], expected int32 [n]",
    "tokenizer char: its description has the kind 'letters', expected 'char'",
    "a token folder with the tokenizer two.letters can't be opened: give it a name of its own, without dots and",
    "faulty_data: its data preparer has no method check",
    "faulty_data: its data preparer has no method store_stdin",
    "faulty_rules: the name adagrad of its optimizers is taken",
    "optimizer normalised in torch: parameters of an element depends on other elements",
    "schedule endless: the rate after 5 of 40 updates is nan",
    "plugin faulty_import (nowhere) does not import: ModuleNotFoundError",
]


def install_faulty(folder: Path, entries: dict[str, str], *files: Path) -> dict[str, str]:
    """Place modules with these entry points in ``folder``; return the environment variables of a run with them."""
    for file in files:
        (folder / file.name).write_text(file.read_text())
    path = os.pathsep.join([str(describe_package(folder, "faulty", entries)), os.environ.get("PYTHONPATH", "")])
    return {"PYTHONPATH": path, "HVDLM_TEST_FRAMEWORK": "torch"}


# Plugins of faulty_contracts.py, and the sentence about each.
BROKEN_CONTRACTS = {
    "untrainable": ["task untrainable: its tokenizer lacks encode, encode_prompt, decode, to_json, without which"],
    "reusing": ["task reusing: later calls of rows change the arrays of batch 1"],
    "entangled": ["task entangled: rows in a thread beside validation returns other batches"],
    "short": ["task short: rows(1000, 1004) has 0 rows, expected 4: the order of rows is endless"],
    "lossy": ["task lossy: its tokenizer decodes 'ihgfedcb', encoded, to 'bcdefghi'"],
    "forgetting": ["task run forgetting fails in torch: KeyError: 'the last row'"],
    "uncounted": ["task uncounted: no target of rows(0, 4) counts, their weights are 0: there is nothing to learn"],
    "ragged": ["task ragged: rows 0 to 3 have the shapes [8], [7], [8], [7] (inputs): ranks need rows of one shape"],
    "misaligned": [
        "task misaligned: targets are [4, 64], inputs [4, 65]",
        "task misaligned: rows are 65 tokens wide, data.context is 64",
    ],
    "partial": ["task partial lacks reads, metrics of hvdlm.protocols.task.Task."],
    "greedy": ["greedy: hvdlm_make_task returns a task for every name"],
    "careless": ["careless: hvdlm_check fails with the model gpt: KeyError: 'careless' ("],
    "forgetful": [
        "group of forgetful: all_reduce of float32 is float32 [2] [",
        ": it has the same values in another order, and theirs is that of the ranks",
    ],
    "averaging": [": it is the mean of the ranks', and reductions are sums"],
    "crashing": [
        "backend crashing does not start, with torch: AttributeError: 'Crashing' object has no attribute 'address' (",
    ],
    "reordered": ["exchange reordered: the sum of a bucket has another direction than its gradients"],
    "hidden_state": ["compressor hiding in torch: after load_state(state()) sums differ: memory() lacks a part of"],
    "peeking": ["peeking in torch: scores change with a token that follows them"],
    "misnamed": [
        "framework misnamed: adamw keeps optimizer/['exp_avg', 'second_moment'] in state(), expected ['first_moment'",
        "framework misnamed: sgd: train_step applies a gradient whose norm is above its limit",
    ],
    "unsound": [
        "rnn in unsound: load_state(state()) does not restore optimizer/first_moment/",
        "rnn in unsound: the loss does not fall in 7 steps on one batch",
        "framework unsound: a step of sgd changes the parameters by ",
    ],
    "idle": [
        "framework idle is refused: it refuses gpt and rnn (framework idle computes no gpt.), and its plugin has no "
        "model of its own",
    ],
}


def test_each_broken_contract_is_reported_in_a_sentence(tmp_path: Path) -> None:
    names = list(BROKEN_CONTRACTS)
    files = [FAULTY.with_name(name) for name in ("faulty_contracts.py", "faulty_framework.py")]
    variables = install_faulty(tmp_path, {name: f"faulty_contracts:{name}" for name in names}, *files)
    # Runs of three tasks: one that fails on a rank alone, and two for which ranks are launched again.
    chosen = "not tensorflow and not same_losses and not (runs_to_a_checkpoint and (misnamed or unsound))"
    chosen += " and not (evaluated_and_resumes and not (forgetting or uncounted or greedy))"
    done = run_suite(tmp_path, names, "-k", chosen, "--tb=short", **variables)
    assert done.returncode == 1, done.stdout[-3000:] + done.stderr[-3000:]
    missing = [text for texts in BROKEN_CONTRACTS.values() for text in texts if text not in done.stdout]
    assert not missing, "\n".join([*missing, "are not in:", done.stdout])
    assert "the ranks ended before" not in done.stdout
    assert "Traceback" not in done.stdout and "INTERNALERROR" not in done.stdout


def test_every_fault_of_a_plugin_is_reported(tmp_path: Path) -> None:
    kinds = ("hooks", "options", "writer", "task", "backend", "data", "rules")
    entries = {"faulty": "faulty_plugin:Faulty", "faulty_import": "nowhere"}
    entries |= {f"faulty_{kind}": f"faulty_plugin:{kind.capitalize()}" for kind in kinds}
    variables = install_faulty(tmp_path, entries, FAULTY)
    # One framework is enough to show the faults; test_built_in_plugins_and_templates_conform runs both.
    done = run_suite(tmp_path, list(entries), "-k", "not tensorflow and not same_losses", "--tb=short", **variables)
    assert done.returncode == 1, done.stdout[-3000:] + done.stderr[-3000:]
    missing = [report for report in REPORTS if report not in done.stdout]
    assert not missing, "\n".join([*missing, "are not in:", done.stdout])
    assert "Traceback" not in done.stdout and "INTERNALERROR" not in done.stdout


def test_an_unknown_plugin_gets_a_suggestion(tmp_path: Path) -> None:
    done = run_suite(tmp_path, ["tensorflw"])
    assert done.returncode == 4 and "no plugin 'tensorflw' is installed; did you mean tensorflow?" in done.stderr
    done = run_suite(tmp_path, ["digits"], "--hvdlm-config", "digits=nowhere.yaml")
    assert done.returncode == 4 and "expected NAME=FILE.yaml of a plugin that is tested" in done.stderr


def test_pytest_without_the_option_imports_nothing_more(tmp_path: Path) -> None:
    (tmp_path / "test_nothing.py").write_text("def test_nothing(): pass\n")
    code = (
        "import pytest, sys; code = pytest.main(['-q', 'test_nothing.py'])\n"
        "loaded = {name for name in sys.modules if name.startswith('hvdlm')}\n"
        "assert code == 0 and loaded <= {'hvdlm', 'hvdlm.hookspecs', 'hvdlm_testing', "
        "'hvdlm_testing.pytest_plugin'}, loaded\n"
        "bad = {'numpy', 'torch', 'tensorflow', 'keras'} & set(sys.modules); assert not bad, bad"
    )
    done = run_python(["-c", code], cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_built_in_plugin_is_in_setup_cfg() -> None:
    assert len(BUILT_IN) == len((ROOT / "setup.cfg").read_text().split("\nhvdlm =\n")[1].split("\n\n")[0].splitlines())
