"""`dti prepare SOURCE`: the options of every source, and the report that is printed."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser, Namespace

from dti_model.cli.command_line import Parser
from dti_model.shown import one_line

FETCHED = "folder with the raw files; default: fetch them"
HELP = {
    "ml-100k": "MovieLens-100K",
    "ml-1m": "MovieLens-1M",
    "amazon-cds": "Amazon reviews v2 (2018), CDs and Vinyl",
    "amazon-kindles": "Amazon reviews v2 (2018), Kindle Store",
    "amazon": "any other category of Amazon reviews v2, by its two files",
    "custom": "your own interactions and items: CSV, TSV or Parquet",
}


class _Number:
    """A float option that lets NaN and infinities pass, which the data layer refuses with the option's bounds."""

    def __call__(self, text: str | float) -> float:
        return float(text)

    def __repr__(self) -> str:  # what the help shows
        return "float"


def add_prepare(commands: Any) -> None:
    """Add `prepare` to the subcommands of `dti`, with one subcommand a source that has the options applying to it."""
    parser = Parser(
        description="Turn a raw data set into a prepared folder: checked, split, tokenised, memory-mapped. "
        "`dti prepare SOURCE --help` lists the options of a source."
    )
    commands.add_subcommand("prepare", parser, help="make a prepared folder from raw files")
    sources = parser.add_subcommands(required=True, dest="source", metavar="SOURCE")
    for name, text in HELP.items():
        sources.add_subcommand(name, _source_parser(name), help=text)


def _source_parser(name: str) -> ArgumentParser:
    parser = Parser(description=f"Prepare {HELP[name]}.")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="prepared folder to make; an older one there is replaced, anything else is an error",
    )
    if name.startswith("ml-"):
        routes = "GroupLens, then the package index" if name == "ml-100k" else "GroupLens"
        parser.add_argument("--raw-dir", type=Path, help=f"{FETCHED} ({routes})")
        parser.add_argument(
            "--subset",
            action="store_true",
            help="accept a part of the data set: report its counts instead of checking them",
        )
    elif name == "amazon":
        parser.add_argument("--reviews", type=Path, required=True, help="<Category>_5.json.gz, or unpacked")
        parser.add_argument("--meta", type=Path, required=True, help="meta_<Category>.json.gz, or unpacked")
    elif name == "custom":
        _add_custom(parser)
    else:
        parser.add_argument(
            "--raw-dir", type=Path, required=True, help="folder with the review and the metadata file"
        )
    if name != "custom":
        rating = 3 if name.startswith("ml-") else 4
        parser.add_argument(
            "--threshold", type=_Number(), help=f"a rating above it is a click; default: {rating}"
        )
    if not name.startswith("ml-"):
        parser.add_argument(
            "--max-rejected",
            type=_Number(),
            default=0.01,
            help="largest share of a file's rows that may be unusable; they are listed in OUT/rejected.csv",
        )
        parser.add_argument(
            "--max-chars",
            type=int,
            default=200,
            help="longest value in an item text; longer ones are cut at a word",
        )
    _add_protocol(parser, 5 if name.startswith("amazon") else 1)
    return parser


def _add_custom(parser: ArgumentParser) -> None:
    files = ".csv, .tsv (also .gz) or .parquet"
    parser.add_argument("--interactions", type=Path, required=True, help=f"one row an interaction: {files}")
    parser.add_argument("--items", type=Path, required=True, help=f"one row an item: {files}")
    parser.add_argument(
        "--text",
        type=str,
        required=True,
        help='template of an item\'s text, columns in braces: "{title}; {genres}"; the first one is the title, and none may be '
        'called text, since {"text": ...} is a finished text in requests',
    )
    parser.add_argument("--label", type=str, help="column with 0 or 1: was it a click?")
    parser.add_argument("--rating", type=str, help="instead of --label: column with a rating")
    parser.add_argument("--threshold", type=_Number(), help="with --rating: a rating above it is a click")
    parser.add_argument("--user", type=str, default="user", help="column with the user")
    parser.add_argument("--item", type=str, default="item", help="column with the item")
    parser.add_argument(
        "--timestamp",
        type=str,
        default="timestamp",
        help="column with the time: integers, numbers or ISO date-times",
    )
    parser.add_argument(
        "--items-key", type=str, help="column of the item file with the item; default: as in --item"
    )


def _add_protocol(parser: ArgumentParser, min_item_count: int) -> None:
    parser.add_argument(
        "--split",
        type=Literal["global", "user"],
        default="global",
        help="8:1:1 over global time, or within each user",
    )
    parser.add_argument(
        "--min-context", type=int, default=5, help="earlier interactions that a target must have"
    )
    parser.add_argument(
        "--min-item-count", type=int, default=min_item_count, help="drop items with fewer interactions"
    )
    parser.add_argument(
        "--vocab-size",
        type=int,
        default=4096,
        help="largest vocabulary of the tokenizer trained on the item texts",
    )


def run_prepare(options: Namespace) -> None:
    """Make the prepared folder that the options ask for and print the report."""
    from dti_model.data import SOURCES, named_source, prepare

    name = options.source
    settings = options[
        name
    ].as_dict()  # vars() would show `items` under another name: Namespace has a method of it
    protocol = {key: settings.pop(key) for key in ("split", "min_context", "min_item_count", "vocab_size")}
    out = settings.pop("out")
    if SOURCES[name].threshold is not None:
        protocol["threshold"] = settings.pop("threshold")
    stats = prepare(named_source(name, **settings), out, **protocol)
    print(prepared_report(stats, out))


def prepared_report(stats: dict[str, Any], out: Path) -> str:
    """A few lines about a prepared folder: counts, base rates, and what became of every row."""
    splits, rejected, rows = stats["splits"], stats["rejected"], stats["rows_in_files"]
    lines = [
        f"{out}: {stats['users']:,} users, {stats['items']:,} items, {stats['interactions']:,} interactions; "
        f"a click is {stats['click']} (base rate {stats['base_rate']:.4f})",
    ]
    for name in ("train", "val", "test"):
        rate = splits[name]["base_rate"]
        shown = "-" if rate is None else f"{rate:.4f}"
        lines.append(f"  {name:6}{splits[name]['targets']:>10,} targets, base rate {shown}")
    lines += [
        f"  {splits['context']['interactions']:,} interactions are context only; "
        f"{stats['duplicate_pairs']:,} (user, item) pairs occur more than once, "
        f"{stats['duplicate_interactions']:,} interactions repeat one (all kept)",
        f"  of {rows['interactions']:,} rows {_were(rejected['interactions'])} rejected and "
        f"{stats['interactions_pruned']:,} pruned with items of fewer than {stats['min_item_count']} interactions",
        f"  {stats['missing_titles']:,} items without a title, {stats['texts_cut']:,} long values cut; of "
        f"{rows['items']:,} rows of items {_were(rejected['items'])} rejected, {stats['items_repeated']:,} repeat an item",
    ]
    if rejected["first"]:
        lines.append(f"  rejected rows are listed in {out / 'rejected.csv'}; the first:")
        lines += [f"    {row}" for row in rejected["first"]]
    return "\n".join(map(one_line, lines))


def _were(count: int) -> str:
    return f"{count:,} {'was' if count == 1 else 'were'}"
