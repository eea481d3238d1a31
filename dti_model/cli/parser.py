"""The parser of each command: YAML is read strictly, `~` expands in every path, and an error is one line that names the option, its
bounds and the nearest name. Options have dashes; their older spelling with underscores is accepted too."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace, get_loader, set_loader

from dti_model.config import (
    GROUPS,
    NEWER,
    OLDER,
    RULES,
    StrictYAMLError,
    as_yaml,
    both_given,
    check_yaml,
    must_be,
    newer_spelling,
    newer_value,
    read_settings,
    with_underscores,
)
from dti_model.error_lines import did_you_mean, joined

_MODE = "strict yaml"
# Options whose values may be names of YAML files, and what the names of settings in them lack; None: it holds no settings.
_FILE_OPTIONS = {"--config": "", "--grid": None, **{f"--{group}": f"{group}." for group in GROUPS}}
_BASE_60 = re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?")
# Types in messages of jsonargparse, and in words.
_TYPES = {"int": "an integer", "float": "a number", "bool": "true or false"}
# Of options that are no settings of a run and have a structure.
_STRUCTURES = {
    "grid": "a mapping from settings to lists of values, such as '{k: [5, 50]}'",
    "seeds": "a list of integers, such as '[0, 1, 2]'",
}
_UNKNOWN = re.compile(
    r"(?:unrecognized arguments: |[Oo]ption ')(?P<word>[^\s=']+)|Group '(?P<group>[\w.]+)' does not accept option '(?P<key>[\w.-]+)'"
)


def number(text: str | float) -> float:
    """A type of options like float, but NaN and infinities pass: the data layer refuses them with the option's bounds."""
    return float(text)


_METAVARS: Mapping[Any, str] = {
    **{int: "N", Path: "FOLDER"},
    **dict.fromkeys((float, float | None, number), "NUMBER"),
}


def _load(text: str) -> Any:
    check_yaml(text)
    try:
        return _newer(with_underscores(get_loader("yaml")(text)))
    except (ValueError, yaml.YAMLError) as error:
        raise StrictYAMLError(" ".join(str(error).split())) from error


def _newer(value: Any) -> Any:
    """Settings of a file, or of a group, in their newer spelling; anything else as it is."""
    if not isinstance(value, dict) or not value:
        return value
    group = OLDER[: OLDER.index(".") + 1]
    is_group = {group + str(name) for name in value} <= {OLDER, *RULES}
    return newer_spelling(value, group if is_group else "")


