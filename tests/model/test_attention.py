"""The drop-in attention: equal to the untouched model where it must be, and the semantics' properties on whole models."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from dti_kernels import StreamLayout
from dti_model.config import MODES, DTIConfig
from dti_model.model.attention import Stream, apply_dti, padded, position_ids, token_logits
from tests.model.pretrained_files import FAMILIES
from tests.numerics import FLOAT64_RELATIVE

ROPE = {
    "default": None,
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}


SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
}


def llama(rope: dict | None = None, layers: int = 3, **kwargs) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {**SIZES, "num_hidden_layers": layers}
    return LlamaForCausalLM(LlamaConfig(**sizes, rope_parameters=rope, **kwargs)).eval()


class Float64Rotary(torch.nn.Module):
    """The default rotary positions in float64 (the library's are float32, whatever the model's dtype)."""

    attention_scaling = 1.0

    def __init__(self, inv_freq: torch.Tensor) -> None:
        super().__init__()
        self.inv_freq = inv_freq.double()

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = position_ids[..., None] * self.inv_freq
        return torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()


def logits(model, config: DTIConfig, layout: StreamLayout, context: torch.Tensor) -> torch.Tensor:
    input_ids = torch.cat([context, torch.full((layout.num_sum,), 1)])
    return token_logits(model, input_ids, layout, config)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_without_targets_are_the_untouched_model(family: str) -> None:
    config_class, more = FAMILIES[family]
    torch.manual_seed(0)
    config = config_class(**{**SIZES, **more})
    check_untouched(AutoModelForCausalLM.from_config(config).eval(), "dti")


@pytest.mark.parametrize("rope", ROPE)
@pytest.mark.parametrize("mode", MODES)
def test_without_targets_it_is_the_untouched_model(rope: str, mode: str) -> None:
    check_untouched(llama(ROPE[rope]), mode)


@torch.no_grad()
def check_untouched(model, mode: str) -> None:
    """Hidden states of all context rows, and the names of all parameters, are those before `apply_dti`."""
    input_ids = torch.randint(50, (40,))
    expected = model.model(input_ids[None], use_cache=False).last_hidden_state
    names = list(model.state_dict())
    config = DTIConfig(mode)
    apply_dti(model, config)
    assert list(model.state_dict()) == names
    layout = StreamLayout.build([[5] * 4], [[5] * 4], [0], window=4)
    hidden = model.model(
        input_ids[None],
        position_ids=position_ids(layout, config)[None],
        stream=Stream(layout, context_outputs=True),
        use_cache=False,
    ).last_hidden_state
    # Same float32 arithmetic in another order: a few roundings of values of order 1 to 10 through three layers.
    assert (hidden - expected).abs().max() <= 64 * torch.finfo(torch.float32).eps * expected.abs().max()


@torch.no_grad()
def test_dti_minus_with_k_1_is_the_untouched_model_with_a_sum_token_at_the_end() -> None:
    model = llama().double()
    context = torch.randint(2, 50, (12,))
    expected = model(torch.cat([context, torch.tensor([1])])[None], use_cache=False).logits[0, -1]
    config = DTIConfig("dti-minus")
    apply_dti(model, config)
    layout = StreamLayout.build([[3, 3, 4]], [[1, 1, 0]], [1], window=5)
    assert (logits(model, config, layout, context)[0] - expected).abs().max() < FLOAT64_RELATIVE


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layers", [1, 3])
@torch.no_grad()
def test_a_window_over_the_whole_history_makes_streams_and_sliding_windows_equal(
    mode: str, layers: int
) -> None:
    """Property 3, at any depth."""
    model, config = llama(layers=layers).double(), DTIConfig(mode, alpha_min=0.1, alpha_max=0.9)
    apply_dti(model, config)
    items, labels = [3, 2, 4, 1, 5], [1, 1, 2, 1, 1]
    context = torch.randint(2, 50, (sum(items) + sum(labels),))
    stream = logits(model, config, StreamLayout.build([items], [labels], [5], window=9), context)
    for t in range(5):
        alone = StreamLayout.build([items[: t + 1]], [[*labels[:t], 0]], [1], window=9)
        assert (logits(model, config, alone, context[: alone.num_context])[0] - stream[t]).abs().max() < 1e-10


@torch.no_grad()
def test_one_layer_makes_streams_and_sliding_windows_equal_for_any_window() -> None:
    """Property 3 with one layer: attention cannot leak."""
    model, config = llama(layers=1).double(), DTIConfig("dti", alpha_min=0.1, alpha_max=0.9)
    apply_dti(model, config)
    items, window = [3, 2, 4, 1, 5, 2], 2
    starts = [sum(items[:t]) + t for t in range(6)]
    context = torch.randint(2, 50, (sum(items) + 6,))
    stream = logits(model, config, StreamLayout.build([items], [[1] * 6], [6], window), context)
    for t in range(6):
        first = max(0, t - window)
        alone = StreamLayout.build([items[first : t + 1]], [[1] * (t - first) + [0]], [1], window)
        own = context[starts[first] : starts[t] + items[t]]
        assert (logits(model, config, alone, own)[0] - stream[t]).abs().max() < 1e-10


@pytest.mark.parametrize(("alpha", "leaks"), [(0.0, True), (1.0, False)])
def test_full_reset_in_every_layer_stops_the_leak(alpha: float, leaks: bool) -> None:
    """With a = 1 everywhere a [SUM] depends only on token embeddings inside its window (semantics, section 5)."""
    model = llama()
    config = DTIConfig("dti", alpha_min=alpha, alpha_max=alpha, alpha_own=alpha, reset_layers=(0, 1, 2))
    apply_dti(model, config)
    layout = StreamLayout.build([[3] * 6], [[1] * 6], [1], window=2)
    input_ids = torch.randint(2, 50, (layout.num_rows,))
    embedded = model.model.embed_tokens(input_ids).detach().requires_grad_()
    output = model(
        inputs_embeds=embedded[None],
        position_ids=position_ids(layout, config)[None],
        stream=Stream(layout),
        use_cache=False,
    )
    (grad,) = torch.autograd.grad(output.logits.square().sum(), embedded)
    outside = grad[: 3 * 4].abs().sum()
    assert grad[3 * 4 :].abs().sum() > 0
    assert (outside > 0) if leaks else (outside == 0)


@pytest.mark.parametrize("mode", ["dti", "dti-position"])
@torch.no_grad()
def test_shifting_positions_leaves_sums_unchanged(mode: str) -> None:
    """Property 2: with the position fix nothing depends on absolute positions."""
    model, config = llama().double(), DTIConfig(mode)
    apply_dti(model, config)
    model.model.rotary_emb = Float64Rotary(model.model.rotary_emb.inv_freq)
    layout = StreamLayout.build([[3, 2, 4]], [[1, 1, 1]], [2], window=1)
    input_ids = torch.randint(2, 50, (layout.num_rows,))
    outputs = []
    for shift in (0, 37):
        positions = position_ids(layout, config)
        positions[: layout.num_context] += shift
        outputs.append(
            model(
                input_ids[None], position_ids=positions[None], stream=Stream(layout), use_cache=False
            ).logits
        )
    assert (outputs[0] - outputs[1]).abs().max() < FLOAT64_RELATIVE


@torch.no_grad()
def test_each_mode_is_different() -> None:
    layout = StreamLayout.build([[3, 2, 4, 2]], [[1] * 4], [2], window=2)
    context = torch.randint(2, 50, (layout.num_context,))
    outputs = []
    for mode in MODES:
        model, config = llama(), DTIConfig(mode)
        outputs.append(logits(apply_dti(model, config), config, layout, context))
    for i in range(len(MODES)):
        for j in range(i):
            assert (outputs[i] - outputs[j]).abs().max() > 1e-3, (MODES[i], MODES[j])


@pytest.mark.parametrize("reset_layers", [(), (0, 2)], ids=["last layer", "two layers"])
@pytest.mark.parametrize("mode", MODES)
def test_rows_that_are_added_for_few_shapes_change_nothing(mode: str, reset_layers: tuple[int, ...]) -> None:
    """Logits and all gradients, in float64; and batches of near sizes are multiplied in one."""
    config = (
        DTIConfig(mode, reset_layers=reset_layers) if "reset" in mode or mode == "dti" else DTIConfig(mode)
    )
    model = apply_dti(llama().double(), config)
    results, widths = [], set()
    hook = model.model.layers[0].mlp.register_forward_hook(lambda _, x, y: widths.add(y.shape[1]))
    for num_items in (30, 31):
        layout = StreamLayout.build(
            [[3, 2, 4] * (num_items // 3) + [2] * (num_items % 3)], [[1] * num_items], [9], 4
        )
        ids = torch.randint(2, 50, (layout.num_rows,), generator=torch.manual_seed(num_items))
        ids[layout.num_context :] = 1
        for few_shapes in (False, True):
            widths.clear()
            model.zero_grad()
            out = token_logits(model, ids, layout, config, few_shapes=few_shapes)
            out.square().sum().backward()
            results.append((out.detach(), [p.grad.clone() for p in model.parameters()]))
            assert widths == {144 if few_shapes else layout.num_rows}
    hook.remove()
    for (plain, grads), (wider, same) in (results[:2], results[2:]):
        torch.testing.assert_close(wider, plain, rtol=FLOAT64_RELATIVE, atol=FLOAT64_RELATIVE)
        for grad, like in zip(same, grads, strict=True):
            torch.testing.assert_close(grad, like, rtol=1e-8, atol=1e-8)


def test_padded_sizes_are_few_and_near() -> None:
    sizes = [padded(n) for n in range(1, 20_000)]
    assert all(n <= size <= n + n // 64 + 1 for n, size in enumerate(sizes, 1) if n > 2048)
    assert all(n <= size < n + 16 for n, size in enumerate(sizes, 1) if n <= 2048)
    assert sizes == sorted(sizes)
    assert len({padded(n) for n in range(7_400, 8_193)}) <= 13


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    grads = []
    layout = StreamLayout.build([[3, 2, 4, 2]], [[1] * 4], [2], window=2)
    context = torch.randint(2, 50, (layout.num_context,), generator=torch.Generator().manual_seed(0))
    for checkpointing in (False, True):
        model, config = llama(), DTIConfig("dti", alpha_max=0.9)
        apply_dti(model, config).train()
        if checkpointing:
            model.gradient_checkpointing_enable()  # the name that every supported version has
        logits(model, config, layout, context).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    for plain, checkpointed in zip(*grads):
        assert plain is not None
        assert torch.equal(plain, checkpointed)


def test_trained_slopes_get_a_gradient_and_are_saved() -> None:
    model, config = llama(), DTIConfig("dti", train_slopes=True)
    apply_dti(model, config)
    layout = StreamLayout.build([[3, 2, 4, 2]], [[1] * 4], [2], window=2)
    logits(model, config, layout, torch.randint(2, 50, (layout.num_context,))).sum().backward()
    slopes = model.model.layers[1].self_attn.alibi_slopes
    assert slopes.grad.abs().sum() > 0
    assert "model.layers.1.self_attn.alibi_slopes" in model.state_dict()


def test_saved_models_load_into_plain_transformers(tmp_path) -> None:
    model, config = llama(), DTIConfig()
    apply_dti(model, config)
    model.save_pretrained(tmp_path)
    plain = LlamaForCausalLM.from_pretrained(tmp_path)
    for name, parameter in model.state_dict().items():
        assert torch.equal(plain.state_dict()[name], parameter)


def test_errors_say_what_works() -> None:
    with pytest.raises(ValueError, match="mode must be one of dti, dti-minus"):
        DTIConfig("dti-plus")
    with pytest.raises(ValueError, match="alpha_min"):
        DTIConfig(alpha_min=2.0)
    with pytest.raises(ValueError, match="rope type default, linear or llama3"):
        apply_dti(llama(YARN), DTIConfig())
    model = apply_dti(llama(), DTIConfig())
    with pytest.raises(ValueError, match=r"call it with stream=Stream\(layout\)"):
        model(torch.zeros(1, 3, dtype=torch.long), use_cache=False)
    from transformers import GPT2Config, GPT2LMHeadModel

    gpt = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=10))
    with pytest.raises(TypeError, match="DTI attention works on"):
        apply_dti(gpt, DTIConfig())
