"""The process in which fuzz.py fuzzes a reader.

It imports as little as possible before atheris, which instruments only modules that are imported later.
"""

from __future__ import annotations

import argparse
import itertools
import resource
import sys
import tracemalloc
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
PACKAGES = ("hvdlm", "hvdlm_corpora", "hvdlm_huggingface", "hvdlm_launchers", "hvdlm_report", "hvdlm_tasks")
# Bytes of address space beyond those used at the start: tracemalloc doesn't see what compiled libraries allocate.
HEADROOM = 2**27


def limit_memory() -> None:
    """Limit this process's address space to ``HEADROOM`` above what it has now."""
    limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + HEADROOM
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


def main() -> None:
    """Fuzz until the time is over or an input fails."""
    parser = argparse.ArgumentParser()
    parser.add_argument("target")
    parser.add_argument("--seconds", type=int)
    parser.add_argument("--longest", type=int)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--work", type=Path)
    o = parser.parse_args()
    fuzz(o.target, o.folder, o.work, o.seconds, o.longest)


def prepare(name: str, folder: Path) -> Path:
    """Return the folder of the corpus: the target's seeds, and the inputs that the tests keep."""
    import fuzz_targets

    corpus = folder / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    kept = [path.read_bytes() for path in sorted((fuzz_targets.CORPUS / name).glob("*")) if path.is_file()]
    for number, data in enumerate(fuzz_targets.TARGETS[name].seeds() + kept):
        (corpus / f"seed-{number:03d}").write_bytes(data)
    words = [word.replace("\\", "\\\\").replace('"', '\\"') for word in fuzz_targets.TARGETS[name].words]
    (folder / "dictionary").write_text("".join(f'"{word}"\n' for word in words))
    return corpus


def fuzz(name: str, folder: Path, work: Path, seconds: int, longest: int) -> None:
    """Fuzz in this process, which doesn't return; readers find their input in the folder ``work``."""
    import atheris

    with atheris.instrument_imports(include=[*PACKAGES, "json", "yaml"], enable_loader_override=False):
        import json.decoder  # noqa: F401

        import yaml  # noqa: F401

        import fuzz_targets

    corpus = prepare(name, folder)
    target = fuzz_targets.TARGETS[name]
    for data in target.seeds():  # what is imported late is imported before memory is limited
        fuzz_targets.check_input(fuzz_targets.Target(target.read, target.seeds, slack=2**30), data, work)
    tracemalloc.start()
    arguments = [
        f"-max_total_time={seconds}",
        f"-max_len={longest}",
        "-timeout=20",
        f"-artifact_prefix={folder}/failing-",
    ]
    if (folder / "dictionary").stat().st_size:  # libFuzzer refuses an empty one
        arguments.append(f"-dict={folder}/dictionary")
    arguments += ["-print_final_stats=1", "-rss_limit_mb=0", str(corpus)]

    def mutator(data: bytes, longest: int, seed: int) -> bytes:
        if name in ("yaml", "arrow", "parquet") or seed % 2:
            return atheris.Mutate(data, longest)
        return fuzz_targets.mutate(name, data, Random(seed))[:longest]

    inputs = itertools.count()

    def check(data: bytes) -> None:
        if next(inputs) % 100 == 0:  # libFuzzer itself takes a kilobyte for every input
            limit_memory()
        fuzz_targets.check_input(target, data, work)

    atheris.Setup([sys.argv[0], *arguments], check, custom_mutator=mutator)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
