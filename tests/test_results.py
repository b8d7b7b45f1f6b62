"""The short form of every published result: the same examples and commands on the same data, a few steps of each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launching import DATA, losses, run_python

PTB = ["ptb", "ptb_2_ranks"]
NAMES = ["shakespeare", "war_and_peace", "red_chamber", *PTB, "digits", "speech", "translation"]
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"the public data is not at {DATA} (set HVDLM_DATA)")


# Other texts for the model of shakespeare: in TensorFlow, the same graph; red_chamber has an alphabet of 4,000. And the
# LSTM of ptb, which TensorFlow unrolls.
TEXTS = pytest.mark.full(
    covered_by="the case of fewer texts: shakespeare runs the same lines on another text; ptb in torch, and the curves "
    "of TensorFlow's lstm in test_train.py"
)
MEASURED = [
    ("torch", [name for name in NAMES if name != "war_and_peace"]),
    ("tensorflow", [name for name in NAMES if name not in ("war_and_peace", "red_chamber", *PTB)]),
    pytest.param("torch", NAMES, marks=TEXTS),
    pytest.param("tensorflow", NAMES, marks=TEXTS),
]


@needs_data
@pytest.mark.parametrize("framework, names", MEASURED, ids=["torch", "tensorflow", "torch-all", "tensorflow-all"])
def test_every_result_has_a_short_form_that_learns(framework: str, names: list[str], tmp_path: Path) -> None:
    command = ["benchmarks/results.py", *names, "--short", "--data", str(DATA), "--folder", str(tmp_path)]
    command += ["--frameworks", framework]
    done = run_python(command, timeout=900, HVDLM_TEST_IMPORTS="none")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    rows = json.loads((tmp_path / "results.json").read_text())
    assert [row["result"] for row in rows] == names and all(row["reached"] for row in rows)
    assert "MISSED" not in done.stdout and done.stdout.count(": reached (") == len(names)
    if set(PTB) <= set(names):
        one, two = (losses(tmp_path / f"{name}-{framework}") for name in PTB)
        # Bit for bit: one rank computes micro-batches of half a batch, as each of two ranks does.
        assert len(one) > 1 and one == two


def test_a_comparison_without_its_baseline_is_refused(tmp_path: Path) -> None:
    command = ["benchmarks/results.py", "ptb_2_ranks", "--frameworks", "torch"]
    command += ["--folder", str(tmp_path)]
    done = run_python(command, timeout=60)
    assert done.returncode == 1 and "measure ptb-torch first" in done.stderr, done.stderr
    assert not list(tmp_path.iterdir())
