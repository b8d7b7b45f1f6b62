"""Parsing: jsonargparse over the dataclasses of ``config.py``, with errors that say what to write instead."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NoReturn

import jsonargparse

from hvdlm.config import Config, DataConfig
from hvdlm.configuration import schema
from hvdlm.errors import HvdlmError
from hvdlm.io import safe_yaml, untrusted_input

_SENTENCE = 1000  # characters: what was given may be long
_CONFIG_LIMIT = 2**18  # bytes: a configuration beyond this is none


class _Parser(jsonargparse.ArgumentParser):
    """A parser whose errors are HvdlmErrors; ``known`` maps every option to its type."""

    known: Mapping[str, Any] = {}

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise the message as one sentence."""
        raise HvdlmError(untrusted_input.shown(self.sentence(str(message)), _SENTENCE)) from ex

    def sentence(self, message: str) -> str:
        """Return jsonargparse's message as: what is wrong, where, what to do."""
        known = self.known or {a.dest: a.type for a in self._actions if a.dest not in ("help", "print_config")}
        missing = re.search(r"[Uu]nrecognized arguments?: +(-*)([\w.\-]+)", message) or re.search(
            r"()(?:No action for key|[Kk]ey|Group|Option) ['\"]([\w.]+)['\"]", message
        )
        section = re.search(r'(?:argument --|key "|--)(\w+)(?![\w.])', message)
        name = section[1] if section else ""
        if name and name not in known and any(key.startswith(f"{name}.") for key in known):
            return f"--{name} is a section, it takes no value itself: write for example {schema.example(name, known)}."
        if missing and missing[2] not in known:
            if missing[1]:
                return schema.unknown(missing[2], known)
            return (
                f"{missing[2]!r} belongs to no option: write --OPTION VALUE; python -m hvdlm --help lists all options."
            )
        key = re.search(r'key ["\']([\w.]+)["\']', message) or re.search(r"argument --([\w.]+)", message)
        if not key:
            return " ".join(message.split())
        if "expected one argument" in message:
            return f"--{key[1]}: the value is missing, expected {schema.expectation(known.get(key[1]))}."
        value = re.search(r"(?:Got|Given) value:\s*(.*)\Z", message, re.S)
        return schema.wrong_value(key[1], value[1].strip() if value else "", known.get(key[1]))


def _parser(command: str, description: str, epilog: str | None = None) -> _Parser:
    epilog = (epilog + " " if epilog else "") + "With --debug, every command shows the traceback of an error."
    return _Parser(prog=f"python -m hvdlm {command}", description=description, epilog=epilog, allow_abbrev=False)


def _config_parser(command: str, description: str, plugins: Mapping[str, type], epilog: str | None = None) -> _Parser:
    parser = _parser(command, description, epilog)
    parser.add_argument("--config", action="config", help="a YAML file of options; later options override it")
    parser.add_class_arguments(Config, skip={"plugin_options"})
    for section, kind in plugins.items():
        parser.add_class_arguments(kind, section)
    parser.known = _known(plugins)
    return parser


def _known(plugins: Mapping[str, type]) -> dict[str, Any]:
    known = schema.types_of({"": Config, **plugins})
    del known["plugin_options"]
    return known


def parse_config(arguments: list[str], commands: Mapping[str, str]) -> Config:
    """Return the configuration of ``train``; print and exit on --help and --print_config.

    Raises:
        HvdlmError: an unknown option, a wrong type, or an unreadable file.
    """
    listing = "commands: " + "; ".join(f"{name}: {text}" for name, text in commands.items()) + "."
    description = "Train a language model, on one process or under an MPI launcher."
    listing = "With --dry_run, train prints what it would need of every rank, and starts nothing. " + listing
    return _parse("[train]", description, arguments, listing)


def _parse(command: str, description: str, arguments: list[str], epilog: str | None = None) -> Config:
    files = {name: read_yaml(Path(name)) for name in _values("--config", arguments)}
    plugins = _plugin_options(arguments, files.values())
    for name, content in files.items():
        schema.check_mapping(content, _known(plugins), f"--config {name}")
    parser = _config_parser(command, description, plugins, epilog)
    parsed = parser.instantiate_classes(parser.parse_args(arguments))
    options = {section: parsed[section] for section in plugins}
    return Config(
        **{n: parsed[n] for n in Config.__dataclass_fields__ if n != "plugin_options"}, plugin_options=options
    )


def _values(name: str, arguments: list[str]) -> list[str]:
    """Return every value that option ``name`` is given."""
    found = []
    for index, argument in enumerate(arguments):
        if argument.partition("=")[0].rstrip("+") == name:
            follows = arguments[index + 1] if index + 1 < len(arguments) else ""
            found.append(argument.partition("=")[2] or follows)
    return found


