"""Everything that needs a GPU, in one command without a network, within nine minutes on an H100.

    python -m benchmarks.gpu_suite [--out DIR] [--stage attention ...]

Stages run in order, each in a process of its own: what it prints goes to `DIR/<stage>.log`, its rows to `DIR/<stage>.jsonl`, and
`DIR/summary.json` is rewritten as each ends. A stage that fails, crashes or runs out of its time is recorded and the next one runs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measure import SCRATCH
from dti_model.files import whole_file

ROOT = Path(__file__).resolve().parents[1]
_VERSIONS = """
import platform, sys, torch
print("python", sys.version.split()[0], "torch", torch.__version__, "cuda", torch.version.cuda, "hip", torch.version.hip)
for name in ("triton", "transformers", "numpy", "flash_attn"):
    try: print(name, __import__(name).__version__)
    except ImportError as error: print(name, "missing:", error)
print(torch.cuda.get_device_properties(0))
from dti_kernels.tiles import architecture
print("tiles of", architecture(torch.device("cuda", 0)))
"""


@dataclass(frozen=True)
class Stage:
    """A command and the seconds it may take; `{rows}` stands for its file of rows."""

    name: str
    arguments: tuple[str, ...]
    seconds: int


STAGES = (
    Stage("device", ("-c", _VERSIONS), 30),
    Stage("tests", ("-m", "pytest", "-m", "gpu", "tests/kernels/test_gpu.py", "--durations=10"), 150),
    Stage(
        "attention",
        ("-m", "benchmarks.bench_attention", "--device", "cuda", "--out", "{rows}", "--seconds", "125"),
        170,
    ),
    Stage("tiles", ("-m", "benchmarks.tune_tiles", "--seconds", "40", "--out", "{rows}"), 60),
    Stage("score", ("-m", "benchmarks.bench_score", "--device", "cuda", "--out", "{rows}"), 60),
    Stage("training", ("-m", "benchmarks.bench_training", "--seconds", "35", "--out", "{rows}"), 60),
)


def run_stage(stage: Stage, out: Path) -> dict[str, object]:
    """Run one stage; what it did, for the summary."""
    rows, log = out / f"{stage.name}.jsonl", out / f"{stage.name}.log"
    command = [
        sys.executable,
        *(argument.format(rows=rows) if "{rows}" in argument else argument for argument in stage.arguments),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0", "PYTHONUNBUFFERED": "1"}
    start = time.monotonic()
    with log.open("w") as file:
        try:
            code: int | str = subprocess.run(
                command,
                cwd=ROOT,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=stage.seconds,
            ).returncode
        except subprocess.TimeoutExpired:
            code = f"stopped after {stage.seconds} s"
    status = "ok" if code == 0 else "failed"
    return {
        "stage": stage.name,
        "status": status,
        "exit": code,
        "seconds": round(time.monotonic() - start, 1),
    }


def main() -> None:
    """Run the stages; exit with 1 if one failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=SCRATCH / "gpu", help="folder; default: %(default)s")
    parser.add_argument("--stage", nargs="+", choices=[stage.name for stage in STAGES], help="only these")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    out = options.out.resolve()
    summary: list[dict[str, object]] = []
    for stage in STAGES:
        if options.stage and stage.name not in options.stage:
            continue
        summary.append(run_stage(stage, out))
        print(summary[-1], flush=True)
        with whole_file(out / "summary.json") as temporary:
            temporary.write_text(json.dumps(summary, indent=1) + "\n")
    sys.exit(any(entry["status"] != "ok" for entry in summary))


if __name__ == "__main__":
    main()
