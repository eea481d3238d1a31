"""A search over settings and seeds: every cell is one `train` run in its own folder, and validation alone chooses.

search.csv, search.json   per cell of the grid: mean and standard deviation of the validation metrics over the seeds
search-folder.json        says that the folder is a search's; .lock is there while one runs
NAME=VALUE,.../seed-S/    the run folders; a search that was interrupted goes on, a cell in the middle included
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import yaml

from dti_model.config import (
    CONFIG_FILE,
    MORE_IS_BETTER,
    NEWER,
    OLDER,
    RULES,
    Metric,
    TrainConfig,
    as_yaml,
    both_given,
    check_yaml,
    is_run_config,
    is_sealed,
    must_be,
    newer_value,
    why_owned,
)
from dti_model.data import PreparedData
from dti_model.error_lines import did_you_mean
from dti_model.files import DamagedFileError, check_checksums, locked, read_file, whole_file, write_json
from dti_model.launch import let_settings_rule
from dti_model.model import (
    OtherOriginError,
    Provenance,
    RunExistsError,
    init_fingerprint,
    tokenizer_of,
    train_targets,
)
from dti_model.ranks import first_rank_does, join_ranks, rank
from dti_model.training.driver import train
from dti_model.training.start import (
    LOCK_FILE,
    METRICS_FILE,
    check_is_no_broken_link,
    check_is_ours,
    check_same_settings,
)

MARKER_FILE, TABLE_FILE, CSV_FILE = "search-folder.json", "search.json", "search.csv"
MARKER = {"made by": "dti search"}
METRICS = {"auc": "val AUC", "log_loss": "val log loss", "gauc": "val GAUC"}
# Set by the search itself.
RESERVED = ("data", "out", "seed", "score_test")


def search(base: TrainConfig, grid: Mapping[str, Sequence[Any]], seeds: Sequence[int]) -> dict[str, Any]:
    """Train every cell of a grid with every seed; the test split is not scored. Several processes share every training.

    Args:
        base: settings of all cells; `out` is the folder of the search, and `select_by` the metric that ranks them.
        grid: from a setting's name, dotted where it is nested (`optim.learning_rate`), to its values.
        seeds: of every cell, at least one.

    Returns:
        {"cells": rows, best first, "best": settings of the first}; the same is written to search.json.

    Raises:
        ValueError: a setting does not exist, a value is not one of its, or two cells are one or would share a folder.
        OtherOriginError: a finished cell was trained with other data, another tokenizer or another pretrained model.
        RunExistsError: a cell's folder holds a run with other settings, or the folder is not a search's.
        LockedError: another search writes there.
        DamagedFileError: a finished cell is not what was written.
    """
    if not seeds or len(set(seeds)) < len(seeds) or not all(grid.values()):
        raise ValueError(
            f"a search needs at least one seed, each once, and a value of every setting; got {list(seeds)}, {dict(grid)}"
        )
    for seed in seeds:
        if not RULES["seed"].accepts(seed):
            raise ValueError(must_be("seed", as_yaml(seed)))
    base = base.located()
    cells = [dict(zip(grid, values)) for values in product(*grid.values())]
    configs = [cell_config(base, cell, base.seed) for cell in cells]  # all are checked before the first run
    _check_distinct(cells, configs)
    train_targets(base, PreparedData.open(base.data))
    let_settings_rule()
    join_ranks()
    first_rank_does(lambda: check_search_folder(base.out))
    with ExitStack() as stack:
        first_rank_does(lambda: stack.enter_context(locked(base.out / LOCK_FILE, "dti search")))
        first_rank_does(lambda: write_json(base.out / MARKER_FILE, MARKER))
        rows = _train_cells(base, cells, configs, seeds)
    best = {name: rows[0][name] for name in grid}
    if rank() == 0:
        print(search_table(rows, list(grid), base.select_by))
        print(f"best: {_flags(best)}")
    return {"cells": rows, "best": best}


def _train_cells(
    base: TrainConfig,
    cells: Sequence[Mapping[str, Any]],
    configs: Sequence[TrainConfig],
    seeds: Sequence[int],
) -> list[dict[str, Any]]:
    """Rows of all cells, best first; the tables are written after every cell."""
    rows: list[dict[str, Any]] = []
    runs = [
        [replace(config, seed=seed, out=base.out / cell_name(cell) / f"seed-{seed}") for seed in seeds]
        for cell, config in zip(cells, configs)
    ]
    finished = first_rank_does(lambda: _finished_runs([run for of_cell in runs for run in of_cell]))
    for index, (cell, of_cell) in enumerate(zip(cells, runs)):
        metrics = []
        for run in of_cell:
            if rank() == 0:
                place = f"cell {index + 1} of {len(cells)}, {cell_name(cell)}, seed {run.seed}"
                print(f"search: {place}", flush=True)
            metrics.append(finished.get(run.out) or train(run)["val"])
        rows.append({**cell, "seeds": len(seeds), **_summary(metrics)})
        rows.sort(key=lambda row: _rank_of(row, base.select_by))
        table = {"cells": rows, "best": {name: rows[0][name] for name in cell}}
        first_rank_does(lambda table=table: _write(base.out, table))  # type: ignore[misc]
    return rows


def _rank_of(row: Mapping[str, Any], metric: Metric) -> tuple[bool, float]:
    """What rows are sorted by: the metric, best first, and those without it at the end."""
    mean = row[f"val_{metric}_mean"]
    return mean is None, 0.0 if mean is None else -mean if MORE_IS_BETTER[metric] else mean


def check_search_folder(folder: Path) -> None:
    """Refuse a folder that something other than a search is in; reads only."""
    check_is_no_broken_link(folder)
    owned = why_owned(folder)
    if owned is not None:
        raise RunExistsError(f"{folder} {owned}")
    if folder.exists() and not folder.is_dir():
        raise RunExistsError(f"{folder} is not a folder: choose another --out")
    _check_written(folder)
    if not folder.exists() or _json(folder / MARKER_FILE) == MARKER:
        return
    # Of version 0.1.0, or with a damaged marker: folders of runs, and the tables.
    cells = {path for path in folder.iterdir() if any(map(is_run_config, path.glob(f"seed-*/{CONFIG_FILE}")))}
    foreign = [
        path.name
        for path in sorted({*folder.iterdir()} - cells)
        if not path.name.startswith(("." + MARKER_FILE, LOCK_FILE, ".search."))
        and not (path.name in (TABLE_FILE, CSV_FILE) and _is_table(folder / TABLE_FILE))
        and not (path.name == MARKER_FILE and cells and _json(path) is None)
    ]
    if foreign:
        raise RunExistsError(
            f"{folder} exists, is not empty and is not the folder of a search (it holds {min(foreign)}): choose another --out"
        )


def _check_written(folder: Path) -> None:
    """Refuse links, through which a search would write somewhere else, and what is no file."""
    for path in (folder / name for name in (MARKER_FILE, TABLE_FILE, CSV_FILE)):
        if path.is_symlink() or (path.exists() and not path.is_file()):
            kind = "a symbolic link" if path.is_symlink() else "no regular file"
            raise RunExistsError(f"{path} is {kind}, and the search writes a file of that name: move it away")


def _is_table(path: Path) -> bool:
    table = _json(path)
    return isinstance(table, dict) and table.keys() == {"cells", "best"}


def _json(path: Path) -> Any:
    """The content of a file; None: no JSON, or there is none."""
    try:
        return json.loads(read_file(path))
    except (OSError, ValueError, RecursionError):
        return None


def cell_config(base: TrainConfig, cell: Mapping[str, Any], seed: int) -> TrainConfig:
    """The base with some settings replaced, checked by their types.

    Raises:
        ValueError: as `search`.
    """
    config = replace(base, seed=seed, score_test=False)
    if {OLDER, NEWER} <= cell.keys():
        raise ValueError(both_given(OLDER, NEWER))
    for name, value in cell.items():
        if name == OLDER:
            name, value = NEWER, newer_value(value)
        if name in RESERVED or name not in RULES:
            meant = did_you_mean(name, RULES.keys() - RESERVED)
            raise ValueError(
                f"{name!r} is not a setting that a search can vary (see `dti train --help`){meant}"
            )
        setting = _as_setting(name, value)
        if not RULES[name].accepts(setting):
            raise ValueError(f"{value!r} is no value of {name}: {must_be(name, as_yaml(setting))}")
        config = _replaced(config, name.split("."), setting)
    return config


def _as_setting(name: str, value: Any) -> Any:
    """A value of a grid in the type of its setting: a list as a tuple, an integer as a number, a text as what it says in YAML."""
    if isinstance(value, str) and not RULES[name].accepts(value):
        value = _said(value)
    if isinstance(value, list):
        return tuple(value)
    kind: Any = TrainConfig
    for part in name.split("."):
        kind = get_type_hints(kind)[part]
    is_number = float in (kind, *get_args(kind))
    return float(value) if is_number and type(value) is int and RULES[name].accepts(value) else value


def _said(text: str) -> Any:
    try:
        check_yaml(text)
        value = yaml.safe_load(text)
        return float(value) if isinstance(value, str) else value  # YAML 1.1 has no 1e-3, but 1.0e-3
    except (ValueError, yaml.YAMLError):
        return text


def _replaced(config: Any, path: list[str], value: Any) -> Any:
    if len(path) > 1:
        value = _replaced(getattr(config, path[0]), path[1:], value)
    return replace(config, **{path[0]: value})


def cell_name(cell: Mapping[str, Any]) -> str:
    """Folder of a cell."""
    parts = (f"{name.split('.')[-1]}={value}" for name, value in cell.items())
    return ",".join(parts).replace("/", "_").replace(" ", "") or "base"


def _check_distinct(cells: Sequence[Mapping[str, Any]], configs: Sequence[TrainConfig]) -> None:
    """0.001 and 1e-3 are one value, and `b/x` and `b_x` would be one folder."""
    by_settings: dict[TrainConfig, int] = {}
    by_folder: dict[str, int] = {}
    for index, (cell, config) in enumerate(zip(cells, configs)):
        same = by_settings.setdefault(config.located(), index)
        if same != index:
            raise ValueError(
                f"the grid holds one cell twice, {_flags(cells[same])} and {_flags(cell)}: leave one of them out"
            )
        folder = cell_name(cell)
        other = by_folder.setdefault(folder, index)
        if other != index:
            raise ValueError(
                f"the cells {_flags(cells[other])} and {_flags(cell)} would share the folder {folder}: search them into "
                "two --out"
            )


def _flags(settings: Mapping[str, Any]) -> str:
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in settings.items())


def _finished_runs(runs: Sequence[TrainConfig]) -> dict[Path, dict[str, float]]:
    """Validation metrics of the runs that earlier calls have finished, by folder; all are looked at before anything is trained."""
    data, metrics = PreparedData.open(runs[0].data), {}

    @cache  # a GGUF file's takes seconds to read
    def tokenizer(pretrained: str | None, init: Path | None) -> Any:
        return tokenizer_of(pretrained, data, init)

    for run in runs:
        if not (run.out / METRICS_FILE).is_file():
            continue
        metrics[run.out], kept = _finished(run)
        if kept is not None:
            of_run = tokenizer(run.model.pretrained, run.init)
            differs = kept.differs(Provenance.of(data, of_run, run, init=init_fingerprint(run)))
            if differs is not None:
                raise OtherOriginError(
                    f"{differs} of this search is not what {run.out} was trained with: give the former one, or search into "
                    "another --out"
                )
    return metrics


def _finished(config: TrainConfig) -> tuple[dict[str, float], Provenance | None]:
    """Validation metrics of a finished run, and what it was made of; None: version 0.1.0 trained it."""
    check_is_ours(config.out)
    way_out = f"Delete {config.out} and give the same command again"
    check_checksums(
        config.out, way_out, required=is_sealed(config.out / CONFIG_FILE)
    )  # version 0.1.0 had neither
    path = config.out / METRICS_FILE
    try:
        result = json.loads(read_file(path))
        metrics: dict[str, float] = result["val"]
        kept = result.get("provenance")
        made_of = None if kept is None else Provenance.from_dict(kept)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedFileError(f"{path} is damaged ({error}). {way_out}") from error
    check_same_settings(config, places=made_of is None)
    was_calibrated = "calibration" in result
    if was_calibrated != config.calibrate:
        raise RunExistsError(
            f"{config.out} was finished with{'' if was_calibrated else 'out'} a calibration, so its log loss does not compare with this "
            f"search's: give --calibrate {as_yaml(was_calibrated)}, or choose another --out"
        )
    return metrics, made_of


def _summary(metrics: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    """Mean and sample standard deviation (0 for one seed); None where a metric does not exist for some seed."""
    summary: dict[str, float | None] = {}
    for name in METRICS:
        values = [m[name] for m in metrics]
        exists = all(value is not None for value in values)
        figures = np.array(values, float)
        summary[f"val_{name}_mean"] = float(np.mean(figures)) if exists else None
        deviation = float(np.std(figures, ddof=1)) if len(values) > 1 else 0.0
        summary[f"val_{name}_std"] = deviation if exists else None
    return summary


def _write(folder: Path, table: dict[str, Any]) -> None:
    _check_written(folder)
    write_json(folder / TABLE_FILE, table)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(table["cells"][0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table["cells"])
    with whole_file(folder / CSV_FILE) as temporary:
        temporary.write_text(text.getvalue(), encoding="utf-8")


def search_table(rows: Sequence[Mapping[str, Any]], names: Sequence[str], metric: Metric = "auc") -> str:
    """The rows as text, in their order: AUC, log loss, and the metric that ranks them."""
    width = max([len(name) for name in names] + [10]) + 2
    metrics = dict.fromkeys(("auc", "log_loss", metric))
    heading = "".join(f"{METRICS[name]:>18}" for name in metrics)
    lines = ["".join(f"{name:>{width}}" for name in names) + heading]
    for row in rows:
        figures = "".join(
            f"{'-':>18}"
            if row[f"val_{name}_mean"] is None
            else f"{row[f'val_{name}_mean']:>10.4f} ± {row[f'val_{name}_std']:.3f}"
            for name in metrics
        )
        lines.append("".join(f"{row[name]!s:>{width}}" for name in names) + figures)
    return "\n".join(lines)
