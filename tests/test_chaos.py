"""A short form of ``make chaos``: runs that are killed or asked to stop at random moments."""

from __future__ import annotations

from launching import run_python


def test_ten_kills_and_two_stops_lose_no_data() -> None:
    done = run_python(["benchmarks/chaos.py", "--short", "--kills", "10", "--stops", "2", "--steps", "90"], timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "10 kills, 2 stops" in done.stdout and "nothing lost" in done.stdout
