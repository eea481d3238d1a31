"""The command line's parser: YAML read strictly, `~` expanded in every path, and every error in one line that names the setting and its
bounds."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, Namespace, get_loader, set_loader

from dti_model.config import GROUPS, RULES, StrictYAMLError, as_yaml, check_yaml, must_be, read_settings
from dti_model.error_lines import did_you_mean, joined

_MODE = "strict yaml"
# Flags whose values may be names of YAML files.
_FILE_FLAGS = ("--config", "--grid", *(f"--{group}" for group in GROUPS))
# Flags of numbers that are no settings of a run.
_NUMBER_FLAGS = (
    "--token-budget",
    "--max-chars",
    "--min-context",
    "--min-item-count",
    "--vocab-size",
    "--threshold",
    "--max-rejected",
)
_BASE_60 = re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?")
# What jsonargparse calls types, and people.
_TYPES = {
    "<class 'int'>": "an integer",
    "<class 'float'>": "a number",
    "<class 'bool'>": "true or false",
}
# Of options that are no settings of a run and have a structure.
_STRUCTURES = {
    "grid": "a mapping from settings to lists of values, such as '{k: [5, 50]}'",
    "seeds": "a list of integers, such as '[0, 1, 2]'",
}
_UNKNOWN = re.compile(
    r"(?:unrecognized arguments: |invalid choice: '|[Oo]ption ')(?P<word>[^\s=']{3,})|Group '(?P<group>[\w.]+)' does not accept option "
    r"'(?P<key>[\w.]+)'"
)


def _load(text: str) -> Any:
    check_yaml(text)
    try:
        return get_loader("yaml")(text)
    except (ValueError, yaml.YAMLError) as error:
        raise StrictYAMLError(" ".join(str(error).split())) from error


class Parser(ArgumentParser):
    """jsonargparse's, with strict YAML, and errors of one line instead of a page of usage.

    Whatever has the type Path may begin with `~`, which shells leave as it is in `--out=~/x`, and YAML files always. Options are
    written in full, so that what is checked of them by name is checked of every spelling.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        set_loader(_MODE, _load, (StrictYAMLError,))
        super().__init__(*args, **{"parser_mode": _MODE, "allow_abbrev": False, **kwargs})

    def parse_args(self, *args: Any, **kwargs: Any) -> Namespace:  # type: ignore[override]
        """As jsonargparse's."""
        parsed = super().parse_args(*args, **kwargs)
        empty = {name for name, value in options_of(self.args) if not value}
        for action in self._actions:
            if isinstance(parsed.get(action.dest), Path) and empty & set(action.option_strings):
                self.error(f"{action.option_strings[0]} is empty: name a file or a folder")
        for name, value in list(parsed.items()):
            if isinstance(value, Path):
                parsed[name] = Path(os.path.expanduser(value))
        return parsed

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print one line and exit with status 2."""
        if not self.exit_on_error:
            super().error(message, ex)
        parser, text = _told(getattr(ex, "subcommand_parser", None) or self, message)
        prog = parser.prog.replace(" [options]", "")
        print(f"{prog}: error: {joined(text)} ({prog} --help lists what there is)", file=sys.stderr)
        sys.exit(2)


def _told(parser: ArgumentParser, message: str) -> tuple[ArgumentParser, str]:
    """The parser that an error of jsonargparse's is about, and the error in words of its options."""
    if match := re.match(r"the following arguments are required: (.*)", message):
        places = [_place(parser, name) for name in match[1].split(", ")]
        return places[0][0], f"{', '.join(_option(*place) for place in places)} must be given"
    if match := re.match(r'expected "([\w.-]+)" to be one of', message):
        parser, dest = _place(parser, match[1])
        choices = next(action.choices or () for action in parser._actions if action.dest == dest)
        return parser, f"one of {', '.join(choices)} must be given"
    if match := _UNKNOWN.search(message):
        word = match["word"] or f"{match['group']}.{match['key']}"
        return parser, message + did_you_mean(word, _names(parser))
    return parser, _about_value(parser, message)


