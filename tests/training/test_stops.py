"""How far it is from data to loss: the stops that a batch passes, each a function with a name."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from torch.nn import functional as F

from dti_kernels import windowed_attn
from dti_model.data import PreparedData
from dti_model.model.attention import StreamAttention, StreamDecoderLayer, token_logits
from dti_model.prompts import PackedPrompts, PromptBuilder, Prompts
from dti_model.training import StreamTrainer, train
from tests.training.small_runs import small_run

STOPS: tuple[Any, ...] = (
    PreparedData.targets,
    Prompts.streaming,
    PackedPrompts.__getitem__,
    PromptBuilder.batch,
    StreamTrainer._collate,
    StreamTrainer.compute_loss,
    token_logits,
    StreamDecoderLayer.forward,
    StreamAttention.forward,
    windowed_attn,
    F.cross_entropy,
)


def test_a_batch_passes_these_stops_from_data_to_loss(small_folder: Path, tmp_path: Path) -> None:
    """In this order. There were thirteen: a batch was taken apart for the model's arguments, and put together for Trainer."""
    names = {stop.__code__: stop.__qualname__ for stop in STOPS}
    passed: dict[str, None] = {}

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code in names:
            passed[names[frame.f_code]] = None

    config = small_run(small_folder, tmp_path / "run", score_test=False)
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, max_steps=1))
    sys.setprofile(note)
    try:
        train(config)
    finally:
        sys.setprofile(None)
    assert list(passed) == [stop.__qualname__ for stop in STOPS]
    assert len(STOPS) <= 11