class _Help(DefaultHelpFormatter):
    """Help without the types of Python: metavars say what an option takes."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        is_format = "\n" in text  # of a file: its lines stay
        return text if is_format else super()._fill_text(text, width, indent)

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        if action.required:
            return f"{text} (required)"
        if action.nargs == 0 or default in (None, "", argparse.SUPPRESS):
            return text
        if isinstance(default, (list, tuple)):
            return f"{text} (default: [{', '.join(map(str, default))}])"
        return f"{text} (default: {str(default).lower() if isinstance(default, bool) else default})"


class Parser(ArgumentParser):
    """jsonargparse's, with strict YAML, and errors of one line instead of a page of usage.

    Whatever has the type Path may begin with `~`, which shells leave as it is in `--out=~/x`, and YAML files always. Options are
    written in full, so that the checks that know an option by its name see every use of it.
    """

    def __init__(self, **kwargs: Any) -> None:
        set_loader(_MODE, _load, (StrictYAMLError,))
        ours = {"parser_mode": _MODE, "allow_abbrev": False, "formatter_class": _Help}
        super().__init__(**{**ours, "print_config": "--print-config", **kwargs})

    def finish(self, prog: str) -> None:
        """Name the command, and give its options dashes and metavars; fields of dataclasses have underscores."""
        self.prog = prog
        needed, known = [], self._option_string_actions
        for name in list(known):
            known[_dashed(name)] = known.pop(name)
        for action in self._actions:
            action.option_strings = [_dashed(name) for name in action.option_strings if name[-1] != "+"]
            kind = getattr(action, "_typehint", action.type)
            action.metavar = action.metavar or _METAVARS.get(kind)
            if action.metavar == "CONFIG":  # a group of settings
                action.metavar, action.help = "FILE", "YAML file with these settings"
            elif "--print-config" in action.option_strings:
                action.help = "print the settings as YAML and exit"
            elif isinstance(action.metavar, str) and action.metavar.startswith("{"):
                action.metavar = action.metavar.strip("{}").replace(",", "|")
            if action.required:
                needed += [*action.option_strings[:1], str(action.metavar or action.dest)]
        self.usage = " ".join([prog, *needed, "[options]"])

    def parse_args(self, args: Sequence[str], **kwargs: Any) -> Namespace:  # type: ignore[override]
        """As jsonargparse's, after checks of the words themselves, which have dashes and whose characters are checked.

        Raises:
            ValueError: from a check; the message names the option.
        """
        _check_once(args)
        if f"--{NEWER}" in self._option_string_actions:
            args = with_newer_option(args)
        _check_files(args)
        self._check_numbers(args)
        parsed = super().parse_args(args, **kwargs)
        empty = {name for name, value in options_of(args) if not value}
        for action in self._actions:
            path = parsed.get(action.dest)
            if isinstance(path, Path):
                if empty & set(action.option_strings):
                    self.error(f"{action.option_strings[0]} is empty: name a file or a folder")
                parsed[action.dest] = Path(os.path.expanduser(path))
        _check_groups(parsed)
        return parsed

    def _check_numbers(self, words: Sequence[str]) -> None:
        """Refuse numbers to base 60 in options: YAML 1.1 reads 1:30 as 90."""
        for name, text in options_of(words):
            action = self._option_string_actions.get(name)
            if action is None or not _BASE_60.fullmatch(text):
                continue
            if action.dest in RULES and not RULES[action.dest].accepts(text):
                raise ValueError(must_be(action.dest, text))
            if action.metavar in ("N", "NUMBER"):
                raise ValueError(f"{name} must be a number, got {text}")

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print one line and exit with status 2."""
        if not self.exit_on_error:
            super().error(message, ex)
        refuse(self.prog, name_options(self._told(message), self.args))

    def _told(self, message: str) -> str:
        """An error of jsonargparse's in words of the options."""
        if match := re.match(r"the following arguments are required: (.*)", message):
            return f"{', '.join(map(self._option, match[1].split(', ')))} must be given"
        if match := _UNKNOWN.search(message):
            word = match["word"] or f"{match['group']}.{match['key']}"
            return message + did_you_mean(word, self._names())
        if match := re.match(r"argument (\S+): invalid number value: '(.*)'", message):
            return f"{match[1]} must be a number, got {match[2][:100] or 'an empty value'}"
        return self._about_value(message)

    def _about_value(self, message: str) -> str:
        """A value that an option cannot have: with the bounds of the setting, or the words of its type."""
        keys = re.findall(r'Parser key "([\w.]+)":', message)
        found = re.findall(r"(?:Got value|Given value): ?(.*)", message)
        if keys and keys[-1] in RULES and "integer string conversion" in message:
            return must_be(keys[-1], "a number of thousands of digits")
        if not keys or not found:
            return message
        value = {"None": "null", "True": "true", "False": "false"}.get(found[-1], found[-1])[:100]
        value = value or "an empty value"
        if keys[-1] in RULES:
            return must_be(keys[-1], value)
        of_type = re.search(r"Expected a <class '(\w+)'>", message)
        must = _STRUCTURES.get(keys[-1]) or (of_type and _TYPES.get(of_type[1]))
        if literal := re.search(r"Expected a typing\.Literal\[(.*?)\]", message):
            names = [name.strip("'") for name in literal[1].split(", ")]
            must, value = " or ".join(names), value + did_you_mean(value, names)
        return f"{self._option(keys[-1])} must be {must}, got {value}" if must else message

    def _option(self, dest: str) -> str:
        return next((x.option_strings[0] for x in self._actions if x.dest == dest and x.option_strings), dest)

    def _names(self) -> list[str]:
        """Everything that somebody may have meant."""
        actions = [action for action in self._actions if action.help != argparse.SUPPRESS]
        return [*(name for x in actions for name in x.option_strings), *(x.dest for x in actions)]


def choose(
    parser: argparse.ArgumentParser, names: Mapping[str, str], metavar: str, words: Sequence[str]
) -> tuple[str, Sequence[str]]:
    """The first word, which is one of some names, each with a line of help, and the other words. Exits with status 0 after help or
    version, with status 2 after a line that says what is wrong."""
    parser.usage = f"{parser.prog} {metavar} [options]"
    listed = "".join(f"\n  {name:16}{text}" for name, text in names.items())
    parser.epilog, parser.formatter_class = (
        f"{metavar.lower()}s:{listed}",
        argparse.RawDescriptionHelpFormatter,
    )
    first, known = next(iter(words), ""), parser._option_string_actions
    if first in names:
        return first, words[1:]
    if first in known:
        parser.parse_args([first])
    if not words:
        refuse(parser.prog, f"one of {', '.join(names)} must be given")
    if first.startswith("-"):
        refuse(parser.prog, f"unrecognized arguments: {first}{did_you_mean(first, known)}")
    must = f"{metavar} must be one of {', '.join(names)}"
    refuse(parser.prog, f"{must}, got {first}{did_you_mean(first, names)}")


