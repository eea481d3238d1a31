"""Token ids around the item texts of a prompt, and the template that they are made of.

    "{item}\n-> {label}\n"   before the item text nothing, then the cue "\n->", the label's token, and the separator "\n"

A [SUM] stands where its target's label would: behind the cue.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from dti_model.config import GLUED, ITEM, LABEL
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
        before: tokens before every item text.
        cue: tokens behind it (and behind the context of the interaction), before its label or its [SUM].
        separator: tokens behind every label.
    """

    prefix: tuple[int, ...]
    sum_token: int
    labels: tuple[int, int]
    window: int = 20
    max_item_tokens: int = 128
    before: tuple[int, ...] = ()
    cue: tuple[int, ...] = ()
    separator: tuple[int, ...] = ()

    @staticmethod
    def of(
        tokenizer: PreTrainedTokenizerBase,
        window: int,
        max_item_tokens: int = 128,
        instruction: str = "",
        template: str = GLUED,
    ) -> PromptFormat:
        """The format of a tokenizer that has [SUM] and a pair of `LABEL_TEXTS` as single tokens.

        Args:
            tokenizer: fast tokenizer of transformers.
            window: n, interactions.
            max_item_tokens: item texts are cut to this many tokens.
            instruction: text before the first interaction. Unless the template is `GLUED`, a line feed follows where it ends in none and
                in no blank.
            template: text around `{item}` and `{label}`. Of blanks before the label one is the label's own.

        Raises:
            ValueError: one of the words is not a single token, a count is out of range, or the template or the
                instruction holds [SUM].
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
            if template != GLUED and not instruction[-1].isspace():
                instruction += "\n"
            prefix += tokenizer.encode(instruction, add_special_tokens=False)
        labels = label_tokens(tokenizer)
        if labels is None:
            raise ValueError(
                f"the tokenizer has no label words: of the pairs {', '.join(map(repr, LABEL_TEXTS))} none is two single tokens"
            )
        before, rest = template.split(ITEM)
        cue, separator = rest.split(LABEL)
        around = [_encoded(tokenizer, text) for text in (before, cue.removesuffix(" "), separator)]
        if any(sums[0] in tokens for tokens in (prefix, *around)):
            raise ValueError(
                f"model.template and model.instruction must not hold {SUM!r}, which stands for targets"
            )
        return PromptFormat(tuple(prefix), sums[0], labels, window, max_item_tokens, *around)

    @property
    def label_length(self) -> int:
        """Tokens of a label text in the history."""
        return 1 + len(self.separator)


def _encoded(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """A text within a prompt: without the blank that some tokenizers put before the first word of a text."""
    if not text:
        return ()
    head, whole = (tokenizer.encode(one, add_special_tokens=False) for one in (":", f":{text}"))
    if whole[: len(head)] == head:
        return tuple(whole[len(head) :])
    return tuple(tokenizer.encode(text, add_special_tokens=False))
