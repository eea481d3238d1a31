"""Every setting from everywhere: what is out of bounds is refused in one line that names it, before anything is made."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from dti_kernels import HiddenStateReset
from dti_model.cli import main
from dti_model.config import DTIConfig, LoraSettings, ModelConfig, OptimConfig, TrainConfig
from dti_model.config.bounds import GROUPS, RULES
from dti_model.config.strict_yaml import StrictYAMLError, check_yaml
from dti_model.evaluation import score_split
from dti_model.model.attention import apply_dti
from dti_model.model.run import Run
from dti_model.training import search

STRANGE: list[Any] = [None, "x", [], {}, [None], float("nan"), float("inf"), -1, 10**23, True, 0.5, b"x"]
CLASSES = {"": TrainConfig, "dti.": DTIConfig, "model.": ModelConfig, "model.lora.": LoraSettings, "optim.": OptimConfig}  # fmt: skip


def made(name: str, value: Any) -> Any:
    """The dataclass that a setting belongs to, with a value."""
    group = name[: name.rindex(".") + 1] if "." in name else ""
    needed = {"data": Path("a"), "out": Path("b")} if not group else {}
    return CLASSES[group](**{**needed, name.removeprefix(group): value})


def test_every_setting_has_a_rule_that_takes_its_default() -> None:
    """A new setting without bounds fails here."""
    names = set()
    for group, kind in CLASSES.items():
        for field in dataclasses.fields(kind):
            name = group + field.name
            names.add(name)
            if name in GROUPS or name in ("data", "out"):
                continue
            assert RULES[name].accepts(getattr(kind, field.name, field.default)), name
    assert names == RULES.keys() | set(GROUPS)


@pytest.mark.parametrize("name", RULES)
def test_values_of_no_sense_are_refused_by_name(name: str) -> None:
    """A null seed, a NaN, a boolean and 10**23 used to be tracebacks, or were taken."""
    refused = 0
    for value in STRANGE:
        if RULES[name].accepts(value):
            continue
        refused += 1
        with pytest.raises(ValueError, match=rf"^{name} must be ") as raised:
            made(name, value)
        assert "\n" not in str(raised.value)
    assert refused >= 5
    assert not any(RULES[name].accepts(x) for x in (float("nan"), float("inf"), 10**23, b"x"))


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("seed", 0, 2**32 - 1),
        ("k", 0, 10**9),
        ("window", 0, 10**9),
        ("max_item_tokens", 1, 10**9),
        ("optim.epochs", 1, 10**6),
        ("optim.warmup", 0.0, 0.999),
        ("dti.alpha_own", 0.0, 1.0),
    ],
)
def test_bounds_are_inside(name: str, least: float, most: float) -> None:
    for value in (least, most):
        made(name, value)
    for value in (least - 1, most + 1):
        with pytest.raises(ValueError, match=f"{name} must be"):
            made(name, value)


@pytest.mark.parametrize("group", ["dti", "model", "optim"])
@pytest.mark.parametrize("value", [None, 5, [1]])
def test_a_group_of_settings_is_a_group(group: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{group} must be a mapping of settings"):
        TrainConfig(Path("a"), Path("b"), **{group: value})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed=null"], "seed must be >= 0 and <= 4,294,967,295 (an integer), got null"),
        (["--seed=4294967296"], "seed must be >= 0 and <= 4,294,967,295 (an integer), got 4294967296"),
        (["--k=10**23"], "k must be >= 0 and <= 1,000,000,000 (an integer), got 10**23"),
        (["--k", "1" + "0" * 23], "k must be >= 0 and <= 1,000,000,000 (an integer), got 1000"),
        (["--k", "9" * 5000], "k must be >= 0 and <= 1,000,000,000"),
        (["--optim.learning-rate=nan"], "--optim.learning-rate must be > 0 and <= 1,000,000 (a number), got nan"),
        (["--optim.clip=.inf"], "optim.clip must be > 0"),
        (["--dti.reset-layers=[99]"], "--dti.reset-layers must name layers of the model, 0 to 3 or, from the end, -4 to -1, got 99"),
        (["--dti.reset-layers=[null]"], "--dti.reset-layers must be a list of layers"),
        (["--model.dropout=true"], "model.dropout must be in [0, 1)"),
        (["--report-to=x"], "--report-to must be some of tensorboard, wandb"),
        (["--optim=5"], "--optim: there is no file 5"),
        (["--k=!!python/object:os.system x"], "k must be"),
        (["--k", "1:30"], "k must be >= 0 and <= 1,000,000,000 (an integer), got 1:30"),
        (["--optim.clip=1:30.5"], "optim.clip must be > 0"),
    ],
)  # fmt: skip
def test_flags(arguments: list[str], message: str, tmp_path: Path, monkeypatch, capsys) -> None:
    assert message in error_of(arguments, tmp_path, monkeypatch, capsys)


def test_colons_in_flags(capsys) -> None:
    """Texts may hold them; numbers of the other commands are no clock times either."""
    assert (
        main(["train", "--data=1:30", "--out=2:30", "--model.pretrained=1:30", "--model.instruction", "1:30"])
        == 2
    )
    assert "1:30: no such folder" in capsys.readouterr().err
    assert main(["score", "--run=a", "--input=b", "--output=c", "--token-budget", "1:30"]) == 2
    assert "--token-budget must be a number, got 1:30" in capsys.readouterr().err


def error_of(arguments: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> str:
    """The one line that `dti train` ends with."""
    monkeypatch.chdir(folder)
    before = set(folder.iterdir())
    try:
        status = main(["train", "--data=nowhere", "--out=run", *arguments])
    except SystemExit as exit_:
        status = exit_.code
    assert status == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1, error
    assert len(error) < 400
    assert set(folder.iterdir()) == before
    return error


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdefgh", "bcdefghi")
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("k: 3\nk: 4\n", "line 2: 'k' stands there twice"),
        ("optim:\n  epochs: 1\nk: 3\noptim:\n  patience: 1\n", "line 4: 'optim' stands there twice"),
        (LAUGHS, "line 2: the alias *a is not accepted"),
        ("k: 1:30\n", "line 1: 1:30 is a number to base 60 in YAML: write the number itself"),
        ("seed: 1\nk: -1:30:00\n", "line 2: -1:30:00 is a number to base 60"),
        ("optim:\n  clip: 1:30.5\n", "line 2: 1:30.5 is a number to base 60"),
        ("dti:\n  reset_layers: [1:10]\n", "line 2: 1:10 is a number to base 60"),
        ("k: 010\n", "line 1: 010 is a number to base 8"),
        ("optim.clip: 0.5\noptim:\n  clip: 1.0\n", "line 3: 'optim.clip' stands there twice"),
        ("optim:\n  clip: 1.0\noptim.clip: 0.5\n", "line 3: 'optim.clip' stands there twice"),
        ("optim.save_steps: 1\noptim:\n  save-steps: 2\n", "line 3: 'optim.save_steps' stands there twice"),
        ("optim:\n  save-steps: -2\n", "optim.save_steps must be >= 0"),
        ("optim:\n  save-step: 2\n", "did you mean optim.save_steps?"),
        ("model:\n  lora:\n    rank: 2\n  lora.rank: 3\n", "line 4: 'model.lora.rank' stands there twice"),
        ("optim:\n  <<: {clip: 1}\n", "line 2: the merge key << is not accepted"),
        ("seed: null\n", "seed must be >= 0 and <= 4,294,967,295 (an integer), got null"),
        ("optim: 5\n", "optim must be a mapping of settings, name: value, got 5"),
        ("optim: null\n", "optim must be a mapping of settings, name: value, got null"),
        ("model:\n  lora: [1]\n", "model.lora must be a mapping of settings"),
        ("kk: 3\n", "'kk'"),
        ("optim:\n  epoch: 3\n", "epoch"),
        ("", "is empty"),
        ("# nothing\n", "is empty"),
        ("- 1\n", "is no mapping"),
        ("just words\n", "is no mapping"),
        ("optim:\n\tepochs: 3\n", "line 2: found character that cannot start any token"),
        ("k: [1\n", "settings.yaml: line"),
        (f"k: {'9' * 5000}\n", "line 1: a number of 5,000 digits"),
        ("k: !!python/object:os.system x\n", "line 1: the tag"),
        ("[" * 60 + "]" * 60, "line 1: more than 50 levels"),
        ("[" * 5000, "settings.yaml: line 1:"),
        ("a: " + "x" * 2**21, "settings have at most 1,048,576"),
        (b"\x00\x01\xff", "is not a text file in UTF-8 (byte 2)"),
        (b"\x1f\x8b\x08\x00", "is not a text file in UTF-8"),
        (b"k: \x00", "settings.yaml:"),
    ],
)  # fmt: skip
def test_files(content: str | bytes, message: str, tmp_path: Path, monkeypatch, capsys) -> None:
    """A key that stood twice used to drop a block of settings, and nine lines of aliases filled the memory."""
    path = tmp_path / "settings.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    start = time.monotonic()
    assert message in error_of(["--config=settings.yaml"], tmp_path, monkeypatch, capsys)
    assert time.monotonic() - start < 10


def test_a_file_that_is_none(tmp_path: Path, monkeypatch, capsys) -> None:
    assert "there is no file nowhere.yaml" in error_of(
        ["--config", "nowhere.yaml"], tmp_path, monkeypatch, capsys
    )
    (tmp_path / "folder").mkdir()
    assert "folder is a folder" in error_of(["--config=folder"], tmp_path, monkeypatch, capsys)


def test_aliases_and_keys_of_nested_yaml() -> None:
    check_yaml("a: {b: 1, c: [1, 2]}\nd: &d 1\n")
    check_yaml("a: '1:30'\nb: \"<<\"\nc: 1:70\nd: 0\ne: -0.5\nf: 0x10\na.b: [0, 00.1]\n")
    for text in (
        "a: {b: 1, b: 2}",
        "[{x: 1}, {y: 1, y: 2}]",
        "a: &a 1\nb: *a",
        "? [1]\n: 2",
        "<<: {a: 1}\n<<: {b: 1}",
    ):
        with pytest.raises(StrictYAMLError, match="line [12]:"):
            check_yaml(text)


def test_seeds_of_a_search_have_bounds(small_folder: Path, tmp_path: Path) -> None:
    base = TrainConfig(small_folder, tmp_path / "search")
    for seeds in ([-1], [2**32], [None], [True], [0.5]):
        with pytest.raises(ValueError, match="^seed must be >= 0"):
            search(base, {"k": [5]}, seeds)  # type: ignore[arg-type]
    assert not base.out.exists()


def test_layers_that_a_model_does_not_have_are_refused() -> None:
    """Layer 99 of two was layer 1: counted modulo two."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    for layers, wrong in (((99,), 99), ((0, 2), 2), ((-3,), -3)):
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **sizes))
        with pytest.raises(ValueError, match=rf"0 to 1 or, from the end, -2 to -1, got {wrong}$"):
            apply_dti(model, DTIConfig(reset_layers=layers))
    config = DTIConfig(reset_layers=(0, -1))
    assert [config.resets_layer(i, 3) for i in range(3)] == [True, False, True]


