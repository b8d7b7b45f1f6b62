"""The compressor of examples/plugins, installed with pip like a third-party package, trains in both frameworks."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from launching import ONE_LAYER, ROOT, SMALL, STEPS, install_example, launch, run_python

SOURCE = ROOT / "examples" / "plugins" / "ternary"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder into which pip has installed the example."""
    return install_example("ternary", tmp_path_factory.mktemp("ternary"))


def test_the_example_has_fewer_than_30_lines() -> None:
    assert len((SOURCE / "ternary.py").read_text().splitlines()) < 30


def test_the_plugin_is_listed(installed: Path) -> None:
    listed = run_python(["-m", "hvdlm", "plugins"], PYTHONPATH=str(installed)).stdout
    assert re.search(r"ternary +hvdlm-ternary 0.1 +ternary +compressors \(ternary\)", listed)
    built_in = (
        "fp16, bf16, top_k, random_k, power_sgd, scaled_sign, sign_majority, qsgd, int8, int4, dgc, chunked_top_k"
    )
    assert f"compressors ({built_in})" in listed


def test_the_plugin_trains_alike_in_both_frameworks(installed: Path, tmp_path: Path) -> None:
    curves = {}
    for framework in ("torch", "tensorflow"):
        run = tmp_path / framework
        options = ["--framework", framework, "--log.run", str(run), *SMALL, *ONE_LAYER, *STEPS]
        options += ["--communication.compression.algorithm", "ternary"]
        done = launch("threads", 2, ["-m", "hvdlm", *options], PYTHONPATH=str(installed))
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        curves[framework] = [line["loss"] for line in lines if "loss" in line]
        summary = json.loads((run / "summary.json").read_text())
        # Two bits an element; small tensors stay dense.
        assert 10 < summary["compression"] < 16 and summary["val_loss"] < curves[framework][0] - 0.5
    assert curves["torch"][:20] == pytest.approx(curves["tensorflow"][:20], abs=1e-3)
