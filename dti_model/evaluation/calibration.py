"""Fitting a model's temperature and bias (`dti_model.model.Calibration`) to the labels of its validation targets.

The log loss is least where its two derivatives vanish; it is convex in 1 / temperature and bias. The labels are Platt's (Probabilistic
Outputs for Support Vector Machines, 1999): (P + 1) / (P + 2) for a click and 1 / (N + 2) for none, of P clicks and N others. So a
validation set that is tiny, or that the scores part without a mistake, has finite numbers too; of thousands of targets they say nothing.
The temperature stays in [.1, 10]: where high scores do not mean more clicks, it ends at 10, and the order of scores is kept.

Cost: some 20 passes over the targets.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize
from scipy.special import expit, logit

from dti_model.model import TEMPERATURES, Calibration, log_odds


def fit_calibration(labels: npt.ArrayLike, probabilities: npt.ArrayLike) -> Calibration:
    """The temperature and bias of least log loss.

    Args:
        labels: (S,) 0 or 1, both of them.
        probabilities: (S,) scores, in [0, 1].

    Raises:
        ValueError: a label is missing, or a score is not in [0, 1].
    """
    is_click, p = np.asarray(labels, bool), np.asarray(probabilities, np.float64)
    clicks, others = int(is_click.sum()), int((~is_click).sum())
    if not clicks or not others:
        raise ValueError(f"a calibration needs both labels, got {clicks} clicks and {others} others")
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError("probabilities must lie in [0, 1] to be calibrated")
    target = np.where(is_click, (clicks + 1) / (clicks + 2), 1 / (others + 2))
    odds = log_odds(p)
    middle, spread = float(odds.mean()), float(odds.std())
    if spread <= 1e-12 * max(1.0, abs(middle)):  # one score for all: nothing tells a temperature
        return Calibration(1.0, float(logit(target.mean()) - middle))
    scaled = (odds - middle) / spread

    def loss_and_slope(x: npt.NDArray[np.float64]) -> tuple[float, npt.NDArray[np.float64]]:
        z = x[0] * scaled + x[1]
        error = expit(z) - target
        loss = float((np.logaddexp(0, z) - target * z).mean())
        return loss, np.array([(error * scaled).mean(), error.mean()])

    coldest, hottest = TEMPERATURES
    bounds = [(spread / hottest, spread / coldest), (None, None)]
    start = np.array([np.clip(1.0, *bounds[0]), logit(target.mean())])
    found: Any = minimize(
        loss_and_slope,
        start,
        jac=True,
        method="L-BFGS-B",
        bounds=bounds,
        options={"ftol": 1e-15, "gtol": 1e-10, "maxiter": 1000},
    )
    slope, shift = found.x.tolist()
    temperature = float(np.clip(spread / slope, coldest, hottest))
    return Calibration(temperature, shift - middle / temperature)
