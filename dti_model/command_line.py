"""The command line's parser: YAML read strictly, `~` expanded in every path, and every error in one line that names the setting and its
bounds."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, Namespace, get_loader, set_loader

from dti_model.bounds import GROUPS, RULES, must_be, shown
from dti_model.strict_yaml import StrictYAMLError, check_yaml, read_settings

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


def _load(text: str) -> Any:
    check_yaml(text)
    try:
        return get_loader("yaml")(text)
    except (ValueError, yaml.YAMLError) as error:
        raise StrictYAMLError(" ".join(str(error).split())) from error


class Parser(ArgumentParser):
    """jsonargparse's, with strict YAML, and errors of one line instead of a page of usage.

    Whatever has the type Path may begin with `~`, which shells leave as it is in `--out=~/x`, and YAML files always.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        set_loader(_MODE, _load, (StrictYAMLError,))
        super().__init__(*args, **{"parser_mode": _MODE, **kwargs})

    def parse_args(self, *args: Any, **kwargs: Any) -> Namespace:  # type: ignore[override]
        """As jsonargparse's."""
        parsed = super().parse_args(*args, **kwargs)
        for name, value in list(parsed.items()):
            if isinstance(value, Path):
                parsed[name] = Path(os.path.expanduser(value))
        return parsed

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print one line and exit with status 2."""
        if not self.exit_on_error:
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        prog = parser.prog.replace(" [options]", "")
        print(f"{prog}: error: {in_one_line(message)} ({prog} --help lists what there is)", file=sys.stderr)
        sys.exit(2)


def in_one_line(message: str) -> str:
    """An error of jsonargparse's with the bounds of the setting that it is about."""
    match = re.match(r'(?:.*?)Parser key "([\w.]+)":', message, re.DOTALL)
    found = re.findall(r"(?:Got value|Given value): ?(.*)", message)
    if match and match[1] in RULES and found:
        value = {"None": "null", "True": "true", "False": "false"}.get(found[-1], found[-1])
        return must_be(match[1], value[:100] or "an empty value")
    if match and match[1] in RULES and "integer string conversion" in message:
        return must_be(match[1], "a number of thousands of digits")
    return " ".join(message.split())[:1000]


def check_text(arguments: Sequence[str]) -> None:
    """Refuse names in other bytes than UTF-8, which neither settings nor results could hold.

    Raises:
        ValueError: naming the argument.
    """
    for word in arguments:
        try:
            word.encode()
        except UnicodeEncodeError:
            raise ValueError(
                f"the argument {word!a} is not UTF-8: rename the file, or make a link to it whose name is (ln -s)"
            ) from None


def check_files(arguments: Sequence[str]) -> None:
    """Read the YAML files that are named on the command line, for errors that name them.

    Raises:
        ValueError: one is missing, a folder, empty, no YAML, no mapping, or says something twice.
    """
    for flag, value in zip(arguments, [*arguments[1:], ""]):
        name, equals, rest = flag.partition("=")
        if name not in _FILE_FLAGS:
            continue
        text = rest if equals else value
        path = Path(os.path.expanduser(text))
        try:
            if any(sign in text for sign in "{[:\n") and not path.exists():
                continue  # YAML itself
            read_settings(path)
        except (ValueError, OSError) as error:
            raise ValueError(f"{name}: {' '.join(str(error).split())[:500]}") from None


def check_numbers(arguments: Sequence[str]) -> None:
    """Refuse numbers to base 60 in flags: YAML 1.1 reads 1:30 as 90.

    Raises:
        ValueError: naming the flag.
    """
    for flag, value in zip(arguments, [*arguments[1:], ""]):
        name, equals, rest = flag.partition("=")
        text = rest if equals else value
        if not name.startswith("--") or not _BASE_60.fullmatch(text):
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
            raise ValueError(f"{group} must be a mapping of settings, name: value, got {shown(value)}")
