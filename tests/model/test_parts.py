"""Layers whose parts are compiled compute what layers of PyTorch's operators compute, whatever the batch, without compiling again."""

from __future__ import annotations

import copy
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
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from dti_kernels import StreamLayout
from dti_model.config import DTIConfig, LoraSettings, OptimConfig
from dti_model.model import EAGER, Parts, add_lora, apply_dti, compiled_parts, token_logits
from dti_model.model.run import Run
from dti_model.precision import Resolved, computing
from dti_model.training import train
from tests.conftest import ROOT, needs_torch_compile
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
    torch.manual_seed(2)  # of dropout
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


def with_lora() -> Any:
    torch.manual_seed(1)
    model: Any = add_lora(
        apply_dti(llama(), DTIConfig("dti", reset_layers=(0, 2))), LoraSettings(rank=4, dropout=0.3), 1
    )
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return model


@needs_torch_compile
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["whole", "lora", "lora with dropout"])
def test_same_results(kind: str, precision: Resolved, model: LlamaForCausalLM, parts: Parts) -> None:
    """In bfloat16: not much farther from float32 than without compiling, where every operator rounds."""
    of = model if kind == "whole" else with_lora().train(kind == "lora with dropout")
    for num_items in (7, 20):
        exact, eager = results(of, num_items, "fp32", EAGER), results(of, num_items, precision, EAGER)
        compiled = results(of, num_items, precision, parts)
        most = 1e-5 if precision == "fp32" else 1.5 * mean_error(eager, exact)
        assert mean_error(compiled, exact) <= most


def mean_error(results: list[Tensor], exact: list[Tensor]) -> float:
    """Relative errors, averaged over logits and gradients."""
    return float(torch.stack([(x - y).norm() / y.norm() for x, y in zip(results, exact, strict=True)]).mean())


@needs_torch_compile
def test_batches_of_other_sizes_use_what_is_compiled(model: LlamaForCausalLM, parts: Parts) -> None:
    """There is another variant for more than 4,096 rows."""
    for num_items in (7, 20, 500):
        results(model, num_items, "bf16", parts)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for num_items in (5, 11, 40, 600):
            results(model, num_items, "bf16", parts)


@needs_torch_compile
def test_models_of_many_widths(parts: Parts) -> None:
    """As a search over widths has them in one process: PyTorch compiles eight variants, and computes others as they are with a warning."""
    with torch.no_grad(), torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for width in range(16, 16 * 12, 16):
            norm, x = LlamaRMSNorm(width), torch.randn(1, 5, width)
            torch.testing.assert_close(parts.normed(norm, x), norm(x))


@needs_torch_compile
def test_hooks_are_called(model: LlamaForCausalLM, parts: Parts) -> None:
    """Also those that came after compiling, and those within the MLP."""
    mlp, norm = copy.deepcopy(model.model.layers[0].mlp), LlamaRMSNorm(32)
    rows, heard = torch.randn(1, 6, 32), []
    calls = (partial(parts.mixed, mlp, rows), partial(parts.normed, norm, rows))
    calls += (partial(parts.added_and_normed, rows, rows, norm),)
    for module, called in zip((mlp.gate_proj, norm, norm), calls):
        called()
        hook = module.register_forward_hook(lambda *_: heard.append(1))
        called()
        hook.remove()
        called()
    assert len(heard) == len(calls)


@needs_torch_compile
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
