"""Sums in two levels (``parallel.data_per_node``): groups, refusals, and whole runs; tests/parallel has the sums."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hvdlm.cli import main
from hvdlm.parallel.mesh import Mesh, levels
from launching import ONE_LAYER, SMALL, launch, losses, run_python

LEVELS = ["--parallel.data_per_node", "2"]
INT8 = ["--communication.compression.algorithm", "int8"]
REFUSED = [
    (["--parallel.data", "6", "--parallel.data_per_node", "4"], "choose one of 1, 2, 3, 6"),
    (["--communication.exchange", "diloco"], "it is not a sum of gradients at every step"),
    (["--parallel.zero", "1"], "ZeRO's shards are those of all data-parallel ranks"),
    (["--communication.auto", "true"], "it measures one network"),
    (
        ["--communication.reduction", "exact", "--communication.exact_rows", "2"],
        "reduction exact has an order of its own",
    ),
    (["--communication.compression.algorithm", "power_sgd"], "power_sgd whole matrices"),
    (["--parallel.data_per_node", "0"], "expected 1 or more"),
]


def test_a_line_of_ranks_has_two_levels() -> None:
    assert levels((0, 1, 2, 3), 2, 2) == ((2, 3), (0, 2))
    assert levels((1, 3, 5, 7, 9, 11), 7, 3) == ((7, 9, 11), (1, 7))


def test_every_rank_is_in_a_node_and_in_a_line_of_nodes() -> None:
    mesh = Mesh(4, 1, 2, data_per_node=2)
    groups = set(mesh.groups())
    nodes = {(0, 2), (4, 6), (1, 3), (5, 7)}
    across = {(0, 4), (2, 6), (1, 5), (3, 7)}
    assert nodes | across <= groups
    assert groups - nodes - across == set(Mesh(4, 1, 2).groups())


@pytest.mark.parametrize("options, expected", REFUSED, ids=[" ".join(options) for options, _ in REFUSED])
def test_what_cannot_be_summed_in_levels_is_refused(
    options: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [] if "--parallel.data_per_node" in options else LEVELS
    assert main(["--dry_run", "--parallel.data", "4", *given, *options]) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1


def test_a_node_with_fewer_ranks_is_named() -> None:
    one_of_two = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}
    command = ["-m", "hvdlm", "plan", "--parallel.data", "2", *LEVELS]
    done = run_python(command, **one_of_two)
    assert done.returncode == 2 and "needs a multiple of 2 ranks on every node" in done.stderr, done.stderr


def summary(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())


def test_a_run_in_levels_follows_one_level_and_resumes_exactly(tmp_path: Path) -> None:
    """Four data ranks of two tensor ranks each: whole, and compressed between nodes with a resume."""
    common = ["-m", "hvdlm", "--backend", "threads", "--ranks", "8", *SMALL, *ONE_LAYER, "--parallel.tensor", "2"]
    common += ["--train.warmup", "0", "--train.eval_every", "0", "--log.tensorboard", "false", "--checkpoint.keep", "9"]
    runs = {
        "one": ["--train.steps", "4"],
        "two": ["--train.steps", "4", *LEVELS],
        "int8": ["--train.steps", "8", "--checkpoint.every", "4", *LEVELS, *INT8],
    }
    for name, options in runs.items():
        done = run_python([*common, *options, "--log.run", str(tmp_path / name)])
        assert done.returncode == 0, done.stderr[-3000:]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    whole, few = (summary(tmp_path / name) for name in ("two", "int8"))
    of_step = [one["ranks"][0]["step_bytes"] for one in (whole, few)]
    assert of_step[0]["node"] == of_step[1]["node"] > 0
    assert of_step[1]["data"] < of_step[0]["data"] / 2
    for rank in whole["ranks"]:
        assert rank["step_bytes"] == rank["predicted_step_bytes"]
    assert few["compression"] > whole["compression"]  # which counts what tensor ranks send, too
    again = [*common, *runs["int8"], "--checkpoint.resume", str(tmp_path / "int8" / "checkpoints" / "step-00000004")]
    done = run_python([*again, "--log.run", str(tmp_path / "again")])
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(tmp_path / "again") == losses(tmp_path / "int8")[4:]


def test_four_processes_of_mpi_train_in_levels(tmp_path: Path) -> None:
    """Whole gradients travel within a node, a fraction of them between nodes."""
    options = ["-m", "hvdlm", "--framework", "tensorflow", *SMALL, *ONE_LAYER, *LEVELS, *INT8, "--train.steps", "3"]
    options += ["--train.eval_every", "0"]
    done = launch("mpirun", 4, [*options, "--log.tensorboard", "false", "--log.run", str(tmp_path)])
    assert done.returncode == 0, done.stderr[-3000:]
    sent = summary(tmp_path)["ranks"][0]["step_bytes"]
    assert sent["node"] >= 4 * summary(tmp_path)["parameters"]
    assert 0 < sent["data"] < sent["node"] / 4
