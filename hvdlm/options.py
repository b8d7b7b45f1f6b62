"""Parsing: jsonargparse over the dataclasses of ``config.py``, with errors that say what to write instead."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import jsonargparse

from hvdlm.config import Config, DataConfig
from hvdlm.interfaces import HvdlmError


class _Parser(jsonargparse.ArgumentParser):
    """A parser whose errors are HvdlmErrors."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise the message as one sentence."""
        raise HvdlmError(self.sentence(str(message))) from ex

    def sentence(self, message: str) -> str:
        """Return jsonargparse's message as: what is wrong, where, what to do."""
        known = [action.dest for action in self._actions if action.dest not in ("help", "print_config")]
        unknown = re.search(r"[Uu]nrecognized arguments?: +(?:--)?([\w.\-]+)", message) or re.search(
            r"(?:No action for key|Key|key|Group|Option) ['\"]([\w.]+)['\"]", message
        )
        if unknown and unknown[1] not in known:
            key = unknown[1]
            close = difflib.get_close_matches(key, known, 1, 0.5)
            advice = f"did you mean --{close[0]}?" if close else "python -m hvdlm --help lists all options."
            return f"--{key}: there is no such option; {advice}"
        key = re.search(r'key ["\']([\w.]+)["\']', message)
        text = " ".join(message.replace("Parser key", "key").split())
        text = re.sub(r"^Validation failed: ", "", text)
        if key:
            detail = re.sub(r'^.*?key ["\'][\w.]+["\']:? *', "", text)
            return f"--{key[1]}: {_expectation(detail)}"
        return text


def _expectation(detail: str) -> str:
    detail = re.sub(r"Problem with given class_path.*", "", detail).strip()
    return detail + ("" if detail.endswith(".") else ".")


def _parser(command: str, description: str, epilog: str | None = None) -> _Parser:
    parser = _Parser(prog=f"python -m hvdlm {command}", description=description, epilog=epilog, allow_abbrev=False)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _config_parser(command: str, description: str, epilog: str | None = None) -> _Parser:
    parser = _parser(command, description, epilog)
    parser.add_argument("--config", action="config", help="a YAML file of options; later options override it")
    parser.add_class_arguments(Config)
    return parser


def parse_config(arguments: list[str], commands: Mapping[str, str]) -> Config:
    """Return the configuration of ``train``; print and exit on --help and --print_config.

    Raises:
        HvdlmError: an unknown option, a wrong type, or an unreadable file.
    """
    listing = "commands: " + "; ".join(f"{name}: {text}" for name, text in commands.items())
    parser = _config_parser("[train]", "Train a language model, on one process or under an MPI launcher.", listing)
    return _instantiate(parser, arguments)


def _instantiate(parser: _Parser, arguments: list[str]) -> Config:
    _check_files(arguments)
    parsed = parser.instantiate_classes(parser.parse_args(arguments))
    fields = Config.__dataclass_fields__
    return Config(**{name: parsed[name] for name in fields})


def _check_files(arguments: list[str]) -> None:
    for index, argument in enumerate(arguments):
        if argument == "--config" or argument.startswith("--config="):
            name = argument.partition("=")[2] or (arguments[index + 1] if index + 1 < len(arguments) else "")
            check_yaml(Path(name))


def check_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file.

    Raises:
        HvdlmError: it can't be read, isn't YAML or is no mapping.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise HvdlmError(f"--config {path}: {error.strerror}: give a readable YAML file.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = " ".join(str(error).split())
        raise HvdlmError(f"--config {path}: is no valid YAML: {where}.") from error
    if not isinstance(content, dict):
        raise HvdlmError(f"--config {path}: holds no options; write for example: model: {{layers: 6}}.")
    return content


def run_config(run: str, arguments: list[str]) -> Config:
    """Return the configuration that a run was trained with, ``arguments`` overriding it."""
    path = Path(run) / "config.yaml"
    if not path.is_file():
        raise HvdlmError(f"--run {run}: there is no run (no config.yaml): name the folder given as --log.run.")
    parser = _config_parser("", "")
    return _instantiate(parser, ["--config", str(path), *arguments])


def _parse_known(parser: _Parser, arguments: list[str]) -> tuple[Any, list[str]]:
    """Split off options with a dot, --framework and --backend, which override the run's configuration."""
    own: list[str] = []
    rest: list[str] = []
    position = 0
    while position < len(arguments):
        name = arguments[position].partition("=")[0]
        target = rest if "." in name or name in ("--framework", "--backend") else own
        target.append(arguments[position])
        if (
            "=" not in arguments[position]
            and name.startswith("--")
            and name != "--help"
            and position + 1 < len(arguments)
        ):
            position += 1
            target.append(arguments[position])
        position += 1
    return parser.parse_args(own), rest


def _run_parser(command: str, description: str) -> _Parser:
    parser = _parser(command, description, "Options with a dot, --framework and --backend override the run's own.")
    parser.add_argument("--run", type=str, default="runs/default", help="the run's folder")
    parser.add_argument("--checkpoint", type=str, default=None, help="a checkpoint folder; default: the run's newest")
    return parser


def parse_evaluate(arguments: list[str]) -> tuple[Any, list[str]]:
    """Return the options of ``evaluate`` and those that override the run's configuration."""
    return _parse_known(_run_parser("evaluate", "Compute a run's figures on the whole validation split."), arguments)


def parse_generate(arguments: list[str]) -> tuple[Any, list[str]]:
    """Return the options of ``generate`` and those that override the run's configuration."""
    parser = _run_parser("generate", "Write text with a run's model.")
    parser.add_argument("--prompt", type=str, default="\n", help="what the text begins with; -: standard input")
    parser.add_argument("--tokens", type=int, default=200, help="tokens to write")
    parser.add_argument("--temperature", type=float, default=0.8, help="divides the scores; 0: always the likeliest")
    parser.add_argument("--top_k", type=int, default=0, help="draw among the k likeliest; 0: among all")
    parser.add_argument("--top_p", type=float, default=1.0, help="draw among the likeliest that sum to this share")
    parser.add_argument("--seed", type=int, default=1, help="everything random follows from it")
    return _parse_known(parser, arguments)


def parse_prepare(arguments: list[str]) -> Any:
    """Return ``data`` (a DataConfig) and ``output`` (a folder, or None for the cache)."""
    parser = _parser("prepare", "Turn text into token files, which --data.path then takes.")
    parser.add_class_arguments(DataConfig, "data")
    parser.add_argument("--output", type=str, default=None, help="folder of the token files; default: the cache")
    return parser.instantiate_classes(parser.parse_args(arguments))


def parse_none(command: str, description: str, arguments: list[str]) -> None:
    """Accept nothing but --help."""
    _parser(command, description).parse_args(arguments)
