"""The compressor of examples/plugins, installed with pip as a third party's would be, trains in both frameworks."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from launching import ROOT, install_example, launch

SOURCE = ROOT / "examples" / "plugins" / "ternary"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder into which pip has installed the example."""
    return install_example("ternary", tmp_path_factory.mktemp("ternary"))


def test_it_is_short() -> None:
    assert len((SOURCE / "ternary.py").read_text().splitlines()) < 30


def test_it_is_listed(installed: Path) -> None:
    listed = launch("", 1, ["-m", "hvdlm", "plugins"], PYTHONPATH=str(installed)).stdout
    assert re.search(r"ternary +hvdlm-ternary 0.1 +ternary +compressors \(ternary\)", listed)
    assert "compressors (fp16, bf16, top_k, random_k, power_sgd, scaled_sign, sign_majority, qsgd, int8, dgc)" in listed


def test_it_trains_in_both_frameworks_alike(installed: Path, tmp_path: Path) -> None:
    found = {}
    for framework in ("torch", "tensorflow"):
        run = tmp_path / framework
        options = ["--framework", framework, "--log.run", str(run), "--log.every", "1"]
        options += ["--model.layers", "2", "--model.width", "32", "--model.heads", "2", "--data.context", "32"]
        options += [
            "--train.batch_size",
            "8",
            "--train.steps",
            "60",
            "--communication.compression.algorithm",
            "ternary",
        ]
        done = launch("mpirun", 2, ["-m", "hvdlm", *options], PYTHONPATH=str(installed))
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        found[framework] = [line["loss"] for line in lines if "loss" in line]
        summary = json.loads((run / "summary.json").read_text())
        # Two bits an element; small tensors stay dense.
        assert 10 < summary["compression"] < 16 and summary["val_loss"] < found[framework][0] - 0.5
    assert found["torch"][:20] == pytest.approx(found["tensorflow"][:20], abs=1e-3)
