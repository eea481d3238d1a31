"""When there are no graphs any more: captures that fail, replays that are wrong, no memory, other weights."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from dti_model.model import GraphedPasses, Passes
from dti_model.model.graphs import Buffers
from tests.model.packed_passes import (
    LABELS,
    ONE,
    RESET,
    TWO,
    Watched,
    a_model,
    a_pass,
    graphed,
    same_bits,
    uncaptured,
)


def test_a_capture_that_fails_is_the_last(made: list[Watched]) -> None:
    class Failing(Watched):
        def capture(self, forward: Any) -> Any:
            self.captured += 1
            try:
                raise ValueError("the reason")
            except ValueError:
                raise RuntimeError("the capture was not begun") from None

    model = a_model(RESET)
    passes = GraphedPasses(model, RESET, LABELS, "fp32", Failing)
    padded, packed = uncaptured(model), a_pass(ONE, 0)
    expected = padded.compute(packed)
    passes.compute(packed)
    with pytest.warns(UserWarning, match=r"without CUDA graphs.*ValueError: the reason.*graphs=False"):
        assert same_bits(passes.compute(packed), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for parts in (ONE, TWO, ONE, TWO):
            passes.compute(a_pass(parts, 0))
        assert same_bits(passes.compute(packed), expected)
    assert made[0].captured == 1


def test_a_replay_that_is_wrong_is_the_last(made: list[Watched]) -> None:
    """It is compared with the pass itself, whose scores are what the caller gets."""

    class Wrong(Watched):
        def capture(self, forward: Any) -> Any:
            replay = super().capture(forward)

            def wrong() -> Any:
                outputs = replay()
                outputs.logits[0, 0] += 0.05 * outputs.logits.abs().max()
                return outputs

            return wrong

    model = a_model(RESET)
    passes = GraphedPasses(model, RESET, LABELS, "fp32", Wrong)
    packed = a_pass(ONE, 0)
    expected = uncaptured(model).compute(packed)
    passes.compute(packed)
    with pytest.warns(UserWarning, match=r"without CUDA graphs.*something else"):
        assert same_bits(passes.compute(packed), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same_bits(passes.compute(packed), expected)
    assert made[0].captured == 1


def test_keys_and_later_requests_are_compared_too(made: list[Watched]) -> None:
    """A host value of the captured request agrees with that request, and a history that is encoded has no logits."""

    class Remembering(Watched):
        def capture(self, forward: Any) -> Any:
            replay, first = super().capture(forward), []

            def remembering() -> Any:
                outputs = replay()
                first.append([x.clone() for layer in outputs.recorded for x in layer if x is not None])
                for x, old in zip(
                    (x for layer in outputs.recorded for x in layer if x is not None), first[0]
                ):
                    x.copy_(old)
                return outputs

            return remembering

    model = a_model(RESET)
    passes, padded = GraphedPasses(model, RESET, LABELS, "fp32", Remembering), uncaptured(model)
    for _ in range(2):
        passes.compute(a_pass(ONE, 0), records=True)
    other = a_pass(ONE, 1)
    with pytest.warns(UserWarning, match=r"without CUDA graphs.*something else"):
        assert same_bits(passes.compute(other, records=True), padded.compute(other, records=True))


def test_without_memory_for_graphs_passes_go_on(made: list[Watched], monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs hold memory that the pass alone would have: they are dropped, and the request has its scores."""
    model = a_model(RESET)
    passes, packed = graphed(model), a_pass(TWO, 0)
    expected = Passes(model, RESET, LABELS, "fp32").compute(packed)
    passes.compute(packed)
    with monkeypatch.context() as patch:
        patch.setattr(Buffers, "fill", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no memory")))
        assert same_bits(passes.compute(packed), expected)
    assert not passes._graphs
    padded = uncaptured(model).compute(packed)
    for _ in range(3):
        assert same_bits(passes.compute(packed), padded)
    assert len(passes._graphs) == 1


def test_weights_that_others_replace(made: list[Watched]) -> None:
    """`load_state_dict(assign=True)` puts other parameters in place; the old ones stay where they are."""
    model = a_model(RESET)
    passes, packed = graphed(model), a_pass(ONE, 0)
    for _ in range(3):
        passes.compute(packed)
    model.load_state_dict({name: 1.5 * x for name, x in model.state_dict().items()}, assign=True)
    assert same_bits(passes.compute(packed), uncaptured(model).compute(packed))
    assert not passes._graphs
