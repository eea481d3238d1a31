"""Strict YAML: a key that stands twice, an alias, a tag, a number to base 60 or endless nesting is an error with its line.

PyYAML keeps the last of two equal keys, so that a block of settings would vanish silently; and a few lines of aliases of aliases
("billion laughs") stand for more values than memory holds. Keys may have dashes in place of underscores.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from dti_model.config.bounds import GROUPS, RULES, as_yaml, must_be
from dti_model.config.older import newer_spelling
from dti_model.files import opened

# A file of settings has a few kilobytes and five levels.
MOST_CHARACTERS, MOST_LEVELS = 2**20, 50
_TAG = "tag:yaml.org,2002:"
_OCTAL = re.compile(r"[-+]?0[0-7_]+")
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class StrictYAMLError(yaml.YAMLError, ValueError):  # type: ignore[misc]  # PyYAML has no types
    """A text is no YAML, or says something twice; the message names the line."""


def check_yaml(text: str) -> None:
    """Refuse text that `yaml.load` would take silently.

    Raises:
        StrictYAMLError: no YAML, a key that stands twice, an alias, more than 50 levels, or more than 1 MiB.
    """
    if len(text) > MOST_CHARACTERS:
        raise StrictYAMLError(f"has {len(text):,} characters: settings have at most {MOST_CHARACTERS:,}")
    try:
        _check_events(text)
        for node in yaml.compose_all(text, Loader=_LOADER):
            _check_node(node, "", set())
    except StrictYAMLError:
        raise
    except yaml.YAMLError as error:
        raise StrictYAMLError(_in_one_line(error)) from error


def _check_events(text: str) -> None:
    level = 0
    for event in yaml.parse(text, Loader=_LOADER):
        if isinstance(event, yaml.AliasEvent):
            raise StrictYAMLError(
                f"line {event.start_mark.line + 1}: the alias *{event.anchor} is not accepted: write the value itself"
            )
        if getattr(event, "tag", None) is not None:
            raise StrictYAMLError(
                f"line {event.start_mark.line + 1}: the tag {event.tag} is not accepted: write plain values"
            )
        level += isinstance(event, yaml.CollectionStartEvent)
        level -= isinstance(event, yaml.CollectionEndEvent)
        if level > MOST_LEVELS:
            raise StrictYAMLError(f"line {event.start_mark.line + 1}: more than {MOST_LEVELS} levels")


def _check_number(node: yaml.ScalarNode) -> None:
    """YAML 1.1 reads 1:30 as 90 and 010 as 8."""
    line = node.start_mark.line + 1
    if node.tag == f"{_TAG}int" and len(node.value) > 100:
        # Python reads no integer of more than 4,300 digits, and says so without a place.
        raise StrictYAMLError(f"line {line}: a number of {len(node.value):,} digits")
    if node.tag in (f"{_TAG}int", f"{_TAG}float") and ":" in node.value:
        raise StrictYAMLError(
            f"line {line}: {node.value} is a number to base 60 in YAML: write the number itself, or a text in quotes"
        )
    if node.tag == f"{_TAG}int" and _OCTAL.fullmatch(node.value):
        raise StrictYAMLError(
            f"line {line}: {node.value} is a number to base 8 in YAML: write it without the first 0"
        )


def _check_node(node: yaml.Node | None, path: str, seen: set[str]) -> None:
    """Keys and numbers. A setting stands once, in one of its spellings: `optim.clip: 1` or `optim: {clip: 1}`, with dashes or
    underscores; `seen` holds the paths of those before `node`."""
    if isinstance(node, yaml.ScalarNode):
        _check_number(node)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _check_node(item, "", set())
    elif isinstance(node, yaml.MappingNode):
        names: set[str] = set()
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise StrictYAMLError(f"line {line}: a key must be a name")
            if key.tag == f"{_TAG}merge":
                raise StrictYAMLError(
                    f"line {line}: the merge key << is not accepted: write the settings themselves"
                )
            name = key.value.replace("-", "_")
            whole = f"{path}.{name}" if path else name
            if name in names or whole in seen:
                twice = key.value if name in names else whole
                raise StrictYAMLError(f"line {line}: {twice!r} stands there twice: keep one of them")
            names.add(name)
            if not (isinstance(value, yaml.MappingNode) and value.value):
                seen.add(whole)
            _check_node(value, whole, seen)


def _in_one_line(error: yaml.YAMLError) -> str:
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if mark is not None and problem:
        return f"line {mark.line + 1}: {problem}"
    return " ".join(str(error).split())


def read_settings(path: Path, group: str | None = None) -> dict[str, Any]:
    """The mapping in a YAML file.

    Args:
        path: the file.
        group: what the names of its settings begin with, such as "optim."; None: its values are no settings and not checked.

    Raises:
        ValueError: there is no such file, it is no mapping from names to values, or a value is out of bounds or of another type; the
            message names it.
        OSError: it cannot be read.
    """
    settings = parse_settings(read_text(path), path)
    if group is not None:
        try:
            settings = newer_spelling(settings, group)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        _check_values(settings, path, group)
    return settings


def _check_values(settings: Mapping[str, Any], path: Path, group: str) -> None:
    """Bounds and types, here because nobody knows the file later; names that are no settings are for the parser."""
    for name, value in settings.items():
        whole = group + name
        if whole in GROUPS and isinstance(value, Mapping):
            _check_values(value, path, f"{whole}.")
        elif whole in RULES and not any(map(RULES[whole].accepts, _readings(value))):
            raise ValueError(f"{path}: {must_be(whole, as_yaml(value))}")


def _readings(value: Any) -> Iterator[Any]:
    """A value, and what the parser makes of a text where a setting is none: '3' in quotes, or 1e-3, a text in YAML 1.1."""
    yield value
    if isinstance(value, str):
        with suppress(ValueError, yaml.YAMLError):
            yield yaml.load(value, Loader=_LOADER)
        with suppress(ValueError):
            yield float(value)


def read_text(path: Path) -> str:
    """A file's text.

    Raises:
        ValueError: no such file, no regular one, or not UTF-8.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name the YAML file in it")
    if not path.exists():
        raise ValueError(f"there is no file {path}")
    if not path.is_file():
        raise ValueError(f"{path} is no regular file: settings are read from one")
    with opened(path) as file:
        content = file.read(MOST_CHARACTERS * 4 + 1)
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not a text file in UTF-8 (byte {error.start}): settings are YAML"
        ) from None


def parse_settings(text: str, path: Path) -> dict[str, Any]:
    """The mapping in the text of `path`; errors as `read_settings`."""
    try:
        check_yaml(text)
        value = yaml.load(text, Loader=_LOADER)
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from None
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        problem = "is empty" if value is None else "is no mapping"
        raise ValueError(f"{path} {problem}: it must hold settings, a line `name: value` each")
    settings: dict[str, Any] = with_underscores(value)
    return settings


def with_underscores(value: Any) -> Any:
    """A value of YAML whose keys have underscores in place of dashes, as the fields of settings have."""
    if isinstance(value, dict):
        return {str(name).replace("-", "_"): with_underscores(item) for name, item in value.items()}
    return [with_underscores(item) for item in value] if isinstance(value, list) else value
