"""Is it still as good? The paper's tables and figures as training runs, resumable run by run.

    python -m benchmarks.bench_quality --plan table1 figure3 --size small --data DIR [--out DIR] [--record]
    python -m benchmarks.bench_quality --plan whole sweep --size smoke --data DIR
    python -m benchmarks.bench_quality --plan table1 --size full        prints the commands of the paper's runs

`small` trains a model of 2 layers x 64 on some users of a prepared data set (made for ML-100K: `dti prepare ml-100k --out DIR`).
Killed and started again, it goes on (`--finished-only` shows what is there); runs that plans share are trained once. Every run is chosen on validation; plans that are
final tables score the test split once, when all their runs are there. Compared are AUCs on the same targets, with 95 % bootstrap
intervals over users and seeds. `--out` gets the runs and `quality-PLAN.jsonl`; `--record` also writes the rows to results/.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils import logging

from benchmarks.measuring import PRECISIONS
from benchmarks.quality import (
    CELL_FILE,
    PLANS,
    SIZES,
    Arm,
    Cell,
    Floats,
    Plan,
    auc_difference,
    commands,
    restrict_targets,
    run_cell,
    score_cell,
    scores_of,
)
from benchmarks.recording import (
    RESULTS,
    SCRATCH,
    Rows,
    add_record,
    make_parser,
    provenance,
    refuse_record,
    replace_rows,
)
from dti_model.config import DTIConfig
from dti_model.data import PreparedData
from dti_model.files import whole_file

METRICS = ("auc", "log_loss", "f1", "gauc")


class Bench:
    """Runs of one size over one data set, in one folder."""

    def __init__(self, size: str, data: Path, out: Path, finished_only: bool = False) -> None:
        self.finished_only = finished_only
        self.size_name, self.size, self.source = size, SIZES[size], data
        self.out = out / size
        source = PreparedData.open(data).stats["source"]
        self.data_name, self.digest = source["name"], source["digest"]
        path = self.out / "data.json"
        if path.exists() and json.loads(path.read_text()) != self.digest:
            raise ValueError(f"{self.out} holds runs over other data than {data}: choose another --out")
        self.out.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as temporary:
            temporary.write_text(json.dumps(self.digest))

    def data_of(self, cell: Cell) -> Path:
        """The prepared folder with the targets that a cell trains on and is scored on."""
        folder, val_share = self.out / f"data-{cell.train_targets or 'all'}", self.size.val_share
        if cell.val_share is not None:
            folder, val_share = folder.with_name(f"{folder.name}-val-{cell.val_share:g}"), cell.val_share
        restrict_targets(self.source, folder, cell.train_targets, val_share, self.size.test_share)
        return folder

    def folder_of(self, cell: Cell) -> Path:
        """The run folder of a cell."""
        return self.out / "runs" / cell.name

    def run(self, name: str, plan: Plan) -> Rows:
        """Train and score what is missing; rows of the plan's runs and comparisons."""
        plan = self._finished(plan) if self.finished_only else plan
        cells = sorted((cell.seed, i, cell) for i, arm in enumerate(plan.arms) for cell in arm.cells)
        for done, (_, i, cell) in enumerate(cells, 1):
            result = run_cell(cell, self.data_of(cell), self.folder_of(cell))
            if plan.score_other:
                self._score_other(cell)
            for precision in PRECISIONS if plan.paired else ():
                score_cell(self.folder_of(cell), f"val-{precision}", "val", precision)
            print(
                f"{name} {done}/{len(cells)}: {plan.arms[i].name}, seed {cell.seed}: "
                f"validation AUC {result['scores']['val']['auc']:.4f}, {result['steps']} steps, {result['seconds']:.0f} s",
                flush=True,
            )
        split = "test" if plan.test else "val"
        if plan.test:
            for _, _, cell in cells:
                score_cell(self.folder_of(cell), "test", "test", cell.computes_in)
        rows = [self._row(name, arm, cell, plan) for arm in plan.arms for cell in arm.cells]
        names = [name for name in (plan.against, plan.control) if name]
        bases = [arm for base in names for arm in plan.arms if arm.name == base]
        rows += [row for base in bases for row in self._differences(name, plan, split, base)]
        return rows + (self._scoring_differences(name, plan) if plan.paired else [])

    def _finished(self, plan: Plan) -> Plan:
        """The plan without the runs that are missing: arms keep the seeds that are there, from 0 on."""
        arms = []
        for arm in plan.arms:
            there = [(self.folder_of(cell) / CELL_FILE).exists() for cell in arm.cells]
            seeds = (*there, False).index(False)
            arms += [replace(arm, seeds=seeds)] if seeds else []
        if plan.against not in [arm.name for arm in arms]:
            raise ValueError(f"no run of {plan.against!r} is finished, with which the others are compared")
        return replace(plan, arms=arms)

    def _score_other(self, cell: Cell) -> None:
        """Validation scores from streaming prompts as in training, and with the reset switched on or off."""
        folder = self.folder_of(cell)
        score_cell(folder, "val-streaming", "val", cell.computes_in, k=cell.k or None)
        if not cell.dti.train_slopes:
            score_cell(folder, "val-switched", "val", cell.computes_in, dti=_switched(cell.dti))

    def _row(self, name: str, arm: Arm, cell: Cell, plan: Plan) -> dict[str, Any]:
        result = json.loads((self.folder_of(cell) / CELL_FILE).read_text())
        settings = asdict(cell)
        row: dict[str, Any] = {"benchmark": "quality", "plan": name, "size": self.size_name, "arm": arm.name}
        row |= {"data": self.data_name, "run": cell.name}
        row |= {
            key: settings[key]
            for key in ("k", "seed", "targets_per_step", "mixed", "epochs", "learning_rate")
        }
        row |= {"precision": cell.computes_in, "mode": cell.dti.mode}
        row |= {"model": f"{cell.model.layers} x {cell.model.width}"}
        row["reset"] = f"{cell.dti.alpha_min:g} .. {cell.dti.alpha_max:g}" if cell.dti.reset else None
        row |= {key: result[key] for key in ("train_targets", "rows_per_target", "steps")}
        for split in result["scores"]:
            if split == "test" and not plan.test:
                continue  # scored for a final table that shares the run; nothing is chosen on it
            row |= {f"{split}_{metric}": result["scores"][split][metric] for metric in METRICS}
        return row

    def _differences(self, name: str, plan: Plan, split: str, base: Arm) -> Rows:
        b = [scores_of(self.folder_of(cell), split) for cell in base.cells]
        rows = []
        for arm in plan.arms:
            if arm is base:
                continue
            a = [scores_of(self.folder_of(cell), split) for cell in arm.cells]
            # Of pairs, a run whose other half is not finished does not count.
            na, nb = 2 * [min(len(a), len(b))] if plan.paired else [len(a), len(b)]
            row: dict[str, Any] = {"benchmark": "quality-difference", "plan": name, "size": self.size_name}
            row |= {"arm": arm.name, "against": base.name, "split": split, "seeds": [na, nb]}
            rows.append(row | self._difference(base, split, a[:na], b[:nb], plan.paired))
        return rows

    def _scoring_differences(self, name: str, plan: Plan) -> Rows:
        """What the precision of scoring alone does: validation scores of the same weights in bfloat16, less those in float32."""
        rows = []
        for arm in plan.arms:
            in_float32, in_bfloat16 = (
                [scores_of(self.folder_of(cell), f"val-{precision}") for cell in arm.cells]
                for precision in PRECISIONS
            )
            row: dict[str, Any] = {"benchmark": "quality-scoring", "plan": name, "size": self.size_name}
            row |= {"arm": arm.name, "split": "val", "seeds": [arm.seeds, arm.seeds]}
            rows.append(row | self._difference(arm, "val", in_bfloat16, in_float32, paired=True))
        return rows

    def _difference(
        self, arm: Arm, split: str, a: list[Floats], b: list[Floats], paired: bool
    ) -> dict[str, Any]:
        """Fields of a comparison of scores of the targets of an arm."""
        data = PreparedData.open(self.data_of(arm.cell))
        targets = data.targets(split)
        labels, users = np.asarray(data.label[targets], np.int64), data.users_of(targets)
        found = auc_difference(labels, users, a, b, paired=paired)
        return {
            "targets": len(labels),
            "users": len(np.unique(users)),
            "auc_difference": round(found.value, 5),
            "low": round(found.low, 5),
            "high": round(found.high, 5),
        }


