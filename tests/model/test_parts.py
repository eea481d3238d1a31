"""Layers whose parts are compiled compute what layers of PyTorch's operators compute, whatever the batch, without compiling again."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from dti_kernels import StreamLayout
from dti_model.config import DTIConfig, LoraSettings, OptimConfig
from dti_model.model import EAGER, Parts, add_lora, apply_dti, compiled_parts, token_logits
from dti_model.model.run import Run
from dti_model.precision import Resolved, computing
from dti_model.training import train
from tests.conftest import ROOT
from tests.model.test_attention import llama
from tests.training.small_runs import small_run, train_until

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def parts() -> Parts:
    return compiled_parts(CPU)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return apply_dti(llama(), DTIConfig("dti", reset_layers=(0, 2)))


def batch(num_items: int) -> tuple[Tensor, StreamLayout]:
    layout = StreamLayout.build([[3, 2, 4] * num_items], [[1] * 3 * num_items], [9], 4)
    ids = torch.randint(2, 50, (layout.num_rows,), generator=torch.manual_seed(num_items))
    ids[layout.num_context :] = 1
    return ids, layout


def results(model: Any, num_items: int, precision: Resolved, parts: Parts) -> list[Tensor]:
    """Logits, and the gradients of all trained weights."""
    model.zero_grad()
    ids, layout = batch(num_items)
    with computing(precision, CPU):
        logits = token_logits(
            model,
            ids,
            layout,
            DTIConfig("dti", reset_layers=(0, 2)),
            few_shapes=precision == "bf16",
            parts=parts,
        )
    logits.float().square().mean().backward()
    return [logits.detach().float(), *(x.grad.clone() for x in model.parameters() if x.requires_grad)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["whole", "lora"])
def test_same_results(kind: str, precision: Resolved, model: LlamaForCausalLM, parts: Parts) -> None:
    """In bfloat16: not much farther from float32 than without compiling, where every operator rounds."""
    torch.manual_seed(1)
    of: Any = model
    if kind == "lora":
        of = add_lora(
            apply_dti(llama(), DTIConfig("dti", reset_layers=(0, 2))), LoraSettings(rank=4), 1
        ).eval()
        for name, weight in of.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1)
    for num_items in (7, 20):
        exact, eager = results(of, num_items, "fp32", EAGER), results(of, num_items, precision, EAGER)
        compiled = results(of, num_items, precision, parts)
        if precision == "fp32":
            for actual, wanted in zip(compiled, exact, strict=True):
                assert (actual - wanted).norm() <= 1e-5 * wanted.norm()
        else:
            assert mean_error(compiled, exact) <= 1.25 * mean_error(eager, exact)


def mean_error(results: list[Tensor], exact: list[Tensor]) -> float:
    """Relative errors, averaged over logits and gradients."""
    return float(torch.stack([(x - y).norm() / y.norm() for x, y in zip(results, exact, strict=True)]).mean())


def test_batches_of_other_sizes_use_what_is_compiled(model: LlamaForCausalLM, parts: Parts) -> None:
    for num_items in (7, 20):
        results(model, num_items, "bf16", parts)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for num_items in (5, 11, 40):
            results(model, num_items, "bf16", parts)


def test_a_run_that_is_broken_off_ends_like_a_whole_one(small_folder: Path, tmp_path: Path) -> None:
    """Bit for bit, though the first batch that another process compiles for is another one."""
    optim = OptimConfig(epochs=1, token_budget=600, save_steps=1, precision="fp32", compile=True)
    whole, broken = (small_run(small_folder, tmp_path / name, optim=optim) for name in ("whole", "broken"))
    for step in (partial(train, whole), partial(train_until, 2, broken), partial(train, broken)):
        torch._dynamo.reset()
        compiled_parts.cache_clear()
        step()
    weights = [(config.out / "model" / "model.safetensors").read_bytes() for config in (whole, broken)]
    assert weights[0] == weights[1]
    eager = small_run(
        small_folder, tmp_path / "eager", optim=OptimConfig(epochs=1, token_budget=600, precision="fp32")
    )
    train(eager)
    pairs = zip(Run.load(whole.out).model.parameters(), Run.load(eager.out).model.parameters(), strict=True)
    differences = [float((one - other).detach().abs().max()) for one, other in pairs]
    assert 0 < max(differences) < 0.01


def test_a_machine_without_compiler(tmp_path: Path) -> None:
    code = "import torch; from dti_model.model import compiled_parts; compiled_parts(torch.device('cpu'))"
    environment = {
        **os.environ,
        "CXX": str(tmp_path / "none"),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
    }
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    last = process.stderr.strip().splitlines()[-1]
    assert process.returncode == 1
    assert last.startswith("ValueError: optim.compile: torch.compile does not work on this machine (")
    assert last.endswith("install g++, or name one in CXX; or leave optim.compile out")
    assert len(last) < 500
