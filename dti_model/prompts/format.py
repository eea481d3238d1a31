"""Token ids around the item texts of a prompt."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from dti_model.data import LABEL_TEXTS, SUM, label_tokens


@dataclass(frozen=True)
class PromptFormat:
    """Token ids around the item texts.

    Attributes:
        prefix: tokens before the first interaction (a BOS token, where the tokenizer has one: a place for attention to rest;
            then an instruction).
        sum_token: the [SUM] token.
        labels: the token of a negative and of a positive label: label text in the history, answer at the [SUM].
        window: n, preceding interactions that a target may use.
        max_item_tokens: item texts are cut to this many tokens.
    """

    prefix: tuple[int, ...]
    sum_token: int
    labels: tuple[int, int]
    window: int = 20
    max_item_tokens: int = 128

    @staticmethod
    def of(
        tokenizer: PreTrainedTokenizerBase, window: int, max_item_tokens: int = 128, instruction: str = ""
    ) -> PromptFormat:
        """The format of a tokenizer that has [SUM] and a pair of `LABEL_TEXTS` as single tokens.

        Raises:
            ValueError: one of the words is not a single token, or a count is out of range.
        """
        if window < 0 or max_item_tokens < 1:
            raise ValueError(
                f"window must be >= 0 and max_item_tokens >= 1, got {window} and {max_item_tokens}"
            )
        sums = tokenizer.encode(SUM, add_special_tokens=False)
        if len(sums) != 1:
            raise ValueError(f"{SUM!r} must be one token of the tokenizer, but is {len(sums)}")
        prefix = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        if instruction:
            prefix += tokenizer.encode(instruction, add_special_tokens=False)
        labels = label_tokens(tokenizer)
        if labels is None:
            raise ValueError(
                f"the tokenizer has no label words: of the pairs {', '.join(map(repr, LABEL_TEXTS))} none is two single tokens"
            )
        return PromptFormat(tuple(prefix), sums[0], labels, window, max_item_tokens)
