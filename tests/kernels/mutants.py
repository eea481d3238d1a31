"""Small errors to be planted in each implementation, and a run of one: which cases notice it, in which dtype.

    python -m tests.kernels.mutants FOLDER EXPECTED CASE,CASE        shares of the budget as JSON, computed by the package in FOLDER

A mutant is a text of one source file and what stands in its place. It is planted in a copy of the package, never in the package.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import dti_kernels
from dti_kernels import testing, windowed_attn
from dti_kernels.cpu import compiled
from dti_kernels.gpu import tiles
from tests.cases import CASES
from tests.numerics import golden_and_budgets

ROOT = Path(__file__).resolve().parents[2]
FILES = {
    "segments": "cpu/native/segments.h",
    "tiles": "cpu/native/tiles.h",
    "worker": "cpu/native/worker.h",
    "blocks": "cpu/blocks.py",
    "tile": "gpu/tile.py",
    "forward": "gpu/forward.py",
    "context": "gpu/backward_context.py",
    "sums": "gpu/backward_sum.py",
}


@dataclass(frozen=True)
class Mutant:
    """`is_now` of a file becomes `planted`.

    Attributes:
        name: what is wrong.
        implementation: native, torch or triton.
        file: key of FILES.
        is_now: stands in the file once.
        planted: what comes in its place.
    """

    name: str
    implementation: str
    file: str
    is_now: str
    planted: str

    @property
    def id(self) -> str:
        """Of its test."""
        return f"{self.implementation}: {self.name}"


MUTANTS = [
    Mutant(
        "window a token short",
        "native",
        "segments",
        "Range span() const { return {at(START), at(STOP)}; }",
        "Range span() const { return {at(START) + (at(START) > at(PROMPT_FIRST)), at(STOP)}; }",
    ),
    Mutant(
        "window a token long",
        "native",
        "segments",
        "Range span() const { return {at(START), at(STOP)}; }",
        "Range span() const { return {at(START) - (at(START) > max(at(PROMPT_FIRST), at(PREFIX_STOP))), at(STOP)}; }",
    ),
    Mutant(
        "prefix without its last key",
        "native",
        "segments",
        "return {at(PROMPT_FIRST), at(PREFIX_STOP)};",
        "return {at(PROMPT_FIRST), at(PREFIX_STOP) - (at(PREFIX_STOP) > at(PROMPT_FIRST))};",
    ),
    Mutant("slope off by a percent", "native", "worker", "scale - slope * (", "scale - F(1.01) * slope * ("),
    Mutant(
        "prefix a token nearer",
        "native",
        "tiles",
        "span.size() + row.prefix().size();",
        "span.size() + row.prefix().size() - 1;",
    ),
    Mutant(
        "reset an interaction nearer",
        "native",
        "worker",
        "table[min(max<Index>(distance, 0)",
        "table[min(max<Index>(distance - 1, 0)",
    ),
    Mutant(
        "own score off by a percent", "native", "worker", "own = scale * dot(", "own = F(1.01) * scale * dot("
    ),
    Mutant(
        "delta off by a percent",
        "native",
        "worker",
        "delta[t] = dot(to, ",
        "delta[t] = F(1.01) * dot(to, ",
    ),
    Mutant(
        "dq off by a percent",
        "native",
        "worker",
        "of_row[d] *= scale;",
        "of_row[d] *= scale * F(1.01);",
    ),
    Mutant(
        "window a token short",
        "torch",
        "blocks",
        "seen = (key >= start)",
        "seen = (key >= start + (start > prompt_first))",
    ),
    Mutant(
        "prefix without its last key",
        "torch",
        "blocks",
        "(key >= prompt_first) & (key < prefix_stop)",
        "(key >= prompt_first) & (key < prefix_stop - 1)",
    ),
    Mutant("slope off by a percent", "torch", "blocks", "value=-1)", "value=-1.01)"),
    Mutant(
        "prefix a token nearer",
        "torch",
        "blocks",
        "stop_key - start + prefix_stop - key,",
        "stop_key - start + prefix_stop - key - 1,",
    ),
    Mutant("reset an interaction nearer", "torch", "blocks", "steps.clamp_(0", "(steps - 1).clamp_(0"),
    Mutant(
        "own score off by a percent",
        "torch",
        "blocks",
        "scores.masked_fill_(",
        "scores[..., self.distance.shape[1] :].mul_(1.01)\n        scores.masked_fill_(",
    ),
    Mutant(
        "dq off by a percent",
        "torch",
        "blocks",
        "block.keys(wide)) * x.scale",
        "block.keys(wide)) * (1.01 * x.scale)",
    ),
    Mutant(
        "window a token short",
        "triton",
        "tile",
        "visible(key, spans[2][:, None], spans[3][:, None])",
        "visible(key, (spans[2] + (spans[2] > spans[0]).to(tl.int32))[:, None], spans[3][:, None])",
    ),
    Mutant(
        "window a token short for keys",
        "triton",
        "context",
        "visible((lane + lane_0)[None, :], lane_first[:, None], lane_stop[:, None])",
        "visible((lane + lane_0)[None, :], lane_first[:, None], lane_stop[:, None] - PACK)",
    ),
    Mutant(
        "prefix without its last key",
        "triton",
        "tile",
        "visible(key, spans[0][:, None], spans[1][:, None])",
        "visible(key, spans[0][:, None], (spans[1] - (spans[1] > spans[0]).to(tl.int32))[:, None])",
    ),
    Mutant(
        "window a token short where tiles hold one range",
        "triton",
        "tile",
        "first = tl.where(in_prefix, spans[0], spans[2])",
        "first = tl.where(in_prefix, spans[0], spans[2] + (spans[2] > spans[0]).to(tl.int32))",
    ),
    Mutant(
        "prefix without its last key where tiles hold one range",
        "triton",
        "tile",
        "stop = tl.where(in_prefix, spans[1], spans[3])",
        "stop = tl.where(in_prefix, spans[1] - 1, spans[3])",
    ),
    Mutant(
        "tiles of one range where rows have different prefixes",
        "triton",
        "tile",
        "(first_prompt == last_prompt) & (first_prefix == last_prefix)",
        "first_prompt == first_prompt",
    ),
    Mutant(
        "slope off by a percent",
        "triton",
        "forward",
        "tl.load(slopes_ptr + head).to(tl.float32)",
        "tl.load(slopes_ptr + head).to(tl.float32) * 1.01",
    ),
    Mutant(
        "slope off by a percent for keys",
        "triton",
        "sums",
        "head_0 + lane).to(tl.float32)",
        "head_0 + lane).to(tl.float32) * 1.01",
    ),
    Mutant(
        "prefix a token nearer",
        "triton",
        "tile",
        "(stop - start) + (prefix_stop - key), stop - key)",
        "(stop - start) + (prefix_stop - key) - 1, stop - key)",
    ),
    Mutant(
        "reset an interaction nearer",
        "triton",
        "tile",
        "tl.maximum(row_reset_id - key_reset_id, 0)",
        "tl.maximum(row_reset_id - key_reset_id - 1, 0)",
    ),
    Mutant(
        "own score off by a percent",
        "triton",
        "forward",
        "k_self.to(tl.float32), 1) * scale",
        "k_self.to(tl.float32), 1) * (scale * 1.01)",
    ),
    Mutant(
        "dk of [SUM]s off by a percent",
        "triton",
        "sums",
        "store_tile(dk_sum_ptr, offs_dk, inside, dk * scale,",
        "store_tile(dk_sum_ptr, offs_dk, inside, dk * (scale * 1.01),",
    ),
]
DTYPES = ("float64", "float32", "bfloat16", "float16")
# The interpreter takes seconds for a case.
INTERPRETED = ("one_token", "one_prompt", "prefix", "alibi_only", "gqa_4", "candidates", "k_50")

Shares = dict[
    str, dict[str, float]
]  # by case, by dtype: the largest share of its budget that any tensor uses


_found: dict[tuple[str, str, bool], Any] = {}  # implementations share most


def write_expected(path: Path, implementation: str) -> None:
    """Golden results and budgets of all cases for native, torch or triton, which no mutant changes."""
    triton, expected = implementation == "triton", {}
    # The interpreter computes bfloat16 in float32.
    rounded = {"triton": "float16", "native": "bfloat16" if compiled.multiplies_bfloat16() else None}
    for case in CASES:
        for dtype in DTYPES:
            if triton and (dtype == "float64" or case.name not in INTERPRETED):
                continue
            key = case.name, dtype, rounded.get(implementation) == dtype
            if key not in _found:
                _found[key] = golden_and_budgets(case, getattr(torch, dtype), key[2])
            expected[case.name, dtype] = _found[key]
    torch.save(expected, path)


def shares_of(mutant: Mutant | None, implementation: str, folder: Path, expected: Path) -> Shares:
    """The cases, run by an implementation with a mutant planted.

    Args:
        mutant: which; None: the implementation as it is.
        implementation: native, torch or triton.
        folder: an empty one, for the copy.
        expected: of `write_expected`.
    """
    for name in ("dti_kernels", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    if mutant is not None:
        _plant(mutant, folder / "dti_kernels" / FILES[mutant.file])
    environment = os.environ | {
        "PYTHONPATH": str(folder),
        "TRITON_INTERPRET": "1" if implementation == "triton" else "0",
        "DTI_CACHE_DIR": str(folder / "cache"),
        "DTI_CPU": "native" if implementation == "native" else "torch",
        "CXX": os.environ.get("CXX", "c++") + " -O1",
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.mutants", str(folder), str(expected)],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{mutant} ended with status {done.returncode}: {done.stderr[-2000:]}")
    result: Shares = json.loads(done.stdout.splitlines()[-1])
    return result


def _plant(mutant: Mutant, source: Path) -> None:
    text = source.read_text()
    if text.count(mutant.is_now) != 1:
        raise ValueError(
            f"{source.name} holds {mutant.is_now!r} {text.count(mutant.is_now)} times, expected once: plant {mutant.id!r} elsewhere"
        )
    source.write_text(text.replace(mutant.is_now, mutant.planted))


def _run(folder: Path, expected: Path) -> Shares:
    assert folder in Path(dti_kernels.__file__).parents, "the package was imported from elsewhere"
    torch.set_num_threads(1)
    by_name = {case.name: case for case in CASES}
    found: Shares = {}
    for (name, dtype), (golden, budgets) in torch.load(expected, weights_only=False).items():
        kind, tile = getattr(torch, dtype), tiles.Tile(64, 64 if name == "k_50" else 32, 4, 1)
        with tiles.forced(dict.fromkeys(tiles.KERNELS, tile)):
            actual = by_name[name].inputs(kind).run(windowed_attn)
        used = testing.shares(actual, golden, budgets, kind)
        found.setdefault(name, {})[dtype] = max(used.values())
    return found


if __name__ == "__main__":
    print(json.dumps(_run(Path(sys.argv[1]), Path(sys.argv[2]))))
