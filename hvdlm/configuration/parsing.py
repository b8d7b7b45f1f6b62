"""Parsing of options and YAML files into the dataclasses of ``config.py``, on jsonargparse.

Its errors become one sentence that says what to write instead. A configuration file becomes options in its place on the
command line, so that it is read once and later options override it.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jsonargparse

from hvdlm.config import SECTION_CLASSES, Config
from hvdlm.configuration import schema
from hvdlm.errors import HvdlmError, nearest
from hvdlm.io import safe_yaml, text_decoding, untrusted_input

_SENTENCE = 1000  # characters of an error: the value it quotes may be long
_LENGTHS = ("--train.steps", "--train.tokens", "--train.epochs")  # of a run: the one that is given last counts
_CONFIG_LIMIT = 2**18  # bytes: a larger file is no configuration


class Parser(jsonargparse.ArgumentParser):
    """A parser whose errors are HvdlmErrors; ``known`` maps every option to its type."""

    known: Mapping[str, Any] = {}
    _declared: Mapping[str, Any] = {}  # type by name of the options of add_argument: actions don't tell theirs

    def add_argument(self, *names: Any, **options: Any) -> Any:
        """Add an option, and note its type."""
        self._declared = {**getattr(self, "_declared", {}), str(names[-1]).lstrip("-"): options.get("type")}
        return super().add_argument(*names, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise the message as one sentence."""
        raise HvdlmError(untrusted_input.shown(self.sentence(str(message)), _SENTENCE)) from ex

    def parse_args(self, args: Sequence[str], *rest: Any, **options: Any) -> Any:  # type: ignore[override]
        """Parse ``args``, in which 1e3 is a whole number, too."""
        return super().parse_args(schema.whole_numbers(args, self._types()), *rest, **options)

    def _types(self) -> Mapping[str, Any]:
        names = [action.dest for action in self._actions if action.dest not in ("help", "print_config")]
        return self.known or {name: self._declared.get(name) for name in names}

    def sentence(self, message: str) -> str:
        """Return jsonargparse's message as: what is wrong, where, what to do."""
        known = self._types()
        unknown = re.search(r"[Uu]nrecognized arguments?: +(-*)([\w.\-]+)", message) or re.search(
            r"()(?:No action for key|[Kk]ey|Group|Option) ['\"]([\w.]+)['\"]", message
        )
        section = re.search(r'(?:argument --|key "|--)(\w+)(?![\w.])', message)
        name = section[1] if section else ""
        if name and name not in known and any(key.startswith(f"{name}.") for key in known):
            return f"--{name} is a section, it takes no value itself: write for example {schema.example(name, known)}."
        if unknown and unknown[2] not in known:
            if unknown[1]:
                return schema.unknown(unknown[2], known)
            return (
                f"{unknown[2]!r} belongs to no option: write --OPTION VALUE; python -m hvdlm --help all lists all "
                "options."
            )
        key = re.search(r'key ["\']([\w.]+)["\']', message) or re.search(r"argument --([\w.]+)", message)
        if not key:
            return " ".join(message.split())
        if "expected one argument" in message:
            return f"--{key[1]}: the value is missing, expected {schema.expectation(known.get(key[1]))}."
        value = re.search(r"(?:Got|Given) value:\s*(.*)\Z", message, re.S)
        return schema.wrong_value(key[1], value[1].strip() if value else "", known.get(key[1]))


def command_parser(command: str, description: str, epilog: str = "") -> Parser:
    """Return an empty parser for ``command``."""
    epilog = " ".join([epilog, "With --debug, every command shows the traceback of an error."]).strip()
    return Parser(prog=f"python -m hvdlm {command}", description=description, epilog=epilog, allow_abbrev=False)


def parse_config(arguments: list[str], command: str = "[train]") -> Config:
    """Return the configuration that ``arguments`` give; print and exit on --help and --print_config.

    Raises:
        HvdlmError: an unknown option, a wrong type, or an unreadable file.
    """
    files = {name: read_yaml(Path(name)) for name in values_of("--config", arguments)}
    plugins = plugin_options(arguments, files.values())
    parser = config_parser(command, tuple(plugins.items()))
    for name, content in files.items():
        schema.check_mapping(content, parser.known, f"--config {name}")
    expanded = list(_expand_files(arguments, files, parser.known))
    parsed = parser.instantiate_classes(parser.parse_args([*expanded, *_other_lengths(expanded)]))
    fields = [name for name in Config.__dataclass_fields__ if name != "plugin_options"]
    return Config(**{name: parsed[name] for name in fields}, plugin_options={name: parsed[name] for name in plugins})


@functools.lru_cache(maxsize=8)  # making one takes 0.05 s, and a notebook or a search reads many configurations
def config_parser(command: str, plugins: tuple[tuple[str, type], ...]) -> Parser:
    """Return the parser of all options; ``plugins``: the sections of plugins and their dataclasses."""
    description = "Train a language model, on one process or under an MPI launcher."
    if command == "plan":
        description = "Predict the memory and communication of every rank of a run with these options of train."
    parser = command_parser(command, description)
    parser.add_argument(
        "--config", action="config", help="YAML file of options; options given later override earlier ones"
    )
    parser.add_class_arguments(Config, skip={"plugin_options"})
    for section, kind in plugins:
        parser.add_class_arguments(kind, section)
    types = schema.types_of({"": Config} | dict(plugins))
    parser.known = {name: hint for name, hint in types.items() if name != "plugin_options"}
    return parser


