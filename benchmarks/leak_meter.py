"""The leak meter: how much a [SUM] depends on interactions outside its window.

    leak = |gradient of its logit margin on token embeddings outside the window| / |gradient on all of the prompt's embeddings|

    python -m benchmarks.leak_meter [--layers 1 2 3 4 6 8] [--size smoke]      random weights, by layers and reset
    python -m benchmarks.leak_meter --run RUN [--out ROWS.jsonl] [--record]     a trained run, on its validation histories

Exactly 0 with one layer, and with full reset in every layer. A context token of layer L has mixed in up to L windows, so from the
second layer on a [SUM] reads what lies before its window; from the third on through its own item text too, which the reset
leaves alone unless `alpha_own` is 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.recording import make_parser, parse_measuring
from benchmarks.shapes import shape
from benchmarks.synthetic import random_model
from dti_kernels import StreamLayout
from dti_model.config import DTIConfig
from dti_model.model import MODEL_FOLDER, Run, apply_dti, model_from, model_inputs
from dti_model.prompts import Prompts

LAST, ALL = (-1,), None
# Name: ratios (alpha_min, alpha_max, alpha_own) and layers; None stands for every layer.
RESETS: dict[str, tuple[tuple[float, float, float], tuple[int, ...] | None]] = {
    "no reset": ((0.0, 0.0, 0.0), LAST),
    "0 .. 0.5, last layer": ((0.0, 0.5, 0.0), LAST),
    "0 .. 1, last layer": ((0.0, 1.0, 0.0), LAST),
    "1, last layer": ((1.0, 1.0, 0.0), LAST),
    "1, every layer": ((1.0, 1.0, 0.0), ALL),
    "1, every layer, own text too": ((1.0, 1.0, 1.0), ALL),
}
WINDOW, ITEM_TOKENS, VOCAB = 20, 6, 256
Example = tuple[Tensor, StreamLayout, Tensor]


def dti_config(reset: str, num_layers: int) -> DTIConfig:
    """The setting of a name in `RESETS`."""
    (low, high, own), layers = RESETS[reset]
    layers = tuple(range(num_layers)) if layers is None else layers
    return DTIConfig("dti", alpha_min=low, alpha_max=high, alpha_own=own, reset_layers=layers)


def leak(model: PreTrainedModel, config: DTIConfig, example: Example, answers: tuple[int, int]) -> float:
    """Leak of the one target of a prompt.

    Args:
        model: the result of `apply_dti` with this config.
        config: which fixes [SUM] rows get.
        example: input ids `(T,)`, layout of one prompt with one target, and `(C,)` bool: context token outside the window.
        answers: tokens of no and yes; the margin between their logits is differentiated.
    """
    input_ids, layout, outside = example
    embedded = model.get_input_embeddings()(input_ids).detach().requires_grad_()
    inputs = model_inputs(input_ids, layout, config)
    output = model(**{**inputs, "input_ids": None, "inputs_embeds": embedded[None]})
    no, yes = answers
    (gradient,) = torch.autograd.grad(output.logits[0, 0, yes] - output.logits[0, 0, no], embedded)
    context = gradient[: layout.num_context].double().norm(dim=-1)
    return float(context[outside].norm() / context.norm())


def random_example(num_interactions: int, seed: int, window: int = WINDOW) -> Example:
    """A prompt of random tokens whose last interaction is the target."""
    rng = np.random.default_rng(seed)
    items = rng.integers(2, 2 * ITEM_TOKENS - 1, num_interactions).tolist()
    layout = StreamLayout.build([items], [[1] * (num_interactions - 1) + [0]], [1], window)
    ids = torch.from_numpy(rng.integers(0, VOCAB, layout.num_rows))
    num_outside = sum(items[: -window - 1]) + max(num_interactions - window - 1, 0)
    outside = torch.arange(layout.num_context) < num_outside
    return ids, layout, outside


def random_network(num_layers: int, config: DTIConfig) -> PreTrainedModel:
    """A small Llama of random weights, large enough for attention to be far from uniform."""
    settings = shape(num_layers, 64, 4, 2, 128, VOCAB) | {"initializer_range": 0.125}
    return apply_dti(random_model(settings, seed=0).double().eval(), config)


def measure_random(layers: list[int], num_prompts: int) -> list[dict[str, Any]]:
    """One row per number of layers and reset, the mean over prompts; histories are longer than any path is."""
    rows = []
    for num_layers in layers:
        examples = [random_example((WINDOW + 1) * (num_layers + 1), seed) for seed in range(num_prompts)]
        for reset in RESETS:
            config = dti_config(reset, num_layers)
            model = random_network(num_layers, config)
            found = [leak(model, config, example, (0, 1)) for example in examples]
            rows.append(_row("random weights", num_layers, reset, found))
    return rows


def measure_run(folder: Path, num_targets: int) -> list[dict[str, Any]]:
    """One row per reset for a trained run, on validation targets with a long history before the window."""
    run = Run.load(folder, device="cpu")
    config, examples = run.config, list(_validation_examples(run, num_targets))
    rows = []
    for reset in (None, *RESETS):
        dti = config.dti if reset is None else replace(dti_config(reset, config.model.layers), mode="dti")
        model = apply_dti(model_from(folder / MODEL_FOLDER), dti).double().eval()
        found = [leak(model, dti, example, run.builder.format.labels) for example in examples]
        name = f"{config.dti.mode}, k = {config.k or 'all'}"
        row = _row(name, config.model.layers, reset or "as trained", found)
        rows.append({**row, "run": folder.name})
    return rows


def _validation_examples(run: Run, num_targets: int) -> Iterator[Example]:
    """Prompts of a whole history up to a target; the last [SUM] is the only one."""
    data, window, builder = run.data, run.config.window, run.builder
    rows = data.targets("val")
    first = data.history_offsets[data.users_of(rows)]
    rows = rows[rows - first >= 3 * window]
    step = max(1, len(rows) // num_targets)
    for row in rows[::step][:num_targets].tolist():
        user_first = int(data.history_offsets[data.users_of(np.array([row]))[0]])
        start = max(user_first, row - (run.config.model.layers + 1) * window)
        prompt = Prompts.of(np.array([start]), np.array([row]), np.array([row + 1]))
        batch = builder.batch(prompt)
        prefix = int(builder.prefix_lengths(prompt)[0])
        end = np.array([row - window])
        before = int(builder.num_rows(Prompts.of(np.array([start]), end, end))[0])
        position = torch.arange(batch.layout.num_context)
        # num_rows counts no label after a prompt's last interaction; here that label is read.
        yield (
            batch.input_ids,
            batch.layout,
            (position >= prefix) & (position < before + builder.format.label_length),
        )


def _row(weights: str, num_layers: int, reset: str, found: list[float]) -> dict[str, Any]:
    row = {"benchmark": "leak", "weights": weights, "layers": num_layers, "reset": reset}
    return {**row, "prompts": len(found), "leak": float(np.mean(found)), "largest": max(found)}


def main() -> None:
    """Measure, print and keep the rows."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--layers", type=int, nargs="+", default=[1, 2, 3, 4, 6, 8])
    add("--prompts", type=int, default=8)
    add("--run", type=Path, help="run folder of `dti train`")
    options = parse_measuring(parser, "leak", {"layers": [1, 2], "prompts": 2})
    if options.run is not None:
        rows = measure_run(options.run, options.prompts)
    else:
        rows = measure_random(options.layers, options.prompts)
    for row in rows:
        print(
            f"{row['weights']:20} {row['layers']:2} layers  {row['reset']:30} {row['leak']:.4f} (largest {row['largest']:.4f})"
        )
    options.rows.keep(rows)


if __name__ == "__main__":
    main()
