"""Training steps as CUDA graphs on a GPU: their bits are those of the same steps without graphs. Everything here needs a CUDA or ROCm device.

In a rehearsal (`benchmarks.measuring.rehearsal`) the same tests run on a CPU, where a replay computes again what was captured.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from benchmarks.attention import Workload
from benchmarks.measuring import DEVICE
from benchmarks.scoring import CAPTURE
from benchmarks.shapes import HEADS, shape
from benchmarks.synthetic import random_model
from dti_model.config import DTIConfig, LoraSettings
from dti_model.model import add_lora, apply_dti, token_logits
from dti_model.prompts import StreamBatch
from dti_model.training import NO_LABEL, StepGraphs, padded_batch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA or ROCm device"
    ),
]
VOCABULARY = 97
# Of models whose kernels `benchmarks.gpu.precompile` has compiled.
CONFIGS = {"dti": DTIConfig(), "dti-minus": DTIConfig("dti-minus")}


@pytest.fixture(autouse=True)
def no_warning() -> Iterator[None]:
    """A capture that fails is one, and training goes on without. PyTorch's own warnings of what is not deterministic are others."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="training goes on without")
        yield


def batch(num_tokens: int, seed: int) -> StreamBatch:
    """Random tokens and labels, some with a prompt of three targets more or less than others, padded."""
    layout = Workload("train", num_tokens, 3, 1, 1, 1, window=4, mean_tokens=9, std_tokens=1).layout()
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (layout.num_rows,), generator=random)
    labels = torch.randint(2, (layout.num_sum,), generator=random)
    return padded_batch(StreamBatch(ids, layout, labels, torch.arange(layout.num_sum))).to(DEVICE)


class Training:
    """Some steps of a model with the heads and the precision of SmolLM2, with dropout, fused AdamW and clipping."""

    def __init__(self, config: DTIConfig, lora: bool, accumulation: int, captured: bool) -> None:
        heads = HEADS["smollm"]
        width = heads[0] * heads[2]
        self.config, self.accumulation = config, accumulation
        model = random_model(
            shape(3, width, heads[0], heads[1], 96, VOCABULARY, tied=not lora), device=DEVICE
        )
        self.model: Any = apply_dti(model, config, dropout=0.1)
        if lora:
            self.model = add_lora(self.model, LoraSettings(rank=2), VOCABULARY - 1)
        self.model.train()
        trained = [x for x in self.model.parameters() if x.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=DEVICE == "cuda")
        self.trained = trained
        self.graphs = StepGraphs(self.model, CAPTURE)
        self.graphs._failed = not captured

    def gradients(self, given: StreamBatch, count: torch.Tensor) -> torch.Tensor:
        with torch.autocast(DEVICE, torch.bfloat16):
            logits = token_logits(self.model, given.input_ids, given.layout, self.config)
        loss = F.cross_entropy(logits.float(), given.labels, reduction="sum", ignore_index=NO_LABEL) / count
        loss.backward()
        return loss.detach()

    def run(self, batches: list[StreamBatch]) -> list[float]:
        """Losses."""
        torch.manual_seed(1)
        losses = []
        for first in range(0, len(batches), self.accumulation):
            count = torch.tensor(200, device=DEVICE)
            for given in batches[first : first + self.accumulation]:
                losses.append(self.graphs.run(given, count, self.gradients))
            torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return [float(loss) for loss in losses]


@pytest.fixture
def deterministic() -> Iterator[None]:
    """As in a run, see `dti_model/training/driver.py`."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("mode", CONFIGS)
def test_graphs_of_several_shapes_train_with_the_bits_of_eager_steps(
    mode: str, lora: bool, accumulation: int
) -> None:
    """Losses of every batch, and weights after the last step."""
    sizes = [200, 300] * 2 + [200, 300, 300, 200] * 3
    batches = [batch(size, seed) for seed, size in enumerate(sizes)]
    found = []
    for captured in (False, True):
        training = Training(CONFIGS[mode], lora, accumulation, captured)
        losses = training.run(batches)
        assert training.graphs.num_graphs == 2 * captured
        found.append((losses, [x.detach().clone() for x in training.trained]))
    (losses, weights), (again, same) = found
    assert again == losses
    assert len(set(losses)) == len(losses)
    for one, other in zip(weights, same, strict=True):
        assert torch.equal(one, other)


@pytest.mark.skipif(DEVICE != "cuda", reason="a rehearsal has no such device")
def test_memory_is_that_of_one_step_whatever_the_number_of_graphs() -> None:
    batches = [batch(size, size) for size in (900, 1000, 1100, 1200)]
    training = Training(CONFIGS["dti"], False, 1, True)
    used = []
    for given in batches[::-1]:
        training.run([given] * 3)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        used.append(torch.cuda.memory_reserved())
    assert training.graphs.num_graphs == 4
    # Buffers of inputs and small results; what lies between is shared.
    assert used[-1] < 1.5 * used[0]