def refuse(prog: str, text: str) -> NoReturn:
    """Print one line about wrong words and exit with status 2."""
    print(f"{prog}: error: {joined(text)} ({prog} --help lists what there is)", file=sys.stderr)
    sys.exit(2)


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def with_dashes(words: Sequence[str]) -> list[str]:
    """The words of a command line, options with dashes; behind `--` there are none."""
    end = words.index("--") if "--" in words else len(words)
    dashed = [
        "".join([_dashed(name), *rest]) if name.startswith("--") and " " not in name else word
        for word in words[:end]
        for name, *rest in [word.partition("=")]
    ]
    return [*dashed, *words[end:]]


def with_newer_option(words: Sequence[str]) -> list[str]:
    """The words of a command line, with `--optim.precision` in the place of its older spelling.

    Raises:
        ValueError: both are there, or the older one has a value that it never had.
    """
    older, newer = f"--{OLDER}", f"--{NEWER}"
    names = [name for name, _ in options_of(words)]
    if older not in names:
        return list(words)
    if newer in names:
        raise ValueError(both_given(older, newer))
    result, left = [], iter(words)
    for word in left:
        name, equals, value = word.partition("=")
        result += [newer, newer_value(value if equals else next(left, ""))] if name == older else [word]
    return result


def options_of(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Options by their names, each with what is behind its `=`, else with the word that follows."""
    for word, following in zip(words, [*words[1:], ""]):
        name, equals, rest = word.partition("=")
        if name.startswith("--") and " " not in name:
            yield name, rest if equals else following


def _instead(option: str, _: re.Match[str]) -> str:
    return option  # as it is: as a template, its backslashes would be groups


def name_options(text: str, words: Sequence[str]) -> str:
    """A message that names settings by their keys, with the options that `words` give instead: of the keys of one word those that
    must be something."""
    for option, _ in options_of(words):
        key = option.removeprefix("--").replace("-", "_")
        after = r"(?![\w/-]|\.\w)" if "_" in key or "." in key else r"(?= must be )"
        if key:
            text = re.sub(rf"(?<![\w./-]){re.escape(key)}{after}", partial(_instead, option), text)
    return text


def check_characters(words: Sequence[str]) -> None:
    """No file that a command writes could hold them, nor could a message show them."""
    for before, word in zip(["", *words], words):
        name, equals, rest = word.partition("=")
        text = (
            f"{name} {rest!a:.100}" if equals and name.startswith("--") else f"{before} {word!a:.100}".strip()
        )
        try:
            word.encode()
        except UnicodeEncodeError:
            encoding = sys.getfilesystemencoding()
            raise ValueError(
                f"{text} holds bytes that are no {encoding}: give it, or a link to it, another name"
            ) from None
        if "\0" in word:
            raise ValueError(f"{text} holds a NUL character, which no file can have in its name")


def _check_once(words: Sequence[str]) -> None:
    """Of two values for one option the last would win without a word; files of settings are laid over each other, and lists appended to."""
    seen: set[str] = set()
    for name, _ in options_of(words):
        if name in seen and name != "--config" and not name.endswith("+"):
            raise ValueError(f"{name} is given twice: keep one of them")
        seen.add(name)


def _check_files(words: Sequence[str]) -> None:
    """Read the YAML files that are named on the command line, for errors that name them."""
    for name, text in options_of(words):
        if name not in _FILE_OPTIONS:
            continue
        path = Path(os.path.expanduser(text))
        try:
            if any(sign in text for sign in "{[:\n") and not path.exists():
                continue  # YAML itself
            read_settings(path, _FILE_OPTIONS[name])
        except (ValueError, OSError) as error:
            raise ValueError(f"{name}: {error}") from None


def _check_groups(options: Namespace) -> None:
    """Every group of settings is one: a file may say `optim: 5`."""
    for group in GROUPS:
        value = options.get(group)
        if group in options and not isinstance(value, (Namespace, dict)):
            raise ValueError(f"{group} must be a mapping of settings, name: value, got {as_yaml(value)}")
