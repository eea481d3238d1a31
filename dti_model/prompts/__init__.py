"""Streaming prompts: from users' histories to packed batches. One builder for training and for scoring.

A prompt is a range of one user's interactions: up to `window` of pure context, then up to `k` targets. k = 1 is a sliding-window
prompt. A batch puts prompts one after the other without padding: all context tokens, then one [SUM] per target.

    tokens of a prompt = prefix, item text, label text, item text, label text, ..., item text          (the last label has no reader)
"""

from dti_model.prompts.builder import PromptBuilder, StreamBatch, context_text, profile_text
from dti_model.prompts.format import PromptFormat
from dti_model.prompts.packing import PackedPrompts, consecutive_batches, deal
from dti_model.prompts.ranges import IntArray, Prompts

__all__ = [
    "IntArray",
    "PackedPrompts",
    "PromptBuilder",
    "PromptFormat",
    "Prompts",
    "StreamBatch",
    "consecutive_batches",
    "context_text",
    "deal",
    "profile_text",
]