def test_a_window_beyond_every_history_is_cut_to_what_can_occur(small_folder: Path, tmp_path: Path) -> None:
    """A window of 10^9 made tables of 8 GB; its ratios are those of n = 10^9 all the same."""
    empty = torch.empty(0)
    for steepness in (1.0, 1e-4):
        reset = HiddenStateReset(empty, empty, 0.2, 0.8, steepness)
        for farthest in (0, 63, 64, 1000):
            whole = reset.ratios(9_999, torch.float64, torch.device("cpu"))
            cut = reset.ratios(9_999, torch.float64, torch.device("cpu"), farthest)
            assert torch.equal(cut[: farthest + 1], whole[: farthest + 1])
            assert farthest < len(cut) <= 5000
    scores = []
    # Steepness times n: a sigmoid that is the same at both windows for every distance of a short history.
    for window in (50_000, 10**9):
        config = TrainConfig(
            small_folder,
            tmp_path / "run",
            window=window,
            progress=False,
            dti=DTIConfig(alpha_max=0.5, reset_layers=(0, 1)),
            model=ModelConfig(layers=2, width=16, heads=2, kv_heads=1, mlp_width=24),
        )
        scores.append(score_split(Run.start(config), "test"))
    np.testing.assert_array_equal(*scores)


def test_configuration_files_and_flags_agree(tmp_path: Path, monkeypatch, capsys) -> None:
    """A value that is refused as a flag is refused in a file."""
    for name, value in (("optim.patience", -1), ("dti.slope_scale", -0.5), ("model.layers", 0)):
        group, field = name.split(".")
        (tmp_path / "one.yaml").write_text(yaml.safe_dump({group: {field: value}}))
        errors = [
            error_of([f"--{name}={value}"], tmp_path, monkeypatch, capsys),
            error_of(["--config=one.yaml"], tmp_path, monkeypatch, capsys),
        ]
        assert f"error: --{name.replace('_', '-')} must be" in errors[0]
        assert f"error: --config: one.yaml: {name} must be" in errors[1]