def _switched(dti: DTIConfig) -> DTIConfig:
    """The reset off where it was on, and on where it was off."""
    if dti.reset and dti.alpha_max > 0:
        return replace(dti, alpha_min=0.0, alpha_max=0.0, alpha_own=0.0)
    return replace(dti, mode="dti", alpha_max=0.5)


def table(rows: Rows) -> str:
    """Arms with mean metrics over seeds, and their differences."""
    compared = [row for row in rows if row["benchmark"] == "quality-difference"]
    differences = {row["arm"]: row for row in compared if row["against"] == compared[0]["against"]}
    runs: dict[str, Rows] = {}
    for row in rows:
        if row["benchmark"] == "quality":
            runs.setdefault(row["arm"], []).append(row)
    lines = [
        f"{'':44}{'seeds':>6}{'steps':>7}{'val AUC':>9}{'test AUC':>9}{'log loss':>9}  difference of AUC"
    ]
    for arm, seeds in runs.items():
        shown = [
            f"{np.mean([s[key] for s in seeds]):9.4f}" if key in seeds[0] else f"{'-':>9}"
            for key in ("val_auc", "test_auc", "test_log_loss")
        ]
        line = f"{arm:44}{len(seeds):6}{seeds[0]['steps']:7}" + "".join(shown)
        if arm in differences:
            d = differences[arm]
            line += f"  {d['auc_difference']:+.4f} [{d['low']:+.4f}, {d['high']:+.4f}] ({d['split']})"
        lines.append(line)
    for d in (row for row in rows if row["benchmark"] == "quality-scoring"):
        lines.append(
            f"{d['arm']}, scored in bfloat16 less in float32: {d['auc_difference']:+.4f} [{d['low']:+.4f}, {d['high']:+.4f}]"
        )
    return "\n".join(lines)


