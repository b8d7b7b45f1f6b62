"""Hands mutated files to a reader, guided by coverage (libFuzzer through atheris), until something gives.

``python benchmarks/fuzz.py TARGET --seconds 600`` (``pip install -e '.[fuzz]'`` first). Targets: manifest, shard,
header, journal, tokenizer, yaml. It stops at the first input that a reader neither takes nor refuses with a sentence,
that takes it 2 s, or more memory than 10 times its size and a stated slack; the input is saved, and what is to be kept
of those that reached something new lies in the working folder. Exit code 0: nothing was found.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import tracemalloc
from pathlib import Path
from random import Random

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
ROOM = 2**27  # bytes of address space beside what is taken at the start: what compiled libraries allocate is not traced


def main() -> int:
    """Prepare the working folder and fuzz in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=["manifest", "shard", "header", "journal", "tokenizer", "yaml"])
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--folder", type=Path, help="working folder: corpus, dictionary, findings; default: a new one")
    parser.add_argument("--longest", type=int, default=8192, help="bytes of an input")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return fuzz(options.target, options.folder, options.child, options.seconds, options.longest)
    folder = options.folder or Path(tempfile.mkdtemp(prefix=f"fuzz-{options.target}-"))
    print(f"working folder: {folder}", flush=True)
    more = ["--seconds", str(options.seconds), "--longest", str(options.longest), "--folder", str(folder)]
    variables = {**os.environ, "RUST_BACKTRACE": "0"}  # a backtrace takes more memory than there is left
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as work:
        command = [sys.executable, __file__, options.target, *more, "--child", work]
        # libFuzzer ends by itself; where a library's loop can't be interrupted, the time-out does.
        return subprocess.run(command, env=variables, timeout=options.seconds + 120).returncode


def prepare(name: str, folder: Path) -> Path:
    """Return the folder of the corpus, with the target's seeds and what was kept of earlier runs."""
    from hostile import CORPUS, TARGETS

    corpus = folder / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    kept = [path.read_bytes() for path in sorted((CORPUS / name).glob("*")) if path.is_file()]
    for number, data in enumerate(TARGETS[name].seeds() + kept):
        (corpus / f"seed-{number:03d}").write_bytes(data)
    words = [word.replace("\\", "\\\\").replace('"', '\\"') for word in TARGETS[name].words]
    (folder / "dictionary").write_text("".join(f'"{word}"\n' for word in words))
    return corpus


def fuzz(name: str, folder: Path, work: Path, seconds: int, longest: int) -> int:
    """Fuzz in this process, which ends with it; ``work``: where inputs are written for the readers."""
    import atheris

    with atheris.instrument_imports(include=["hvdlm", "json", "yaml"], enable_loader_override=False):
        import json.decoder  # noqa: F401

        import hostile
        import yaml  # noqa: F401

    corpus = prepare(name, folder)
    target = hostile.TARGETS[name]
    for data in target.seeds():  # everything that is imported late is imported now
        hostile.check(hostile.Target(target.read, target.seeds, slack=2**30), data, work)
    limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + ROOM
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    tracemalloc.start()
    flags = [f"-max_total_time={seconds}", f"-max_len={longest}", "-timeout=20", f"-artifact_prefix={folder}/found-"]
    flags += [f"-dict={folder}/dictionary", "-print_final_stats=1", "-rss_limit_mb=0", str(corpus)]

    def mutator(data: bytes, most: int, seed: int) -> bytes:
        if name == "yaml" or seed % 2:
            return atheris.Mutate(data, most)
        return hostile.mutated(name, data, Random(seed))[:most]

    atheris.Setup([sys.argv[0], *flags], lambda data: hostile.check(target, data, work), custom_mutator=mutator)
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
