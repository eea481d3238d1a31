"""Three ways to score the candidates of a request, timed by turns behind a parity gate."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from benchmarks.measuring import interleaved_ms, slowest_ms
from benchmarks.recording import Rows

# Each gives the probabilities of all candidates.
Providers = Mapping[str, Callable[[], npt.NDArray[np.float64]]]
ONE_PASS, ENCODED, ONE_EACH = "one pass", "encoded history", "one prompt each"


def difference(providers: Providers) -> float:
    """Largest difference of probabilities from those of a prompt each."""
    expected = providers[ONE_EACH]()
    return max(float(np.abs(call() - expected).max()) for call in providers.values())


def candidate_rows(providers: Providers, count: int, repeats: int, device: str) -> Rows:
    """A row per provider for `count` candidates; `speedup` is over a prompt each."""
    times = interleaved_ms(providers, repeats, warmup=2, device=device)
    base = float(np.median(times[ONE_EACH]))
    rows = []
    for name, ms in times.items():
        p50 = float(np.median(ms))
        row = {"benchmark": "score", "candidates": count, "provider": name, "p50_ms": round(p50, 3)}
        row |= {**slowest_ms(ms), "candidates_per_s": round(1e3 * count / p50, 1)}
        rows.append({**row, "speedup": round(base / p50, 2), "repeats": repeats})
    return rows
