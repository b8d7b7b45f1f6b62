"""Hardware files: what is read and written, what is wrong in one sentence, and those that come with hvdlm."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from hvdlm.cli import main
from hvdlm.errors import HvdlmError
from hvdlm.planning.hardware import find_hardware, named_files, read_hardware, write_hardware

GOOD = """
name: test
fitted_on: a data sheet
tested_on: nothing
rates:
  - {product_flops_per_second: 1.0e+12, memory_bytes_per_second: 1.0e+11}
links:
  node: {latency_seconds: 1.0e-6, bytes_per_second: 1.0e+10}
  network: {latency_seconds: 1.0e-5, bytes_per_second: 1e9}
"""


@pytest.mark.parametrize("name", ["a100", "cpu_ethernet", "h100", "p100"])
def test_files_of_hvdlm_say_what_they_rest_on(name: str, tmp_path: Path) -> None:
    hardware = read_hardware(name)
    assert hardware.fitted_on and hardware.tested_on and name in named_files()
    write_hardware(hardware, tmp_path / "copy.yaml")
    assert read_hardware(tmp_path / "copy.yaml") == hardware
    assert hardware.rates_of("torch", "fp32").product_flops_per_second > 0


def test_few_fields_are_enough_and_1e9_is_a_number(tmp_path: Path) -> None:
    (tmp_path / "few.yaml").write_text(GOOD)
    hardware = read_hardware(tmp_path / "few.yaml")
    assert hardware.links["network"].bytes_per_second == 1e9 and hardware.ranks_per_node == 1


WRONG = [
    ("rates:", "rate:", "'rate' is unknown", "rate is unknown"),
    ("name: test", "name: 3", "name must be text", ""),
    ("1.0e+12", "fast", "rates[0].product_flops_per_second must be a number", ""),
    ("1.0e+12", "-1", "rates[0].product_flops_per_second must be a finite number of at least 0", ""),
    ("1.0e+12", ".nan", "rates[0].product_flops_per_second must be a finite number", ""),
    ("1.0e+11}", "1.0e+11, products: [[1, 2, 3]]}", "rates[0].products: every row has 4 numbers", ""),
    ("1.0e+11}", "1.0e+11, speed: 3}", "rates[0].speed is unknown", ""),
    ("  network: {latency_seconds: 1.0e-5, bytes_per_second: 1e9}", "", "links.network is missing", ""),
    ("latency_seconds: 1.0e-6, ", "", "links.node.latency_seconds is missing", ""),
    ("fitted_on: a data sheet", "", "fitted_on is missing", ""),
    ("name: test", "name: test\nranks_per_node: 1.5", "ranks_per_node must be a whole number", ""),
    ("name: test", "name: test\ngathers_by_ring: 3", "gathers_by_ring must be true or false", ""),
    ("name: test", "name: test\nsharing: 3", "sharing must be a list", ""),
    ("name: test", "name: test\ncompressors: [3]", "compressors must be a mapping", ""),
    ("name: test", "name: test\nname: test", "given twice", ""),
    (
        "name: test",
        "name: test\ncollectives: [{operation: all_reduce, ranks: 2, bytes: [2, 1], seconds: [1, 1]}]",
        "collectives[0]: bytes and seconds must be as many",
        "",
    ),
]


@pytest.mark.parametrize("old, new, expected, other", WRONG, ids=[row[2][:40] for row in WRONG])
def test_a_wrong_field_is_named_in_one_sentence(
    old: str, new: str, expected: str, other: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(GOOD.replace(old, new))
    assert main(["plan", "--hardware", str(path)]) == 2
    error = capsys.readouterr().err
    assert (expected in error or (other and other in error)) and error.count("\n") == 1 and str(path) in error


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(HvdlmError, match="a100, cpu_ethernet, h100, p100"):
        find_hardware("no_such_machine")


def test_files_of_hvdlm_are_installed_with_it() -> None:
    import configparser

    parser = configparser.ConfigParser()
    parser.read(Path(__file__).resolve().parent.parent / "setup.cfg")
    assert "machines/*.yaml" in parser["options.package_data"]["hvdlm_planner"]
    for path in named_files().values():
        assert isinstance(yaml.safe_load(path.read_text()), dict)