def section_help(section: str, arguments: list[str]) -> str:
    """Return the help of one section's options, or of ``all``; ``arguments`` may name plugins and files.

    Raises:
        HvdlmError: there is no such section.
    """
    files = [read_yaml(Path(name)) for name in values_of("--config", arguments)]
    plugins = plugin_options(arguments, files)
    if section == "all":
        return config_parser("[train]", tuple(plugins.items())).format_help()
    kinds = SECTION_CLASSES | plugins
    if section not in kinds:
        raise HvdlmError(f"--help {section}: there is no such section; {nearest(section, [*kinds, 'all'])}")
    parser = Parser(prog="python -m hvdlm", usage=f"python -m hvdlm --{section}.OPTION VALUE ...")
    if section == "run":
        parser.usage = "python -m hvdlm --OPTION VALUE ..."
        parser.add_class_arguments(Config, skip={"plugin_options", *SECTION_CLASSES})
    else:
        parser.add_class_arguments(kinds[section], section)
    return parser.format_help()


def _expand_files(
    arguments: list[str], files: Mapping[str, Mapping[str, Any]], known: Mapping[str, Any]
) -> Iterator[str]:
    """Yield ``arguments`` with every ``--config FILE`` replaced by the options in the file."""
    skip = False
    for index, argument in enumerate(arguments):
        if skip:
            skip = False
            continue
        if not _is_option(argument, "--config"):
            yield argument
            continue
        value = argument.partition("=")[2]
        if not value:
            value, skip = arguments[index + 1], True
        yield from as_options(files[value], known, "")


def _other_lengths(arguments: list[str]) -> list[str]:
    """Return options that unset ``train.tokens`` and ``train.epochs`` where another length is given later."""
    last = {name: index for index, argument in enumerate(arguments) for name in _LENGTHS if _is_option(argument, name)}
    given = [name for name in sorted(last, key=last.__getitem__) if _value(arguments, last[name]) != "null"]
    return [f"{name}=null" for name in given[:-1] if name != "--train.steps"]


def _value(arguments: list[str], index: int) -> str:
    """Return the value of the option at ``index``, "" without one."""
    following = arguments[index + 1] if index + 1 < len(arguments) else ""
    return arguments[index].partition("=")[2] or following


def as_options(content: Mapping[str, Any], known: Mapping[str, Any], prefix: str) -> Iterator[str]:
    """Yield options, whose names may be dotted or nested by section, as arguments of the command line."""
    for name, value in content.items():
        key = f"{prefix}{name}"
        if key in known or not isinstance(value, Mapping):
            yield f"--{key}={value if isinstance(value, str) else json.dumps(value)}"
        else:
            yield from as_options(value, known, f"{key}.")


def _is_option(argument: str, name: str) -> bool:
    return argument.partition("=")[0].rstrip("+") == name


def values_of(name: str, arguments: list[str]) -> list[str]:
    """Return every value that the option ``name`` is given."""
    values = []
    for index, argument in enumerate(arguments):
        if _is_option(argument, name):
            values.append(_value(arguments, index))
    return values


def plugin_options(arguments: list[str], files: Iterable[Mapping[str, Any]]) -> dict[str, type]:
    """Return {section: dataclass} of the plugins and the task that the options or a file name.

    Raises:
        HvdlmError: one is not installed, does not import, or uses the name of another section.
    """
    import yaml

    names: list[str] = []
    for text in values_of("--plugins", arguments):
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            continue  # the parser reports it
        names += map(str, value) if isinstance(value, list) else [text]
    tasks = values_of("--task", arguments)
    for content in files:
        value = content.get("plugins") or []
        names += map(str, value) if isinstance(value, list) else []
        tasks += [str(content["task"])] if "task" in content else []
    if not names and not tasks:
        return {}
    from hvdlm import plugins

    plugins.require(names)
    sections: dict[str, type] = {}
    for options in plugins.load([*names, *tasks]).hook.hvdlm_options():
        for section, kind in options.items():
            if section in Config.__dataclass_fields__ or section in sections:
                raise HvdlmError(
                    f"plugins: the section {section!r} of a plugin's options is taken: leave one plugin out."
                )
            sections[section] = kind
    return sections


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file.

    Raises:
        HvdlmError: it can't be read, isn't YAML, is no mapping, or holds more than plain values.
    """
    if not str(path) or str(path) == ".":
        raise HvdlmError("--config: the value is missing, expected the path of a YAML file.")
    try:
        text = text_decoding.decode(untrusted_input.read(path, _CONFIG_LIMIT))
        content = safe_yaml.load(text, jsonargparse.get_loader("yaml"))
    except OSError as error:
        raise HvdlmError(f"--config {path}: {error.strerror}: give a readable YAML file.") from error
    except ValueError as error:
        raise HvdlmError(f"--config {path}: is no valid YAML: {untrusted_input.shown(str(error), 250)}.") from error
    if not isinstance(content, dict):
        raise HvdlmError(f"--config {path}: holds no options; write for example: model: {{layers: 6}}.")
    return content


def split_overrides(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Return (a command's own options, options of ``train``): those with a dot, --framework and --backend."""
    own: list[str] = []
    overrides: list[str] = []
    position = 0
    while position < len(arguments):
        argument = arguments[position]
        name = argument.partition("=")[0]
        target = overrides if "." in name or name in ("--framework", "--backend") else own
        takes_value = "=" not in argument and name.startswith("--") and name != "--help"
        count = 2 if takes_value else 1
        target += arguments[position : position + count]
        position += count
    return own, overrides
