"""Published figures of GPUs. Peaks are the product's (`dti_model/training/flops.py`)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from dti_model.training import PEAK_TFLOPS


@dataclass(frozen=True)
class Card:
    """One board."""

    name: str  # part of the device's name, and key of `PEAK_TFLOPS`
    other_boards: str  # pattern of device names of this name that are slower boards
    memory_gb_s: float  # bandwidth of its memory
    node_gb_s: float  # to a peer inside the node
    network_gb_s: float  # to a peer in another node

    @property
    def tflops(self) -> float:
        """Dense bfloat16 peak, without sparsity."""
        return PEAK_TFLOPS[self.name]


CARDS = (
    Card("A100", "PCIE|40GB", 2039, 300, 25),  # NVIDIA A100 80GB SXM data sheet; DGX A100: 200 Gb/s a GPU
    Card("H100", "PCIe|NVL", 3350, 450, 50),  # NVIDIA H100 SXM data sheet; DGX H100: 400 Gb/s a GPU
    Card("H200", "NVL", 4800, 450, 50),  # NVIDIA H200 SXM data sheet; DGX H200: 400 Gb/s a GPU
    Card("B200", "GB200", 8000, 900, 50),  # NVIDIA DGX B200 data sheet
    Card("MI300X", "", 5300, 448, 50),  # AMD Instinct MI300X data sheet
)


def card_of(machine: str) -> Card | None:
    """The card of a device's name; None where it is not in the list."""
    found = (card for card in CARDS if card.name in machine)
    return next((c for c in found if not (c.other_boards and re.search(c.other_boards, machine))), None)
