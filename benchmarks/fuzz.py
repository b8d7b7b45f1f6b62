"""Coverage-guided fuzzing of the readers of untrusted files (libFuzzer through atheris).

    python benchmarks/fuzz.py TARGET [--seconds 600] [--short]        after pip install -e '.[fuzz]'

Fuzzing ends at the first input that a reader neither accepts nor rejects with an error message, or for which it takes
2 s or more memory than 10 times the input's size and a stated slack. That input is saved in the working folder, beside
the corpus of inputs that reached new code. The exit code is 0 if there was none.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from harness import Bar, flags, make_parser, parse, report, skip

WORKER = Path(__file__).with_name("fuzz_worker.py")
TARGETS = ["manifest", "shard", "header", "journal", "tokenizer", "folder", "yaml", "arrow", "parquet"]
TARGETS += ["doctor", "report", "resume", "speech", "digits", "hardware", "conditions", "scaling"]
FULL, SHORT = {"seconds": 600, "longest": 8192}, {"seconds": 1}
NONE = Bar(at_most=0)


def main() -> int:
    """Prepare the working folder and fuzz in another process, whose memory is limited."""
    parser = make_parser(__doc__, frameworks=False)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--folder", type=Path, help="working folder: corpus, dictionary, failing inputs; default: new")
    o = parse(parser, FULL, SHORT)
    if importlib.util.find_spec("atheris") is None:
        return skip("atheris is not installed: pip install -e '.[fuzz]'")
    folder = o.folder or Path(tempfile.mkdtemp(prefix=f"fuzz-{o.target}-"))
    print(f"working folder: {folder}", flush=True)
    options = flags({"seconds": o.seconds, "longest": o.longest, "folder": folder})
    variables = {**os.environ, "RUST_BACKTRACE": "0"}  # a backtrace takes more memory than the limit leaves
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as work:
        command = [sys.executable, str(WORKER), o.target, *options, "--work", work]
        # libFuzzer ends by itself; the timeout ends it where a library's loop can't be interrupted.
        code = subprocess.run(command, env=variables, timeout=o.seconds + 120).returncode
    report(f"failing inputs, {o.target}, {o.seconds} s", int(code != 0), NONE)
    return code


if __name__ == "__main__":
    sys.exit(main())
