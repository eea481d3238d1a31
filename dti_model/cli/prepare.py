"""`dti prepare SOURCE`: a prepared folder, from the options of its source, and the report that is printed."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from jsonargparse import Namespace

from dti_model.cli.parser import Parser, number
from dti_model.data import SOURCES, SPLIT_CODES, TEMPLATE, UNITS, Clock, Template
from dti_model.shown import one_line

DESCRIPTION = (
    "Turn a raw data set into a prepared folder: checked, split, tokenised, memory-mapped.\n"
    "`dti prepare SOURCE --help` lists the options of a source."
)

_PROTOCOL = (
    "split",
    "min_context",
    "min_item_count",
    "vocab_size",
    "title_tokens",
    "context_text",
    "timezone",
)


def make_parser(name: str) -> Parser:
    """The options that apply to a source."""
    source = SOURCES[name]
    parser = Parser(description=f"Prepare {source.title}.")
    text = "prepared folder to make; an older one there is replaced, anything else is an error"
    parser.add_argument("--out", type=Path, required=True, help=text)
    if source.raw_dir is not None:
        parser.add_argument("--raw-dir", type=Path, required=not source.is_published, help=source.raw_dir)
    if name == "amazon":
        for option, text in (
            ("--reviews", "<Category>_5.json.gz (2018), <Category>.jsonl.gz or <Category>.csv.gz (2023)"),
            ("--meta", "meta_<Category>.json.gz (2018) or meta_<Category>.jsonl.gz (2023)"),
        ):
            text += ", or unpacked; the fields tell the year"
            parser.add_argument(option, type=Path, required=True, metavar="FILE", help=text)
    if name == "custom":
        _add_custom(parser)
    if source.threshold is not None:
        text = f"a rating above it is a click; default: {source.threshold:g}"
        parser.add_argument("--threshold", type=number, help=text)
    if source.is_published:
        text = 'template of an item\'s text, of {title} and {genres}: "movie; {genres}" leaves titles out; default: "{title}; {genres}"'
        parser.add_argument("--text", type=str, metavar="TEMPLATE", help=text)
        text = "accept a part of the data set: report its counts instead of checking them"
        parser.add_argument("--subset", action="store_true", help=text)
    else:
        text = "largest share of a file's rows that may be unusable; they are listed in OUT/rejected.csv"
        parser.add_argument("--max-rejected", type=number, default=0.01, help=text)
        text = "longest value in an item text; longer ones are cut at a word"
        _add_counts(parser, name == "custom", ("--max-chars", 200, text))
    _add_texts(parser, name)
    _add_protocol(parser, source.min_item_count, name == "custom")
    return parser


def _add_custom(parser: Parser) -> None:
    for name in ("interaction", "item"):
        text = f"one row an {name}: .csv, .tsv (also .gz) or .parquet"
        parser.add_argument(f"--{name}s", type=Path, required=True, metavar="FILE", help=text)
    text = (
        "prepared folder to extend: OUT gets its rows and the new ones, by its rules and with its tokenizer"
    )
    parser.add_argument("--extend", type=Path, help=text)
    parser.add_argument(
        "--text",
        type=str,
        metavar="TEMPLATE",
        help='template of an item\'s text, columns in braces: "{title}; {genres}"; the first one is the title, and none may be '
        'called text, since {"text": ...} is a finished text in requests',
    )
    for name, default, text in (
        ("label", None, "column with 0 or 1: was it a click?"),
        ("rating", None, "instead of --label: column with a rating"),
        ("user", "user", "column with the user"),
        ("item", "item", "column with the item"),
        ("timestamp", "timestamp", "column with the time: integers, numbers or ISO date-times"),
        (
            "split-column",
            None,
            "column with train, val (valid, validation, dev) or test, such as a published split has; rows without are context only",
        ),
        ("items-key", None, "column of the item file with the item; default: as in --item"),
    ):
        parser.add_argument(f"--{name}", type=str, default=default, metavar="COLUMN", help=text)
    text = "what integers or numbers in that column count since 1970; default: told by their size where dates are asked for"
    parser.add_argument("--timestamp-unit", type=Literal[tuple(UNITS)], help=text)
    parser.add_argument("--threshold", type=number, help="with --rating: a rating above it is a click")


def _add_texts(parser: Parser, name: str) -> None:
    parser.add_argument(
        "--context-text",
        type=str,
        metavar="TEMPLATE",
        help='text behind every item: columns of the log, and {hour} {weekday} {gap} {item_rate} {user_rate} {item_ctr} {user_ctr} {affinity}: "{weekday}, {hour}; {gap}"',
    )
    text, zone = "time zone of {hour} and {weekday}", "UTC" if name != "custom" else None
    if zone is None:
        text += " (default: UTC; with --extend that folder's)"
    parser.add_argument("--timezone", type=str, default=zone, metavar="NAME", help=text)
    if SOURCES[name].is_published:
        text = "begin every prompt with the user's gender, age and occupation, of the data set's users' file"
        parser.add_argument("--profile", action="store_true", help=text)
    if name == "custom":
        text = "one row a user: .csv, .tsv (also .gz) or .parquet; goes with --user-text"
        parser.add_argument("--users", type=Path, metavar="FILE", help=text)
        text = (
            'begin every prompt with this text of its user, columns of --users in braces: "{gender}, {age}"'
        )
        parser.add_argument("--user-text", type=str, metavar="TEMPLATE", help=text)
        text = "column of the users' file with the user; default: as in --user"
        parser.add_argument("--users-key", type=str, metavar="COLUMN", help=text)


def _add_protocol(parser: Parser, min_item_count: int, may_extend: bool) -> None:
    text = "8:1:1 over global time, or within each user; default: global"
    parser.add_argument("--split", type=Literal["global", "user"], metavar="global|user", help=text)
    for name, text in (
        ("--val-from", "instead of --split: targets before it are train, those from there on val"),
        ("--test-from", "goes with --val-from: targets from there on are test"),
    ):
        text += (
            "; a date or date-time of ISO 8601 (UTC unless it says otherwise), or a time stamp of the data"
        )
        parser.add_argument(name, type=str, metavar="DATE", help=text)
    _add_counts(
        parser,
        may_extend,
        ("--min-context", 5, "earlier interactions that a target must have"),
        ("--min-item-count", min_item_count, "drop items with fewer interactions"),
        ("--vocab-size", 4096, "largest vocabulary of the tokenizer trained on the item texts"),
        (
            "--title-tokens",
            0,
            "give the titles of so many most frequent items a token each, beside that vocabulary",
        ),
    )


def _add_counts(parser: Parser, may_extend: bool, *options: tuple[str, int, str]) -> None:
    """Options with their defaults, which are the older folder's where one is extended."""
    for name, value, text in options:
        if may_extend:
            text += f" (default: {value}; with --extend that folder's)"
        parser.add_argument(name, type=int, default=None if may_extend else value, help=text)


