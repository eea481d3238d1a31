"""Packed passes of scoring: what a pass is given, on the host, and the model's logits of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from dti_kernels import StreamLayout
from dti_model.config import DTIConfig
from dti_model.model.attention import token_logits
from dti_model.model.past import LayerKeys, Past, concatenated
from dti_model.precision import Resolved, computing, wants_few_shapes


@dataclass(frozen=True, eq=False)
class PackedPass:
    """A packed batch of prompts, on the host.

    Attributes:
        input_ids: `(T,)` int64, context tokens in layout order, then one [SUM] token per target.
        layout: of the batch, on the CPU.
        known: `(T,)` bool, context rows whose keys an earlier pass has computed.
        states: the keys of the known rows, in their order, by layer: an entry for each part that has an earlier pass.
    """

    input_ids: npt.NDArray[np.int64]
    layout: StreamLayout
    known: npt.NDArray[np.bool_]
    states: Sequence[Sequence[LayerKeys]] = ()


class Passes:
    """Passes of a model without gradients, one at a time, as they come.

    Attributes:
        model: the result of `apply_dti` in evaluation mode, cast to the precision.
    """

    def __init__(
        self, model: nn.Module, config: DTIConfig, tokens: Sequence[int], precision: Resolved
    ) -> None:
        """Passes of a model.

        Args:
            model: the result of `apply_dti`, and of `cast_once`.
            config: the one the model was made with.
            tokens: token ids whose logits are wanted.
            precision: to compute in.
        """
        self.model = model
        self._config, self._tokens, self._precision = config, tokens, precision

    @property
    def device(self) -> torch.device:
        """Of the model."""
        return next(self.model.parameters()).device

    @torch.no_grad()
    def compute(self, packed: PackedPass, records: bool = False) -> tuple[Tensor, list[LayerKeys]]:
        """Logits `(S, tokens)` at the [SUM] rows, on the device, and the keys of all context rows by layer if they are wanted.

        Args:
            packed: what to compute.
            records: whether the keys are wanted; False: the second result is empty.
        """
        device, past = self.device, None
        if packed.states:
            where = [
                torch.from_numpy(np.flatnonzero(mask)).to(device) for mask in (packed.known, ~packed.known)
            ]
            past = Past(concatenated(packed.states), *where)
        recorded: list[LayerKeys] = []
        with computing(self._precision, device):
            logits = token_logits(
                self.model,
                torch.from_numpy(packed.input_ids[~packed.known]).to(device),
                packed.layout.to(device),
                self._config,
                self._tokens,
                past=past,
                recorded=recorded if records else None,
                few_shapes=wants_few_shapes(self._precision, device),
            )
        return logits, recorded
