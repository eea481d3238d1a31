"""Passes as CUDA graphs, with replays that compute again what was captured (`benchmarks.scoring.Rerun`): everything that differs between
two requests reaches the model through buffers, and what is left of the last request there reaches nobody."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dti_model.config import MODES, DTIConfig
from dti_model.model import GraphedPasses, PackedPass, Passes, cast_once, graphs
from dti_model.model.graphs import Bucket, Buffers
from tests.model.packed_passes import (
    KINDS,
    LABELS,
    ONE,
    OTHER,
    RESET,
    TWO,
    Watched,
    a_model,
    a_pass,
    graphed,
    history_of,
    poison,
    requests,
    same_bits,
    uncaptured,
    with_lora,
)
from tests.threads import in_threads

TOLERANCE = 1e-4  # of logits of a few units, in float32


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
def test_replays_give_the_bits_of_eager_passes(mode: str, kind: str, made: list[Watched]) -> None:
    config = DTIConfig(mode, **{name: getattr(RESET, name) for name in ("alpha_max", "reset_layers")})
    model = a_model(config)
    plain, padded = Passes(model, config, LABELS, "fp32"), uncaptured(model, config)
    passes = graphed(model, config)
    all_of_them = requests(kind, plain)
    assert len({Bucket.of(*request) for request in all_of_them}) == 1
    found = []
    for packed, records in [*all_of_them, *all_of_them]:
        poison(passes)
        found.append(passes.compute(packed, records))
        expected, near = padded.compute(packed, records), plain.compute(packed, records)
        assert same_bits(found[-1], expected)
        for one, other in zip([found[-1][0], *sum(found[-1][1], ())], [near[0], *sum(near[1], ())]):
            assert (one is None) == (other is None)
            if one is not None:
                assert one.shape == other.shape
                assert torch.allclose(one, other, atol=TOLERANCE, rtol=TOLERANCE)
    # The first was computed, the second captured, the others replayed; and no result was overwritten by a later one.
    assert (made[-1].captured, made[-1].replayed) == (1, 5)
    for first, again in zip(found[:3], found[3:]):
        assert same_bits(first, again)
    assert found[0][0].numel() == 0 or not torch.equal(found[0][0][:1], found[1][0][:1])


@pytest.mark.parametrize("part", ["input_ids", "rows", "known", "given", "layers"])
def test_each_buffer_is_what_passes_read(
    part: str, made: list[Watched], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the test above: a pass that kept one of them of an earlier request would give other numbers, or none."""
    model = a_model(RESET)
    passes, padded = graphed(model), uncaptured(model)
    first, second, third = (
        request for request, _ in requests("states", Passes(model, RESET, LABELS, "fp32"))
    )
    passes.compute(first)
    passes.compute(first)
    (graph,) = passes._graphs.values()
    buffers = graph.buffers
    kept = buffers.layout.rows if part == "rows" else getattr(buffers, part)
    old = [layer.mapped(torch.clone) for layer in kept] if part == "layers" else kept.clone()
    fill = Buffers.fill

    def fill_without(self: Buffers, packed: PackedPass) -> None:
        fill(self, packed)
        if part == "layers":
            graphs._copy(old, kept)
        else:
            kept.copy_(old)

    assert torch.equal(passes.compute(second)[0], padded.compute(second)[0])
    with monkeypatch.context() as patch:
        patch.setattr(Buffers, "fill", fill_without)
        assert not torch.equal(passes.compute(second)[0], padded.compute(second)[0])
    assert torch.equal(passes.compute(third)[0], padded.compute(third)[0])


FORBIDDEN = {
    *("_local_scalar_dense", "item", "is_nonzero", "equal"),  # read by the host
    *(
        "nonzero",
        "masked_select",
        "unique_dim",
        "_unique2",
        "bincount",
        "repeat_interleave",
    ),  # a size that is
    *("lift_fresh", "lift_fresh_copy", "scalar_tensor"),  # made on the host, to be copied
    *("bernoulli_", "uniform_", "normal_", "native_dropout", "rand", "randn"),
}