def _about_value(parser: ArgumentParser, message: str) -> str:
    """A value that an option cannot have: with the bounds of the setting, or the words of its type."""
    keys = re.findall(r'Parser key "([\w.]+)":', message)
    found = re.findall(r"(?:Got value|Given value): ?(.*)", message)
    if keys and keys[-1] in RULES and "integer string conversion" in message:
        return must_be(keys[-1], "a number of thousands of digits")
    if not keys or not found:
        return message
    value = {"None": "null", "True": "true", "False": "false"}.get(found[-1], found[-1])[:100]
    if keys[-1] in RULES:
        return must_be(keys[-1], value or "an empty value")
    of_type = (words for name, words in _TYPES.items() if f"Expected a {name}" in message)
    must = _STRUCTURES.get(keys[-1]) or next(of_type, None)
    if literal := re.search(r"Expected a typing\.Literal\[(.*?)\]", message):
        must = " or ".join(name.strip("'") for name in literal[1].split(", "))
    return f"{_option(parser, keys[-1])} must be {must}, got {value or 'an empty value'}" if must else message


def _place(parser: ArgumentParser, name: str) -> tuple[ArgumentParser, str]:
    """The parser of the subcommand that `prepare.custom.text` belongs to, and the name there."""
    first, _, rest = name.partition(".")
    below = next((a.choices for a in parser._actions if isinstance(a, argparse._SubParsersAction)), {})
    return _place(below[first], rest) if rest and first in below else (parser, name)


def _option(parser: ArgumentParser, dest: str) -> str:
    action = next((action for action in parser._actions if action.dest == dest), None)
    return (action.option_strings or [dest])[0] if action is not None else dest


def _names(parser: ArgumentParser) -> list[str]:
    """Everything that somebody may have meant."""
    actions = [action for action in parser._actions if action.help != argparse.SUPPRESS]
    choices = [str(choice) for action in actions for choice in action.choices or ()]
    return [*(name for a in actions for name in a.option_strings), *(a.dest for a in actions), *choices]


def options_of(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Options by their names, each with what is behind its `=`, else with the word that follows."""
    for word, following in zip(arguments, [*arguments[1:], ""]):
        name, equals, rest = word.partition("=")
        if name.startswith("--") and " " not in name:
            yield name, rest if equals else following


def check_arguments(arguments: Sequence[str]) -> None:
    """What is checked of the words themselves, before they are parsed.

    Raises:
        ValueError: naming the option.
    """
    _check_characters(arguments)
    _check_once(arguments)
    _check_files(arguments)
    _check_numbers(arguments)


def _check_characters(arguments: Sequence[str]) -> None:
    """No file that a command writes could hold them, nor could a message show them."""
    for before, word in zip(["", *arguments], arguments):
        try:
            word.encode()
        except UnicodeEncodeError:
            encoding = sys.getfilesystemencoding()
            raise ValueError(
                f"{_shown_word(before, word)} holds bytes that are no {encoding}: give it, or a link to it, another name"
            ) from None
        if "\0" in word:
            raise ValueError(
                f"{_shown_word(before, word)} holds a NUL character, which no file can have in its name"
            )


def _shown_word(before: str, word: str) -> str:
    name, equals, rest = word.partition("=")
    return f"{name} {rest!a:.100}" if equals and word.startswith("--") else f"{before} {word!a:.100}".strip()


def _check_once(arguments: Sequence[str]) -> None:
    """Of two values for one option the last would win without a word; files of settings are laid over each other, and lists appended to."""
    seen: set[str] = set()
    for name, _ in options_of(arguments):
        if name in seen and name != "--config" and not name.endswith("+"):
            raise ValueError(f"{name} is given twice: keep one of them")
        seen.add(name)


def _check_files(arguments: Sequence[str]) -> None:
    """Read the YAML files that are named on the command line, for errors that name them."""
    for name, text in options_of(arguments):
        if name not in _FILE_FLAGS:
            continue
        path = Path(os.path.expanduser(text))
        try:
            if any(sign in text for sign in "{[:\n") and not path.exists():
                continue  # YAML itself
            read_settings(path)
        except (ValueError, OSError) as error:
            raise ValueError(f"{name}: {error}") from None


def _check_numbers(arguments: Sequence[str]) -> None:
    """Refuse numbers to base 60 in flags: YAML 1.1 reads 1:30 as 90."""
    for name, text in options_of(arguments):
        if not _BASE_60.fullmatch(text):
            continue
        setting = name.removeprefix("--")
        if setting in RULES and not RULES[setting].accepts(text):
            raise ValueError(must_be(setting, text))
        if name in _NUMBER_FLAGS:
            raise ValueError(f"{name} must be a number, got {text}")


def check_groups(options: Namespace) -> None:
    """Every group of settings is one: a file may say `optim: 5`.

    Raises:
        ValueError: naming the group.
    """
    for group in GROUPS:
        value = options.get(group)
        if group in options and not isinstance(value, (Namespace, dict)):
            raise ValueError(f"{group} must be a mapping of settings, name: value, got {as_yaml(value)}")