def run(
    plans: list[str], size: str, data: Path, out: Path, record: bool, finished_only: bool = False
) -> None:
    """Run plans and write their rows."""
    bench = Bench(size, data, out, finished_only)
    for name in plans:
        plan = PLANS[name](SIZES[size])
        print(f"{name}: {plan.question}", flush=True)
        rows = bench.run(name, plan)
        print(table(rows), flush=True)
        for folder in (out, RESULTS) if record else (out,):
            replace_rows(folder / f"quality-{name}.jsonl", ({**provenance(), **row} for row in rows))


def main() -> int:
    """Parse, run, print."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--plan", nargs="+", choices=PLANS, required=True)
    add("--size", choices=SIZES, default="small")
    add("--data", type=Path, help="folder made by `dti prepare`")
    add("--out", type=Path, default=SCRATCH / "quality", help="folder of the runs; default: %(default)s")
    add("--finished-only", action="store_true", help="train nothing: rows of the runs that are finished")
    add_record(parser)
    options = parser.parse_args()
    if options.size == "full":
        print("\n".join(commands(options.plan)))
        return 0
    if options.data is None:
        parser.error("--data is needed for this size")
    if options.size == "smoke":
        refuse_record(parser, options)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    run(options.plan, options.size, options.data, options.out, options.record, options.finished_only)
    return 0


if __name__ == "__main__":
    sys.exit(main())
