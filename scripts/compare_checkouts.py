"""Train the first steps of every example with two checkouts, and compare metrics and checkpoints bit for bit.

A restructuring must not change a number. Run once per checkout, then compare the two folders:

    python scripts/compare_checkouts.py run OLD_CHECKOUT before --data DATA
    python scripts/compare_checkouts.py run NEW_CHECKOUT after --data DATA
    python scripts/compare_checkouts.py compare before after

The checkouts share this Python's packages; each must have its entry points beside it (``python setup.py egg_info``).
DATA holds ``tinyshakespeare.txt``, ``ptb/``, ``multi30k/``, ``fsdd.tar``, ``mnist/``, ...; examples without data are
left out with a line. Runs use one thread a rank, so that sums are added in one order.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

# Example, number of ranks, and its data below DATA.
EXAMPLES: list[tuple[str, int, dict[str, list[str]]]] = [
    ("demo", 2, {}),
    ("hybrid_gpt", 4, {}),
    ("shakespeare_char", 1, {"path": ["tinyshakespeare.txt"]}),
    ("warandpeace_char", 1, {"path": ["warandpeace.txt"]}),
    ("hongloumeng_char", 1, {"path": ["hongloumeng.txt"]}),
    ("ptb_lstm", 1, {"path": ["ptb/ptb.train.txt"], "validation_path": ["ptb/ptb.valid.txt"]}),
    ("mnist_convnet", 1, {"path": ["mnist"]}),
    ("spoken_digits", 1, {"path": ["fsdd.tar"]}),
    (
        "multi30k",
        1,
        {
            "path": ["multi30k/train.de.gz", "multi30k/train.en.gz"],
            "validation_path": ["multi30k/val.de.gz", "multi30k/val.en.gz"],
        },
    ),
]
FRAMEWORKS = ("torch", "tensorflow")
# Figures of time and memory, which differ from run to run.
TIMED = ("second", "memory", "share", "overlap", "time", "mfu", "eta")


def run_all(checkout: Path, output: Path, data: Path, steps: int, only: list[str]) -> None:
    """Train every example in both frameworks with ``checkout``, each into a folder below ``output``."""
    for example, ranks, files in EXAMPLES:
        for framework in FRAMEWORKS:
            name = f"{example}-{framework}"
            if only and example not in only:
                continue
            paths = {key: [str(data / path) for path in values] for key, values in files.items()}
            missing = [path for values in paths.values() for path in values if not Path(path).exists()]
            if missing:
                print(f"{name}: left out, {missing[0]} is missing", flush=True)
                continue
            started = time.monotonic()
            train(checkout, output / name, example, framework, ranks, paths, steps)
            print(f"{name}: {steps} steps on {ranks} rank(s) in {time.monotonic() - started:.0f} s", flush=True)


def train(
    checkout: Path, folder: Path, example: str, framework: str, ranks: int, paths: dict[str, list[str]], steps: int
) -> None:
    """Train one example."""
    command = [sys.executable, "-m", "hvdlm", "train", "--config", str(checkout / "examples" / f"{example}.yaml")]
    command += ["--framework", framework, "--log.run", str(folder), "--log.every", "1", "--log.tensorboard", "false"]
    command += ["--log.overwrite", "true", "--train.threads", "1"]
    command += ["--train.steps", str(steps), "--train.eval_every", str(steps // 2)]
    command += ["--train.warmup", str(steps // 10), "--checkpoint.every", str(steps // 2), "--checkpoint.keep", "9"]
    for key, values in paths.items():
        command += [f"--data.{key}", json.dumps(values)]
    if ranks > 1:
        command = ["mpirun", "--oversubscribe", "--bind-to", "none", "-np", str(ranks), *command]
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(str(checkout / name) for name in ("", "plugins", "backends"))
    environment.update(TF_CPP_MIN_LOG_LEVEL="3", CUDA_VISIBLE_DEVICES="")
    environment.update(OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3600)
    if done.returncode:
        raise SystemExit(
            f"{' '.join(command)}\nended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-3000:]}"
        )


def compare(first: Path, second: Path) -> int:
    """Print how the runs of two folders differ; return how many do."""
    names = sorted({path.name for folder in (first, second) for path in folder.iterdir() if path.is_dir()})
    differing = 0
    for name in names:
        if not ((first / name).is_dir() and (second / name).is_dir()):
            differences = ["only one side has this run"]
        else:
            differences = [*compare_metrics(first / name, second / name), *compare_files(first / name, second / name)]
        differing += bool(differences)
        print(f"{name}: {'; '.join(differences) or 'equal bit for bit'}")
    return differing


def compare_metrics(first: Path, second: Path) -> list[str]:
    """Return the differences of ``metrics.jsonl``, times aside."""
    lines = [[untimed(json.loads(line)) for line in (run / "metrics.jsonl").open()] for run in (first, second)]
    if len(lines[0]) != len(lines[1]):
        return [f"{len(lines[0])} and {len(lines[1])} lines of metrics"]
    for a, b in zip(*lines, strict=True):
        if a != b:
            keys = [key for key in a.keys() | b.keys() if a.get(key) != b.get(key)]
            return [f"step {a.get('step')}: {', '.join(f'{key} {a.get(key)} and {b.get(key)}' for key in keys)}"]
    return []


def untimed(line: dict[str, Any]) -> dict[str, Any]:
    """Return a line of metrics without figures of time and memory."""
    return {key: value for key, value in line.items() if not any(word in key for word in TIMED)}


def compare_files(first: Path, second: Path) -> list[str]:
    """Return which files of the checkpoints differ; of the manifests, which entries."""
    files = [sorted(str(p.relative_to(run)) for p in run.glob("checkpoints/step-*/*")) for run in (first, second)]
    if files[0] != files[1]:
        return [f"other files in the checkpoints: {set(files[0]) ^ set(files[1])}"]
    differences = []
    for name in files[0]:
        if name.endswith("manifest.json"):
            a, b = (json.loads((run / name).read_text()) for run in (first, second))
            for manifest in (a, b):
                manifest.get("config", {}).get("log", {}).pop("run", None)
                manifest.get("config", {}).get("data", {}).pop("path", None)
                manifest.pop("time", None)
                manifest.pop("branch", None)
            differences += [f"{name}: {key}" for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)]
        elif digest(first / name) != digest(second / name):
            differences.append(name)
    return differences if files[0] else ["no checkpoint"]


def digest(path: Path) -> str:
    """Return a file's SHA-256."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="train the examples with one checkout")
    running.add_argument("checkout", type=Path)
    running.add_argument("output", type=Path)
    running.add_argument("--data", type=Path, required=True)
    running.add_argument("--steps", type=int, default=100)
    running.add_argument("--only", nargs="*", default=[], help="names of examples")
    comparing = commands.add_parser("compare", help="compare the runs of two folders")
    comparing.add_argument("first", type=Path)
    comparing.add_argument("second", type=Path)
    values = parser.parse_args()
    if values.command == "compare":
        return 1 if compare(values.first, values.second) else 0
    run_all(values.checkout.resolve(), values.output.resolve(), values.data.resolve(), values.steps, values.only)
    return 0


if __name__ == "__main__":
    sys.exit(main())