class Capturing(TorchDispatchMode):
    """Refuses what a capture forbids, as far as a CPU can tell."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name in FORBIDDEN:
            raise RuntimeError(f"{name}: operation not permitted when stream is capturing")
        return function(*args, **(kwargs or {}))


class Strict(Watched):
    """Captures and replays as a device would."""

    def capture(self, forward: Any) -> Any:
        forward()

        def strict() -> Any:
            with pytest.MonkeyPatch.context() as patch, Capturing():
                patch.setattr("transformers.masking_utils.is_tracing", lambda *_: True)  # it asks the stream
                return forward()

        return super().capture(strict)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("lora", [False, True])
def test_nothing_in_a_pass_forbids_a_capture(
    mode: str, kind: str, precision: Any, lora: bool, made: list[Watched]
) -> None:
    config = DTIConfig(mode, alpha_max=0.5)
    model = with_lora(a_model(config)) if lora else a_model(config)
    model = cast_once(model, precision)
    plain = Passes(model, config, LABELS, precision)
    passes = GraphedPasses(model, config, LABELS, precision, Strict)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for packed, records in [*requests(kind, plain), *requests(kind, plain)]:
            passes.compute(packed, records)
    assert (made[-1].captured, made[-1].replayed) == (1, 5)


@pytest.mark.parametrize(
    "refused", [lambda x: x.logits.sum().item(), lambda x: x.logits[:, [0]], lambda x: x.logits.nonzero()]
)
def test_what_forbids_a_capture_is_noticed(refused: Any, made: list[Watched]) -> None:
    """Of the test above. Without the index that stays on the device, peft's trained rows forbid it too."""
    passes = GraphedPasses(a_model(RESET), RESET, LABELS, "fp32", Strict)
    forward = passes._forward
    calls = []

    def reads(*arguments: Any) -> Any:
        calls.append(refused(outputs := forward(*arguments)))
        return outputs

    passes._forward = reads  # type: ignore[method-assign]
    passes.compute(a_pass(ONE, 0))
    with pytest.warns(UserWarning, match="not permitted when stream is capturing"):
        passes.compute(a_pass(ONE, 0))


