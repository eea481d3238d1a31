"""How fast a run trains: targets/s, tokens/s and model-FLOPs utilisation (MFU).

A weight costs 2 FLOPs per row forward and 4 backward, 2 where it is frozen; a visible (row, key) pair 4 D forward and 8 D backward per
head. Recomputed activations do not count, nor do parts of the last layer that only [SUM] rows take, so MFU errs on the low side.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, TrainerCallback

from dti_kernels import StreamLayout

# Dense bfloat16 TFLOP/s of NVIDIA's and AMD's data sheets (without sparsity), by a part of the device's name; longer names first.
PEAK_TFLOPS = {
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "RTX 4090": 165,
    "MI300X": 1307,
    "B200": 2250,
    "H200": 989,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "A10G": 70,
    "A10": 125,
    "L4": 121,
}


def peak_flops(device: torch.device, bf16: bool) -> float | None:
    """Dense bfloat16 peak of a device in FLOP/s; None where it is not known, or the run computes in float32."""
    if device.type != "cuda" or not bf16:
        return None
    words = f" {torch.cuda.get_device_name(device).replace('-', ' ')} "
    return next((peak * 1e12 for name, peak in PEAK_TFLOPS.items() if f" {name} " in words), None)


@dataclass(frozen=True)
class StepCost:
    """FLOPs of training, forward and backward.

    Attributes:
        per_row: decoder layers but the last, per context token and [SUM].
        per_sum: last layer and LM head, per [SUM].
        per_pair: attention of all layers but the last, per visible pair.
    """

    per_row: int
    per_sum: int
    per_pair: int

    @staticmethod
    def of(model: PreTrainedModel | PeftModel) -> StepCost:
        """Counted from the model's weights, whole: before they are sharded."""
        config = model.config
        last = config.num_hidden_layers - 1
        head = model.get_output_embeddings().weight
        per_row, per_sum = 0, head.numel() * (6 if head.requires_grad else 4)
        for name, weight in model.named_parameters():
            if ".layers." in name and weight.ndim == 2:
                cost = weight.numel() * (6 if weight.requires_grad else 4)
                if int(name.split(".layers.")[1].split(".")[0]) == last:
                    per_sum += cost
                else:
                    per_row += cost
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return StepCost(per_row, per_sum, 12 * head_dim * config.num_attention_heads * last)

    def flops(self, layout: StreamLayout) -> int:
        """Of one packed batch; the layout is on the CPU."""
        pairs = layout.num_visible_pairs() if self.per_pair else 0
        return self.per_row * layout.num_rows + self.per_sum * layout.num_sum + self.per_pair * pairs


class Speed(TrainerCallback):
    """A stopwatch over training steps; validation and checkpoints in between do not count."""

    def __init__(self, peak: float | None) -> None:
        """`peak`: FLOP/s of all devices together, None where it is not known."""
        self.peak = peak
        self._began: float | None = None
        self._ended: float | None = None
        self._clear()

    def _clear(self) -> None:
        self.seconds, self.targets, self.tokens, self.flops = 0.0, 0.0, 0.0, 0.0

    def begin(self) -> None:
        """A step begins."""
        self._began = time.perf_counter()

    def add(self, targets: float, tokens: float, flops: float) -> None:
        """Count a step, over all devices."""
        self.targets += targets
        self.tokens += tokens
        self.flops += flops

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if self._began is not None:
            self._ended = time.perf_counter()
            self.seconds += self._ended - self._began
            self._began = None

    def report(self) -> dict[str, float]:
        """Rates since the last report. Call it once the device has done the last step, which its host may have ended early."""
        if not self.seconds:
            return {}
        if self._ended is not None:
            self.seconds += time.perf_counter() - self._ended
            self._ended = None
        rates = {"targets_per_s": self.targets / self.seconds, "tokens_per_s": self.tokens / self.seconds}
        if self.peak is not None:
            rates["mfu"] = self.flops / self.seconds / self.peak
        self._clear()
        return rates
