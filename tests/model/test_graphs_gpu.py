"""CUDA graphs on a GPU: their bits are those of the same passes without graphs. Everything here needs a CUDA or ROCm device.

In a rehearsal (`benchmarks.measuring.rehearsal`) the same tests run on a CPU, where a replay computes again what was captured.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from benchmarks.measuring import DEVICE
from benchmarks.scoring import CAPTURE, Rerun
from benchmarks.shapes import HEADS
from dti_model.config import DTIConfig
from dti_model.model import GraphedPasses, Passes, cast_once, passes_of
from tests.model.packed_passes import (
    KINDS,
    LABELS,
    ONE,
    OTHER,
    TWO,
    a_model,
    a_pass,
    history_of,
    poison,
    requests,
    same_bits,
    with_lora,
)
from tests.threads import in_threads

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA or ROCm device"
    ),
]
# Of models whose kernels `benchmarks.gpu.precompile` has compiled.
CONFIGS = {"dti": DTIConfig(), "dti-minus": DTIConfig("dti-minus")}
# Of probabilities in bfloat16, as `dti_model.scorer` promises.
BFLOAT16_BOUND = 0.02


def model_of(config: DTIConfig, lora: bool = False) -> Any:
    """In the precision and with the heads of SmolLM2, as a scorer has it."""
    if lora:
        return cast_once(with_lora(a_model(config, device=DEVICE, heads=HEADS["smollm"]), 0.01), "bf16")
    return a_model(config, torch.bfloat16, DEVICE, HEADS["smollm"])


def both(model: Any, config: DTIConfig, most_graphs: int = 32) -> tuple[GraphedPasses, GraphedPasses]:
    """Passes that are captured, and the same ones that are not."""
    captured = GraphedPasses(model, config, LABELS, "bf16", CAPTURE, most_graphs)
    eager = GraphedPasses(model, config, LABELS, "bf16", Rerun)
    eager._failed = True
    return captured, eager


@pytest.fixture(autouse=True)
def no_warning() -> Any:
    """A capture that fails is one, and passes go on without."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", CONFIGS)
def test_a_graph_gives_the_bits_of_eager_passes(mode: str, kind: str, lora: bool) -> None:
    config = CONFIGS[mode]
    model = model_of(config, lora)
    plain = Passes(model, config, LABELS, "bf16")
    captured, eager = both(model, config)
    found = []
    for packed, records in 2 * requests(kind, plain):
        # Numbers: where a NaN lies in a tile, kernels compute its rows again, which rounds otherwise.
        poison(captured, 1e3)
        found.append(captured.compute(packed, records))
        assert same_bits(found[-1], eager.compute(packed, records))
        away = found[-1][0].softmax(-1) - plain.compute(packed, records)[0].softmax(-1)
        assert (away.abs() < BFLOAT16_BOUND).all()
    assert len(captured._graphs) == 1
    for first, again in zip(found[:3], found[3:]):
        assert same_bits(first, again)


def test_graphs_share_memory_and_are_dropped() -> None:
    """Replays in any order, after others were dropped and captured again in what they left."""
    config = CONFIGS["dti"]
    model = model_of(config)
    captured, eager = both(model, config, most_graphs=2)
    passes = [a_pass([([3], [4] * count)], count) for count in (2, 20, 40, 100)]
    order = [0, 0, 1, 1, 0, 2, 2, 0, 2, 1, 1, 1, 1, 2, 3, 3, 1, 3, 0, 0, 0, 0, 3, 0]
    for place in order:
        assert same_bits(captured.compute(passes[place]), eager.compute(passes[place]))
    assert len(captured._graphs) == 2


def test_weights_that_change_in_place_and_weights_that_move() -> None:
    config = CONFIGS["dti"]
    model = model_of(config)
    captured, eager = both(model, config)
    packed = a_pass(ONE, 0)
    for _ in range(3):
        before = captured.compute(packed)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1.5)
    changed = captured.compute(packed)
    assert not same_bits(changed, before)
    assert same_bits(changed, eager.compute(packed))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    for _ in range(3):
        assert same_bits(captured.compute(packed), changed)


def test_threads_on_streams_of_their_own() -> None:
    config = CONFIGS["dti"]
    model = model_of(config)
    captured, eager = both(model, config, most_graphs=2)
    passes = [a_pass(parts, seed) for seed in range(4) for parts in (ONE, OTHER, TWO)]
    expected = [eager.compute(packed) for packed in passes]
    wrong: list[object] = []

    def work(thread: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for turn in range(40):
                place = (5 * thread + turn) % len(passes)
                if not same_bits(captured.compute(passes[place]), expected[place]):
                    wrong.append((thread, turn))

    in_threads(work, 4)
    assert wrong == []


def test_states_go_from_graph_to_graph() -> None:
    """An encoded history is a copy: it stays what it is while its graph computes another one."""
    config = CONFIGS["dti"]
    model = model_of(config)
    captured, eager = both(model, config)
    states = [history_of(ONE[0], seed, captured) for seed in range(5)]
    for seed, state in enumerate(states):
        packed = a_pass(ONE, seed, {0: state})
        again = a_pass(ONE, seed, {0: history_of(ONE[0], seed, eager)})
        assert same_bits(captured.compute(packed), eager.compute(again))


@pytest.mark.skipif(DEVICE != "cuda", reason="a rehearsal has no such device")
def test_models_on_a_gpu_are_captured_unless_they_are_not_to_be() -> None:
    config = CONFIGS["dti"]
    model = model_of(config)
    assert isinstance(passes_of(model, config, LABELS, "bf16", True), GraphedPasses)
    assert type(passes_of(model, config, LABELS, "bf16", False)) is Passes
    model.lm_head.cpu()
    assert type(passes_of(model, config, LABELS, "bf16", True)) is Passes