def test_trained_rows_find_their_place_on_the_device(
    made: list[Watched], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = with_lora(a_model(RESET))
    before = Passes(model, RESET, LABELS, "fp32").compute(a_pass(ONE, 0))[0]
    with monkeypatch.context() as patch:
        patch.setattr(graphs, "keep_token_indices", lambda model: None)
        passes = GraphedPasses(model, RESET, LABELS, "fp32", Strict)
        passes.compute(a_pass(ONE, 0))
        with pytest.warns(UserWarning, match="lift_fresh"):
            passes.compute(a_pass(ONE, 0))
    graphs.keep_token_indices(model)
    for same in (model, pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(Passes(same, RESET, LABELS, "fp32").compute(a_pass(ONE, 0))[0], before)


def sized(num_candidates: int) -> PackedPass:
    return a_pass([([3], [4] * num_candidates)], num_candidates)


def test_the_least_recently_used_graph_goes(made: list[Watched]) -> None:
    model = a_model(RESET)
    passes, padded = graphed(model, most_graphs=2), uncaptured(model)
    capture = made[0]
    a, b, c = map(sized, (2, 20, 40))
    for packed in (a, a, b, b, a, c, c):  # drops b
        assert same_bits(passes.compute(packed), padded.compute(packed))
    assert (capture.captured, len(passes._graphs)) == (3, 2)
    assert list(passes._graphs) == [Bucket.of(a, False), Bucket.of(c, False)]
    # b needs four passes now, and drops a.
    for _ in range(3):
        assert same_bits(passes.compute(b), padded.compute(b))
    assert capture.captured == 3
    passes.compute(b)
    assert capture.captured == 4
    replayed = capture.replayed
    for packed in (b, c, b):
        assert same_bits(passes.compute(packed), padded.compute(packed))
    assert capture.replayed == replayed + 3
    for _ in range(3):
        passes.compute(a)
    assert capture.captured == 4


def test_threads_take_turns(made: list[Watched]) -> None:
    """`Rerun` raises where two passes run at a time, and results are each thread's own."""
    model = a_model(RESET)
    passes, padded = graphed(model, most_graphs=2), uncaptured(model)
    wrong: list[object] = []

    def work(thread: int) -> None:
        for packed in (a_pass(ONE, thread), sized(20), a_pass(OTHER, thread), sized(40)) * 4:
            if not torch.equal(passes.compute(packed)[0], padded.compute(packed)[0]):
                wrong.append("another's")

    in_threads(work, 4)
    assert wrong == []
    assert made[0].replayed > 16


def test_changes_of_the_model(made: list[Watched]) -> None:
    model = a_model(RESET)
    passes, packed = graphed(model), a_pass(ONE, 0)
    for _ in range(3):
        passes.compute(packed)
    before = passes.compute(packed)[0]
    with torch.no_grad():  # in place: seen
        model.model.embed_tokens.weight.mul_(1.5)
    assert not torch.equal(passes.compute(packed)[0], before)
    assert torch.equal(passes.compute(packed)[0], uncaptured(model).compute(packed)[0])
    assert len(made) == 2  # the other is the one without captures
    model.double()  # weights lie elsewhere: from the beginning
    assert torch.equal(passes.compute(packed)[0], uncaptured(model).compute(packed)[0])
    assert passes.compute(packed)[0].dtype == torch.float64
    assert len(made) == 4
    model.train()  # random numbers: never captured
    replayed = [capture.replayed for capture in made]
    passes.compute(packed)
    assert [capture.replayed for capture in made] == replayed


def test_adapters_that_are_switched_or_merged(made: list[Watched]) -> None:
    model = with_lora(a_model(RESET))
    passes, packed = graphed(model), a_pass(ONE, 0)
    for _ in range(3):
        passes.compute(packed)
    before = passes.compute(packed)[0]
    with model.disable_adapter():
        disabled = passes.compute(packed)[0]
        assert torch.equal(disabled, uncaptured(model).compute(packed)[0])
    assert not torch.allclose(disabled, before, atol=1e-2)
    assert torch.equal(passes.compute(packed)[0], before)
    for _ in range(3):
        passes.compute(packed)
    model.merge_adapter()
    assert torch.allclose(passes.compute(packed)[0], before, atol=1e-3, rtol=1e-3)


def test_callers_in_inference_mode(made: list[Watched]) -> None:
    model = a_model(RESET)
    passes, (request, *_) = graphed(model), requests("append", Passes(model, RESET, LABELS, "fp32"))
    expected = uncaptured(model).compute(*request)
    for inference in (True, True, False, True):
        with torch.inference_mode(inference):
            part = ONE[0]
            packed = a_pass([(part[0], [4])], 0, {0: history_of(part, 0, passes)})
            assert torch.allclose(passes.compute(packed)[0], expected[0], atol=TOLERANCE)
            assert same_bits(passes.compute(*request), expected)


@pytest.mark.parametrize("limit", ["rows", "FLOPs"])
def test_large_passes_are_not_padded(
    limit: str, made: list[Watched], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = a_model(RESET)
    passes, packed = graphed(model), a_pass(TWO, 0)
    rows = packed.layout.num_rows - 1
    weights = sum(x.numel() for x in model.model.layers[0].parameters())
    name, most = ("MOST_ROWS", rows) if limit == "rows" else ("MOST_FLOPS", 2.0 * weights * rows)
    monkeypatch.setattr(graphs, name, most)
    for _ in range(3):
        assert same_bits(passes.compute(packed), Passes(model, RESET, LABELS, "fp32").compute(packed))
    assert made[0].captured == 0


def test_no_pass_finds_what_autocast_has_cast_in_another(made: list[Watched]) -> None:
    """Inside a caller's autocast, its cache kept a capture's weights: memory of graphs, that the next replay writes to."""
    model = a_model(RESET)
    passes, packed = GraphedPasses(model, RESET, LABELS, "bf16", Watched), a_pass(ONE, 0)
    with torch.autocast("cpu", torch.bfloat16):
        before = passes.compute(packed)[0]
        with torch.no_grad():
            for layer in model.model.layers:
                layer.mlp.down_proj.weight.neg_()
        assert not torch.equal(passes.compute(packed)[0], before)


def test_a_model_that_has_left_the_gpu(made: list[Watched]) -> None:
    """There is nothing to capture with."""
    model = a_model(RESET)
    passes, packed = graphed(model), a_pass(TWO, 0)
    passes._kind = "cuda"
    for _ in range(3):
        assert same_bits(passes.compute(packed), Passes(model, RESET, LABELS, "fp32").compute(packed))
    assert made[0].captured == 0