def run(name: str, options: Namespace) -> None:
    """Make the prepared folder of a source and print the report."""
    from dti_model.data import extend, files_like, named_source, prepare

    settings = options.as_dict()  # vars() would show `items` under another name: Namespace has a method of it
    dates = {key: settings.pop(key) for key in ("val_from", "test_from")}
    protocol = {key: settings.pop(key) for key in _PROTOCOL}
    out, older = settings.pop("out"), settings.pop("extend", None)
    if older is not None:
        for key in (*protocol, "split_column"):
            if (protocol | settings)[key] is not None:
                raise ValueError(f"{key} is the extended folder's own: leave --{key.replace('_', '-')} out")
        del settings["split_column"]
        stats = extend(older, files_like(older, **settings), out, **dates)
    else:
        if name == "custom":
            if settings["text"] is None:
                raise ValueError('--text must be given: a template such as "{title}; {genres}"')
            settings, protocol = ({k: x for k, x in o.items() if x is not None} for o in (settings, protocol))
        if SOURCES[name].threshold is not None:
            protocol["threshold"] = settings.pop("threshold")
        stats = prepare(named_source(name, **settings), out, **dates, **protocol)
    print(prepared_report(stats, out))


def prepared_report(stats: dict[str, Any], out: Path) -> str:
    """A few lines about a prepared folder: counts, base rates, and what became of every row."""
    splits, rejected, rows = stats["splits"], stats["rejected"], stats["rows_in_files"]
    lines = [
        f"{out}: {stats['users']:,} users, {stats['items']:,} items, {stats['interactions']:,} interactions; "
        f"a click is {stats['click']} (base rate {stats['base_rate']:.4f})",
    ]
    if "extension" in stats:
        lines += _extension_lines(stats["extension"])
    for name in SPLIT_CODES:
        rate = splits[name]["base_rate"]
        shown = "-" if rate is None else f"{rate:.4f}"
        lines.append(f"  {name:6}{splits[name]['targets']:>10,} targets, base rate {shown}")
        if rate in (None, 0, 1):
            has = {None: "no target", 0: "no click", 1: "clicks only"}[rate]
            lines.append(
                f"  warning: {name} has {has}, so that it has no AUC and training refuses the folder"
            )
    lines += [
        *_about_split(stats),
        *_about_time(stats),
        *_about_profiles(stats),
        f"  {splits['context']['interactions']:,} interactions are context only; "
        f"{stats['duplicate_pairs']:,} (user, item) pairs occur more than once, "
        f"{stats['duplicate_interactions']:,} interactions repeat one (all kept)",
        f"  of {rows['interactions']:,} rows {_were(rejected['interactions'])} rejected and "
        f"{stats['interactions_pruned']:,} pruned with items of fewer than {stats['min_item_count']} interactions",
        f"  {stats['missing_titles']:,} items without {_first_column(stats)}, {stats['texts_cut']:,} long values cut; of "
        f"{rows['items']:,} rows of items {_were(rejected['items'])} rejected, {stats['items_repeated']:,} repeat an item",
    ]
    if dropped := stats["duplicates_dropped"]:
        lines.append(
            f"  {_were(dropped)} dropped: equal to an interaction before in user, item, time and rating"
        )
    if rejected["first"]:
        lines.append(f"  rejected rows are listed in {out / 'rejected.csv'}; the first:")
        lines += [f"    {row}" for row in rejected["first"]]
    return "\n".join(map(one_line, lines))


