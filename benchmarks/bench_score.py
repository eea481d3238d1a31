"""Scoring: candidates of one user in one pass, and evaluation of a test split, each beside what one would do without.

    python -m benchmarks.bench_score [--data DIR] [--part candidates evaluation] [--device cuda] [--out ROWS.jsonl] [--record] [--size smoke]
    python -m benchmarks.bench_score --part candidates --shape smollm --device cuda        (`benchmarks/scoring/shape.py`)

`candidates`: 1 to 500 candidates of a real user with a history of 20: one pass; an encoded history, with which only candidates are
computed; and one sliding-window prompt per candidate, packed, with the same model and attention. On a CPU all of them take turns in float32
and in bfloat16, with the same weights. On a GPU one pass and the encoded history are also replayed as CUDA graphs, and every way is repeated
as often as some seconds allow.
`evaluation`: targets of the test split (of every `--user-step`-th user): `score_targets` beside two Hugging Face loops
(LlamaForCausalLM with the same weights, SDPA, one left-padded prompt per target, batches of 32), in mode dti-minus, which is what a
plain model computes: one that takes the logits that the model returns, and a careful one that asks for those of the last position
only. In bfloat16 the loops have weights in bfloat16. Weights are random: speed does not depend on them. No row without parity.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.measuring import DEVICE, add_precision
from benchmarks.recording import Rows, make_parser, parse_measuring
from benchmarks.scoring import (
    REPEATS,
    SMOKE_REPEATS,
    measure_candidates,
    measure_evaluation,
    measure_shape,
    new_run,
)
from benchmarks.synthetic import made_up_data
from dti_model.config import DTIConfig, ModelConfig
from dti_model.precision import Resolved


def main() -> None:
    """Measure, print and keep the rows."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--data", type=Path, help="folder made by `dti prepare`; default: made-up data of MovieLens' shape")
    add("--part", nargs="+", choices=("candidates", "evaluation"))
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add_precision(parser)
    add("--layers", type=int, default=4)
    add("--width", type=int, default=128)
    add("--repeats", type=int, default=3, help="of the evaluation")
    add("--user-step", type=int, default=1, help="evaluate targets of every n-th user")
    add("--shape", choices=("smollm",), help="of a pretrained model, with random ids: no data")
    smoke = {"layers": 1, "width": 16, "repeats": 1, "user_step": 40}
    options = parse_measuring(parser, "score-{device}", smoke)
    if options.shape is not None:
        if options.part != ["candidates"]:
            parser.error(
                "--shape has random ids, which there is nothing to evaluate with: give --part candidates"
            )
        for rows in measure_shape(options.shape, options.device == "cuda", options.precision):
            show(rows)
            options.rows.append(rows)  # what is measured is kept where time is up before the end
        print(f"rows: {options.rows}")
    else:
        rows = measure_data(options)
        show(rows)
        options.rows.keep(rows)


def show(rows: Rows) -> None:
    """A line a row."""
    for row in rows:
        task = f"{row['candidates']} candidates" if "candidates" in row else f"{row['targets']} targets"
        said = f"{task:>14}  {row['provider']:38} {row['precision']}  p50 {row['p50_ms']:9.1f} ms  {row['speedup']:6.2f} x"
        print(said + (f"  {row['over_fp32']:.2f} x fp32" if "over_fp32" in row else ""), flush=True)


def measure_data(options: argparse.Namespace) -> Rows:
    """Rows of the parts asked for, on prepared data or on made-up data."""
    device = DEVICE if options.device == "cuda" else "cpu"
    model = ModelConfig(
        layers=options.layers,
        width=options.width,
        mlp_width=-(-options.width // 3) * 8,  # as the ready-made configurations: a multiple of 8
        dropout=0.0,
    )
    if options.data is None:
        options.data = made_up_data(Path(tempfile.mkdtemp()))
    precisions: Sequence[Resolved] = options.precision if options.device == "cpu" else ("fp32",)
    rows = []
    for part in options.part or ("candidates", "evaluation"):
        if part == "candidates":
            run = new_run(options.data, model, DTIConfig(alpha_max=0.5), device)
            repeats_of = SMOKE_REPEATS if options.size == "smoke" else REPEATS
            rows += measure_candidates(run, device, repeats_of, precisions)
        else:
            run = new_run(options.data, model, DTIConfig("dti-minus"), device)
            rows += measure_evaluation(run, device, options.repeats, options.user_step, precisions)
    return [{**row, "model": f"{options.layers} x {options.width}"} for row in rows]


if __name__ == "__main__":
    main()
