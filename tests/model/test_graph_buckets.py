"""Which passes share a CUDA graph, and which models have none."""

from __future__ import annotations

import numpy as np

from dti_model.config import DTIConfig
from dti_model.model import graphs
from dti_model.model.graphs import can_be_graphed, size_of
from tests.model.packed_passes import a_model


def test_sizes_are_few_and_near() -> None:
    sizes = np.array([size_of(n) for n in range(graphs.MOST_ROWS + 1)])
    rows = np.arange(graphs.MOST_ROWS + 1)
    assert (sizes >= np.maximum(rows, 1)).all()
    assert (np.diff(sizes) >= 0).all()
    assert (sizes - rows <= np.maximum(16, np.where(rows <= 512, rows / 4, rows / 8))).all()
    assert len(set(sizes.tolist())) <= 60
    assert [size_of(n) for n in (0, 1, 16, 17, 129, 512, 513, 16384)] == [
        16,
        16,
        16,
        32,
        160,
        512,
        576,
        16384,
    ]


def test_only_plain_models_on_one_gpu() -> None:
    assert not can_be_graphed(a_model(DTIConfig()))
