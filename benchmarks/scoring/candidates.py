"""Three ways to score the candidates of a request, in each precision, timed by turns behind a parity gate."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from benchmarks.measuring import interleaved_ms, slowest_ms
from benchmarks.recording import Rows
from dti_model.precision import Resolved

# Each gives the probabilities of all candidates, or targets.
Provider = Callable[[], npt.NDArray[np.float64]]
Providers = Mapping[str, Provider]
ONE_PASS, ENCODED, ONE_EACH = "one pass", "encoded history", "one prompt each"
# Of each provider on a GPU, and repeats however slow it is: the step of `benchmarks.gpu_suite` has less than half a minute beside its imports,
# and a host may need ten times what another one needs.
GPU_SECONDS, LEAST_REPEATS = 0.7, 5


def of_graphs(provider: str) -> str:
    """The name of a provider that replays CUDA graphs."""
    return f"{provider}, graph"


def difference(providers: Providers, expected: npt.NDArray[np.float64]) -> float:
    """Largest difference of probabilities from those expected."""
    return max(float(np.abs(call() - expected).max()) for call in providers.values())


def check_parity(providers: Mapping[Resolved, Providers], base: str, most: Mapping[Resolved, float]) -> None:
    """Hold all probabilities to those of one provider, in float32 where that is measured.

    Args:
        providers: by precision.
        base: name of the provider that the others are held to.
        most: the largest difference that is rounding, by precision.

    Raises:
        AssertionError: a difference is larger, or is no number.
    """
    expected = providers["fp32" if "fp32" in providers else "bf16"][base]()
    for precision, of in providers.items():
        if not (found := difference(of, expected)) <= most[precision]:
            raise AssertionError(
                f"probabilities in {precision} differ by {found:.2e}, at most {most[precision]:.2g} is rounding"
            )


def candidate_rows(providers: Mapping[Resolved, Providers], count: int, repeats: int, device: str) -> Rows:
    """A row per precision and provider for `count` candidates, timed by turns, on a GPU each for `GPU_SECONDS` at most.

    `speedup` is over a prompt each in the same precision, `over_fp32` over the same provider in float32.
    """
    calls = {(precision, name): call for precision, of in providers.items() for name, call in of.items()}
    seconds = GPU_SECONDS if device.startswith("cuda") else math.inf
    times = interleaved_ms(calls, repeats, 2, device, seconds, LEAST_REPEATS)
    p50s = {key: float(np.median(ms)) for key, ms in times.items()}
    rows = []
    for (precision, name), ms in times.items():
        p50 = p50s[precision, name]
        row = {"benchmark": "score", "candidates": count, "provider": name, "precision": precision}
        row |= {"p50_ms": round(p50, 3), **slowest_ms(ms), "candidates_per_s": round(1e3 * count / p50, 1)}
        row |= {"speedup": round(p50s[precision, ONE_EACH] / p50, 2), **over_fp32(p50s, precision, name)}
        rows.append({**row, "repeats": len(ms)})
    return rows


def over_fp32(p50s: Mapping[tuple[Resolved, str], float], precision: Resolved, name: str) -> dict[str, float]:
    """The field of that name, of a provider that has a time in float32 and another one."""
    in_float32 = p50s.get(("fp32", name))
    if precision == "fp32" or in_float32 is None:
        return {}
    return {"over_fp32": round(in_float32 / p50s[precision, name], 2)}
