"""The command lm-eval: tasks of lm_eval with a run's model, beside lm_eval's own HFLM with the exported model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from builders import FRAMEWORKS, both_frameworks, read_json, small_trainable
from hvdlm import cli
from hvdlm.errors import HvdlmError
from hvdlm_language.likelihood import end_logs, log_softmax
from launching import ROOT, SMALL, launch

HARNESS = pytest.importorskip("lm_eval", reason="a development dependency: pip install -e '.[dev]'")

CHOICES = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: "{{{{choices}}}}"
target_delimiter: " "
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
QUESTIONS = [
    ("First Citizen:\nBefore we proceed any further, hear me", ["speak.", "xq zvk"], 0),
    ("We are accounted poor", ["kkkk zzzz", "citizens, the patricians good."], 1),
    ("", ["the", "qqq"], 0),
    ("The gods know I speak this in hunger for bread, not in thirst for", ["revenge.", "vq jx.", "bread"], 0),
]
CONTEXT = 32


class Request:
    """An ``Instance`` of lm_eval, of which models read ``args``."""

    def __init__(self, *args: Any) -> None:
        self.args = args


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of torch with the tokenizer of bytes, a model that Hugging Face has, too."""
    folder = tmp_path_factory.mktemp("lm_eval") / "run"
    options = ["--model.name", "gpt2", "--data.tokenizer", "byte", "--train.ema", "0.5", "--train.warmup", "0"]
    assert cli.run([*SMALL, *options, "--train.steps", "40", "--log.run", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the YAML file of a multiple-choice task of a JSON-lines file."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"question": q, "choices": c, "answer": a} for q, c, a in QUESTIONS]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "choices.yaml").write_text(CHOICES.format(name="hvdlm_choices", data=folder / "rows.jsonl"))
    return folder / "choices.yaml"


@pytest.fixture(scope="module")
def reference(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return lm_eval's model of Hugging Face's, of the exported run."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("exported") / "gpt2"
    assert cli.run(["convert", "--run", str(run), "--format", "huggingface", "--output", str(folder)]) == 0
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = tokenizer.pad_token = tokenizer.convert_ids_to_tokens([10])[0]  # of the line end
    model = AutoModelForCausalLM.from_pretrained(folder)
    return HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", device="cpu", max_length=CONTEXT)


def opened(run: Path, framework: str) -> Any:
    """Return the run's model for lm_eval."""
    from hvdlm_lm_eval.model import RunLM

    from hvdlm.training.run import build, connect
    from hvdlm_inference.trained_run import plan_trained

    return RunLM(build(connect(plan_trained(str(run), None, ["--framework", framework]))))


@both_frameworks
def test_scores_equal_those_of_the_exported_model(framework: str, run: Path, reference: Any) -> None:
    ours, long = opened(run, framework), "And speak the speech, I pray you, " * 5
    pairs = [(q, f" {choice}") for q, choices, _ in QUESTIONS for choice in choices]
    pairs += [(long, " trippingly"), ("A trailing space ", "moves"), ("a", "b" * CONTEXT), ("ä€", "日")]
    requests = [Request(*pair) for pair in pairs]
    answers, expected = ours.loglikelihood(requests, disable_tqdm=True), reference.loglikelihood(requests)
    np.testing.assert_allclose([a[0] for a in answers], [e[0] for e in expected], rtol=1e-5, atol=1e-4)
    assert [a[1] for a in answers] == [e[1] for e in expected]
    texts = [Request(text) for text in (long, "short", "x", "b" * CONTEXT, "b" * (CONTEXT + 1))]
    rolling = ours.loglikelihood_rolling(texts)
    np.testing.assert_allclose(rolling, reference.loglikelihood_rolling(texts), rtol=1e-5, atol=1e-4)


@both_frameworks
def test_texts_equal_those_of_the_exported_model(framework: str, run: Path, reference: Any) -> None:
    ours = opened(run, framework)
    options = {"until": ["\n"], "max_gen_toks": 12}
    prompts = ["First Citizen:", "We are accounted poor citizens, the patricians good.", "B", "The"]
    requests = [Request(prompt, dict(options)) for prompt in prompts]
    answers = ours.generate_until(requests)
    assert answers == reference.generate_until(requests) and any(answers)
    early = ours.generate_until([Request("The", {"until": answers[3][2:4], "max_gen_toks": 12})])
    assert early == [answers[3].split(answers[3][2:4])[0]]
    sampled = {"do_sample": True, "temperature": 1.5, "max_gen_toks": 12, "until": []}
    one, again, greedy = (ours.generate_until([Request("The", o)]) for o in (sampled, sampled, {"max_gen_toks": 12}))
    assert one == again != greedy and len(one[0]) > 4


@both_frameworks
def test_ends_of_rows_are_scored_in_batches(framework: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of any lengths, as each by itself in numpy."""
    from hvdlm.protocols.types import Batch
    from hvdlm_language import likelihood

    monkeypatch.setattr(likelihood, "_MAX_LOGITS", 3 * 16 * 50)
    trainable, random = small_trainable(framework), np.random.default_rng(0)
    rows = [random.integers(0, 50, length).astype(np.int32) for length in (5, 13, 2, 9, 13, 4, 7)]
    counts = [1, 12, 1, 3, 4, 2, 6]
    likely = trainable.predict(Batch(rows[0][None, :-1], rows[0][None, 1:]))[0, -1].argmax()
    rows[0][-1] = likely
    logs, greedy = end_logs(trainable, rows, counts, 12, 50)
    for row, count, log, is_greedy in zip(rows, counts, logs, greedy, strict=True):
        scores = log_softmax(trainable.predict(Batch(row[None, :-1], row[None, 1:]))[0])[-count:]
        assert log == pytest.approx(scores[np.arange(count), row[-count:]].sum(), abs=1e-5)
        assert is_greedy == bool((scores.argmax(1) == row[-count:]).all())
    assert greedy[0]


def results_of(run: Path, task: Path, output: Path, *options: str) -> dict[str, Any]:
    common = ["--run", str(run), "--tasks", str(task), "--output", str(output)]
    assert cli.run(["lm-eval", *common, *options]) == 0
    return read_json(output)


def test_a_task_is_evaluated(run: Path, task: Path, reference: Any, tmp_path: Path, capfd: Any) -> None:
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    written = results_of(run, task, tmp_path / "results.json")
    manager = TaskManager(include_path=str(task.parent), include_defaults=False)
    expected = simple_evaluate(reference, tasks=["hvdlm_choices"], task_manager=manager, bootstrap_iters=0)
    ours, theirs = written["results"]["hvdlm_choices"], expected["results"]["hvdlm_choices"]
    assert written["step"] == 40 and written["weights"] == "trained"
    assert ours["acc,none"] == theirs["acc,none"] and ours["acc_norm,none"] == theirs["acc_norm,none"] > 0
    assert "hvdlm_choices" in capfd.readouterr().out
    limited = results_of(run, Path("hvdlm_choices"), tmp_path / "limited.json", "--include_path", str(task.parent),
                         "--limit", "2", "--num_fewshot", "0", "--weights", "ema")  # fmt: skip
    assert limited["n-samples"]["hvdlm_choices"]["effective"] == 2 and limited["weights"] == "ema"


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_ranks_divide_the_requests(framework: str, run: Path, task: Path, tmp_path: Path) -> None:
    alone = results_of(run, task, tmp_path / "one.json", "--framework", framework)
    common = ["-m", "hvdlm", "lm-eval", "--run", str(run), "--tasks", str(task), "--framework", framework]
    done = launch("mpirun", 2, [*common, "--output", str(tmp_path / "two.json")])
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("|hvdlm_choices|") == 1  # of rank 0
    together = read_json(tmp_path / "two.json")
    for name in ("acc,none", "acc_norm,none", "acc_stderr,none"):
        assert together["results"]["hvdlm_choices"][name] == alone["results"]["hvdlm_choices"][name]


def test_bad_input_is_one_sentence(run: Path, task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nameless.yaml").write_text("dataset_path: json\n")
    broken = CHOICES.format(name="hvdlm_broken", data=tmp_path / "none.jsonl")
    (tmp_path / "broken.yaml").write_text(broken)
    for options, message in [
        ([], "--tasks: the value is missing"),
        (["--tasks", "hellaswig"], "lm_eval has no task 'hellaswig'; .*hellaswag"),
        (["--tasks", "none.yaml"], "--tasks none.yaml: .*No such file"),
        (["--tasks", str(tmp_path / "nameless.yaml")], 'it names no task: add a line "task: NAME"'),
        (["--tasks", str(tmp_path / "broken.yaml")], "hvdlm_broken: lm_eval can't load it"),
        (["--tasks", str(task), "--include_path", "nowhere"], "--include_path nowhere: there is no such folder"),
        (["--tasks", str(task), "--limit", "0"], "--limit: got 0, expected 1 or more"),
        (["--tasks", str(task), "--parallel.tensor", "2"], "--parallel.tensor: lm-eval has the whole model"),
    ]:
        with pytest.raises(HvdlmError, match=message) as caught:
            cli.run(["lm-eval", "--run", str(run), *options])
        assert len(str(caught.value)) < 400
    monkeypatch.setattr("hvdlm_lm_eval.command.importlib.util.find_spec", lambda name: None)
    with pytest.raises(HvdlmError, match=r"not installed: pip install 'hvdlm\[lm_eval\]'"):
        cli.run(["lm-eval", "--run", str(run), "--tasks", str(task)])


def test_the_extra_is_a_development_dependency() -> None:
    lines = (ROOT / "setup.cfg").read_text().splitlines()
    wanted = f"    {lines[lines.index('lm_eval =') + 1].strip()}"
    assert wanted.startswith("    lm_eval>=") and lines.count(wanted) == 2