def _plugin_options(arguments: list[str], files: Iterable[Mapping[str, Any]]) -> dict[str, type]:
    """Return {section: dataclass} of the plugins and the task that the options or a file name.

    Raises:
        HvdlmError: one is not installed, does not import, or names a section that is taken.
    """
    import yaml

    named: list[str] = []
    for text in _values("--plugins", arguments):
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            continue  # the parser will say what is wrong with it
        named += value if isinstance(value, list) else [text]
    for content in files:
        value = content.get("plugins") or []
        named += value if isinstance(value, list) else []
    tasks = [*_values("--task", arguments), *(str(content["task"]) for content in files if "task" in content)]
    if not named and not tasks:
        return {}
    from hvdlm import plugins

    names = [str(name) for name in named]
    plugins.require(names)
    found: dict[str, type] = {}
    for more in plugins.load([*names, *tasks]).hook.hvdlm_options():
        for section, kind in more.items():
            if section in Config.__dataclass_fields__ or section in found:
                raise HvdlmError(
                    f"plugins: the section {section!r} of a plugin's options is taken: leave one plugin out."
                )
            found[section] = kind
    return found


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file.

    Raises:
        HvdlmError: it can't be read, isn't YAML, is no mapping, or holds more than plain values.
    """
    if not str(path) or str(path) == ".":
        raise HvdlmError("--config: the value is missing, expected the path of a YAML file.")
    try:
        content = safe_yaml.load(
            str(untrusted_input.read(path, _CONFIG_LIMIT), "utf-8"), jsonargparse.get_loader("yaml")
        )
    except OSError as error:
        raise HvdlmError(f"--config {path}: {error.strerror}: give a readable YAML file.") from error
    except ValueError as error:
        raise HvdlmError(f"--config {path}: is no valid YAML: {untrusted_input.shown(str(error), 250)}.") from error
    if not isinstance(content, dict):
        raise HvdlmError(f"--config {path}: holds no options; write for example: model: {{layers: 6}}.")
    return content


def run_config(run: str, arguments: list[str]) -> Config:
    """Return the configuration that a run was trained with, ``arguments`` overriding it; its tokenizer stays."""
    named = [argument.partition("=")[0] for argument in arguments]
    kept = Path(run) / "tokenizer.json"
    moved = "--model.pretrained" in named or any(name.startswith("--data.") for name in named)
    if moved and "--data.tokenizer" not in named and kept.is_file():
        arguments = [*arguments, "--data.tokenizer", str(kept)]
    return _parse("", "", ["--config", str(_run_file(run)), *arguments])


def _run_file(run: str) -> Path:
    path = Path(run) / "config.yaml"
    if not path.is_file():
        raise HvdlmError(f"--run {run}: there is no run (no config.yaml): name the folder given as --log.run.")
    return path


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


_OVERRIDES = "Options with a dot, --framework and --backend override the run's own."


def _run_parser(command: str, description: str, epilog: str | None = _OVERRIDES) -> _Parser:
    parser = _parser(command, description, epilog)
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
    parser.add_argument("--prompt_file", type=str, default=None, help="a file with what the text begins with")
    parser.add_argument("--tokens", type=int, default=200, help="tokens to write")
    parser.add_argument("--num_samples", type=int, default=1, help="texts to write, each with a seed of its own")
    parser.add_argument("--temperature", type=float, default=0.8, help="divides the scores; 0: always the likeliest")
    parser.add_argument("--top_k", type=int, default=0, help="draw among the k likeliest; 0: among all")
    parser.add_argument("--top_p", type=float, default=1.0, help="draw among the likeliest that sum to this share")
    parser.add_argument("--seed", type=int, default=1, help="everything random follows from it")
    return _parse_known(parser, arguments)


def parse_convert(arguments: list[str]) -> Any:
    """Return ``run``, ``checkpoint``, ``output``, ``format`` and ``base`` of ``convert``.

    Raises:
        HvdlmError: there is no such run, and no checkpoint is named; or no output is.
    """
    parser = _run_parser("convert", "Merge a checkpoint's parameters into one file, for any reader.", epilog=None)
    parser.add_argument("--output", type=str, default=None, help="what to write; what is there is replaced")
    parser.add_argument(
        "--format",
        type=Literal["safetensors", "huggingface"],
        default="safetensors",
        help="one safetensors file with hvdlm's names, or a folder that transformers loads as GPT-2 or Llama",
    )
    parser.add_argument(
        "--base", type=str, default=None, help="of a run with adapters: where the folder that it started from lies now"
    )
    values = parser.parse_args(arguments)
    if not values.output:
        raise HvdlmError("--output: the value is missing, expected a file to write, for example model.safetensors.")
    if values.checkpoint is None:
        _run_file(values.run)
    return values


def parse_report(description: str, arguments: list[str]) -> Any:
    """Return ``runs``, ``output`` and ``tolerance`` of ``report``.

    Raises:
        HvdlmError: no run is named, or too many for one page.
    """
    from hvdlm_report.page import MOST

    parser = _parser("report", description)
    parser.add_argument("runs", type=str, nargs="*", help=f"folders of runs, at most {MOST}")
    parser.add_argument(
        "--output", type=str, default="report.html", help="the page to write; what is there is replaced"
    )
    parser.add_argument("--tolerance", type=float, default=1e-4, help="losses further apart than this have parted")
    values = parser.parse_args(arguments)
    if not 0 < len(values.runs or []) <= MOST:
        raise HvdlmError(
            f"report: {len(values.runs or [])} runs are named, expected 1 to {MOST}: report runs/a runs/b."
        )
    return values


def parse_prepare(arguments: list[str]) -> Any:
    """Return ``data`` (a DataConfig), ``output`` (a folder, or None for the cache) and ``workers`` (None: by the text).

    Raises:
        HvdlmError: no worker is asked for.
    """
    parser = _parser(
        "prepare",
        "Turn text into token files, which --data.path then takes.",
        "Killed, it goes on when it is given again.",
    )
    parser.add_class_arguments(DataConfig, "data")
    parser.add_argument("--output", type=str, default=None, help="folder of the token files; default: the cache")
    parser.add_argument(
        "--workers", type=int | None, default=None, help="processes that encode; default: the cores, of short texts 1"
    )
    parser.known = {**schema.types_of({"data": DataConfig}), "output": str, "workers": int}
    values = parser.instantiate_classes(parser.parse_args(arguments))
    if values.workers is not None and values.workers < 1:
        raise HvdlmError(f"--workers: got {values.workers}, expected 1 or more.")
    return values


def parse_bench(arguments: list[str]) -> tuple[Any, Config]:
    """Return the options of ``bench`` and the configuration of the run whose transport it measures."""
    description = "Measure latency and bandwidth of every collective, next to raw MPI. Start it with a launcher."
    parser = _parser("bench", description, "--framework, --backend and options with a dot are those of train.")
    parser.add_argument("--smallest", type=int, default=1024, help="bytes of a rank")
    parser.add_argument("--largest", type=int, default=2**28, help="bytes of a rank")
    parser.add_argument("--collectives", type=list[str], default=None, help="some of them, for example [all_reduce]")
    parser.add_argument("--output", type=str, default="bench.json", help="file to write; the plot lies beside it")
    values, rest = _parse_known(parser, arguments)
    return values, _parse("bench", description, rest)


def parse_supervise(arguments: list[str]) -> tuple[Any, list[str]]:
    """Return the settings (``supervised.Settings``) and the command after ``--``."""
    from hvdlm_launchers.settings import Settings

    description = (
        "python -m hvdlm supervise [OPTIONS] -- COMMAND...: start a run (COMMAND ends with the options of python -m "
        "hvdlm train), and start it again from its newest checkpoint where it fails."
    )
    parser = _parser("supervise", description, "Exit codes: 0 done, 1 given up, 2 refused, 75 stopped and saved.")
    parser.add_class_arguments(Settings)
    parser.known = schema.types_of({"": Settings})
    own = arguments.index("--") if "--" in arguments else len(arguments)
    return Settings(**parser.parse_args(arguments[:own]).as_dict()), arguments[own + 1 :]


def parse_launch(description: str, arguments: list[str]) -> tuple[Any, Any, list[str] | None]:
    """Return ``output`` and ``submit``, the job (``scheduling.job.Job``), and the options of train after ``--``.

    None in place of the latter: there are none, or another command than train stands there.
    """
    from hvdlm_launchers.schedulers.job import Job
    from hvdlm_launchers.settings import train_arguments

    description = f"python -m hvdlm launch [OPTIONS] -- train [OPTIONS of train]: {description}."
    parser = _parser("launch", description)
    parser.add_class_arguments(Job)
    parser.add_argument("--output", type=str, default=None, help="file to write; default: standard output")
    parser.add_argument("--submit", action="store_true", help="submit the job: sbatch, qsub, bsub or kubectl")
    parser.known = {**schema.types_of({"": Job}), "output": str, "submit": bool}
    own = arguments.index("--") if "--" in arguments else len(arguments)
    values = parser.parse_args(arguments[:own])
    job = Job(**{name: values[name] for name in Job.__dataclass_fields__})
    return values, job, train_arguments(["-m", "hvdlm", *arguments[own + 1 :]]) if own < len(arguments) else None


def parse_doctor(description: str, arguments: list[str]) -> Any:
    """Return ``run``: the folder of a run that hung or died; None: this machine is examined."""
    parser = _parser("doctor", description)
    parser.add_argument("--run", type=str, default=None, help="a run that hung or died: tell why from what it left")
    return parser.parse_args(arguments)


def parse_none(command: str, description: str, arguments: list[str]) -> None:
    """Accept nothing but --help."""
    _parser(command, description).parse_args(arguments)
