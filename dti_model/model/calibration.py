"""What makes a model's scores probabilities that hold: Platt scaling, by a temperature and a bias.

    p' = sigmoid(logit(p) / temperature + bias)          temperature > 0

Models that train for several epochs grow too sure of themselves (Guo et al., On Calibration of Modern Neural Networks, 2017). The two
numbers are fitted on validation (`dti_model.evaluation.calibration`) and stand in the model's dti.json. Scores keep their order. Scores
that are equal stay equal; different ones may become equal by rounding, next to 0 and 1, so metrics of order are those of p.

Cost: three elementary functions a score, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import expit, logit

Floats = npt.NDArray[np.float64]

# Log-odds of 1: a float64 next to 1 has 36.7 at most. Those of 0 mirror them.
LARGEST_LOG_ODDS = 37.5
# Beyond these a fit says nothing about a model.
TEMPERATURES = (0.1, 10.0)


@dataclass(frozen=True)
class Calibration:
    """The two numbers; calling it gives calibrated probabilities.

    Attributes:
        temperature: what log-odds are divided by; above 1: the model was too sure.
        bias: what is added to them.
    """

    temperature: float = 1.0
    bias: float = 0.0

    def __call__(self, probabilities: npt.ArrayLike) -> Floats:
        """Calibrated probabilities, float64, of any shape; NaN stays NaN."""
        return np.asarray(expit(log_odds(probabilities) / self.temperature + self.bias), np.float64)

    @staticmethod
    def from_dict(fields: Mapping[str, Any]) -> Calibration:
        """From what `asdict` gave.

        Raises:
            ValueError: a field is missing, or no number that a fit could have found.
        """
        temperature, bias = fields.get("temperature"), fields.get("bias")
        for value in (temperature, bias):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ValueError(f"calibration needs two numbers, temperature and bias, got {dict(fields)}")
        if not TEMPERATURES[0] <= temperature <= TEMPERATURES[1]:  # type: ignore[operator]
            raise ValueError(f"calibration.temperature must be in [.1, 10], got {temperature}")
        return Calibration(float(temperature), float(bias))  # type: ignore[arg-type]


def log_odds(probabilities: npt.ArrayLike) -> Floats:
    """ln(p / (1 - p)), within 37.5 of 0, so that those of 0 and 1 are finite."""
    odds = logit(np.asarray(probabilities, np.float64))
    return np.asarray(np.clip(odds, -LARGEST_LOG_ODDS, LARGEST_LOG_ODDS), np.float64)