def _first_column(stats: dict[str, Any]) -> str:
    """What an item without it has no text of its own."""
    name = Template(stats["source"].get("text", TEMPLATE)).columns[0]
    return "a title" if name == "title" else name


def _about_profiles(stats: dict[str, Any]) -> list[str]:
    """How many users have no profile, where users have one."""
    without = stats["source"].get("profile", {}).get("users_without", 0)
    return [f"  {without:,} of {stats['users']:,} users have no profile"] if without else []


def _about_split(stats: dict[str, Any]) -> list[str]:
    """What the split was made by, and what it hides."""
    rule, lines = stats.get("split_rule", {}), []
    if stats["split"] == "date":
        clock = Clock.of(stats)
        val_from, test_from = clock.shown(rule["val_from"]), clock.shown(rule["test_from"])
        lines.append(f"  split by date: val from {val_from}, test from {test_from}")
    early = {name: count for name, count in rule.get("without_context", {}).items() if count}
    if early:
        taken = ", ".join(f"{count:,} {name}" for name, count in early.items())
        lines.append(
            f"  column {rule['column']} names {taken} rows that have fewer than {stats['min_context']} earlier interactions of their user "
            "and are context only; --min-context 0 keeps all"
        )
    late = stats["splits"]["train_after_test"]
    if stats["split"] == "user" or late:
        lines.append(
            f"  {late:,} of {stats['splits']['train']['targets']:,} training targets are later than the first test target: training learns "
            "of items what was not known yet"
        )
    return lines


def _about_time(stats: dict[str, Any]) -> list[str]:
    """From when to when, and how much of the order of time is not known."""
    clock = Clock.of(stats)
    share = stats["sharing_time"] / stats["interactions"]
    return [
        f"  from {clock.shown(clock.first)} to {clock.shown(clock.last)}; {share:.1%} of the interactions share their {clock.tick} with another "
        "of the same user"
    ]


def _extension_lines(facts: dict[str, int]) -> list[str]:
    """What an extension has added, and what of the new files it has left out."""
    return [
        f"  extension {facts['number']}: {facts['interactions']:,} new interactions ({facts['late']:,} earlier than the last one before), "
        f"{facts['users']:,} new users, {facts['items']:,} new items; {_were(facts['repeated'])} there already and left out",
        f"  {facts['targets']:,} new targets; {facts['train_targets']:,} training targets are new since the folder "
        f"before; {facts['other_texts']:,} items have another text in the new files and keep theirs",
    ]


def _were(count: int) -> str:
    return f"{count:,} {'was' if count == 1 else 'were'}"
