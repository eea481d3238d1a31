"""Prompts with contexts, profiles and templates: the tokens by hand, and that no text reaches a [SUM] that must not see it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from dti_model.config import DTIConfig, ModelConfig, TrainConfig
from dti_model.data import PreparedData
from dti_model.evaluation.scoring import score_targets
from dti_model.model.run import Run
from dti_model.prompts import PromptBuilder, PromptFormat, Prompts
from tests.data.text_logs import some_rows, some_users, text_data, text_files

WINDOW = 4
TEMPLATE = "({item}. Liked: {label})\n"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    return text_data(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def tokenizer(data: PreparedData) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(data.tokenizer_dir)


def expected_ids(data: PreparedData, tokenizer, prompts: Prompts, template: str) -> list[int]:
    """A batch read by a plain loop."""

    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False) if text else []

    before, cue, after = ("", "", "") if template == "{item}{label}" else ("(", ". Liked:", ")\n")
    assert data.contexts is not None
    assert data.profiles is not None
    found: list[int] = []
    for i in range(len(prompts)):
        user = data.users_of(prompts.first_target[i : i + 1])[0]
        found.append(tokenizer.bos_token_id)
        for part in data.profiles.of_row(user):
            found += ids(f"{part};" if part else "")
        rows = [
            *range(prompts.first[i], prompts.context_stop[i]),
            *range(prompts.first_target[i], prompts.stop[i]),
        ]
        for row in rows:
            found += ids(before) + ids(data.item_texts[data.item[row]])
            for part in data.contexts.of_row(row):
                found += ids(f"; {part}" if part else "")
            found += ids(cue)
            if row != rows[-1]:
                found += [*ids("yes" if data.label[row] else "no"), *ids(after)]
    return found + ids("[SUM]") * int(prompts.num_targets.sum())


@pytest.mark.parametrize("template", ["{item}{label}", TEMPLATE])
@pytest.mark.parametrize("kind", ["streaming", "strict"])
def test_tokens_of_a_batch_by_hand(data: PreparedData, tokenizer, template: str, kind: str) -> None:
    builder = PromptBuilder(data, tokenizer, PromptFormat.of(tokenizer, WINDOW, template=template))
    rows = data.targets("train")
    prompts = (
        Prompts.streaming(data, rows, WINDOW, 3)
        if kind == "streaming"
        else Prompts.strict(data, rows, WINDOW)
    )
    some = prompts[np.array([5, 0, len(prompts) - 1])]
    batch = builder.batch(some)
    assert batch.input_ids.tolist() == expected_ids(data, tokenizer, some, template)
    assert builder.num_rows(some).sum() == len(batch.input_ids)
    assert batch.labels.tolist() == data.label[batch.targets].tolist()


def test_strict_prompts_hold_nothing_of_the_targets_own_time(data: PreparedData) -> None:
    rows = data.targets("train")
    prompts = Prompts.strict(data, rows, WINDOW)
    assert prompts.num_targets.tolist() == [1] * len(rows)
    left_out = 0
    for first, stop, target in zip(prompts.first, prompts.context_stop, prompts.first_target):
        user = data.users_of(np.array([target]))[0]
        earlier = [
            row
            for row in range(data.history_offsets[user], target)
            if data.timestamp[row] < data.timestamp[target]
        ]
        assert list(range(first, stop)) == earlier[-WINDOW:]
        left_out += stop < target
    assert left_out > len(rows) // 4


def run_over(data: PreparedData, template: str | None = None) -> Run:
    model = ModelConfig(layers=2, width=32, heads=4, kv_heads=2, mlp_width=48, template=template)
    config = TrainConfig(data=data.path, out=Path("unused"), window=WINDOW, dti=DTIConfig(), model=model)
    run = Run.start(config)
    with torch.no_grad():
        for parameter in run.model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(5)
    return run


def scores(run: Run, data: PreparedData, rows: np.ndarray, k: int | None) -> np.ndarray:
    builder = PromptBuilder(data, run.tokenizer, run.builder.format)
    # A batch for each prompt: what rounds depends on the rows of a batch.
    return score_targets(run.model, run.config.dti, builder, rows, token_budget=1, k=k)


@pytest.mark.parametrize("k", [1, 5])
def test_no_text_leaks(tmp_path: Path, k: int) -> None:
    """Another label of the target, other rows after it and other profiles of other users leave its score bit for bit the same."""
    data = text_data(tmp_path / "a")
    run = run_over(data, TEMPLATE)
    time = int(np.median(data.timestamp))
    users = [{**user, "age": 99} if user["user"] != "u03" else user for user in some_users()]
    log = [
        {**row, "liked": 1 - row["liked"], "device": "tv"} if row["timestamp"] > time else row
        for row in some_rows()
    ]
    other = text_data(tmp_path / "b", text_files(tmp_path / "b" / "raw", log, users))
    rows = np.arange(len(data.item))
    is_mine, is_later = data.users_of(rows) == data.user_ids.index("u03"), data.timestamp > time
    for same, some in ((True, is_mine & ~is_later), (False, is_mine & is_later), (False, ~is_mine)):
        plain, changed = (scores(run, of, rows[some], k) for of in (data, other))
        assert len(plain)
        assert (plain == changed).all() if same else (plain != changed).mean() > 0.8


def test_a_context_reaches_its_own_sum_and_later_ones_only(tmp_path: Path) -> None:
    data = text_data(tmp_path / "a", context_text="{device}")
    run = run_over(data)
    user = 4
    first, stop = data.history_offsets[user : user + 2]
    place = int(first) + 7
    log = some_rows()
    of_user = [row for row in log if row["user"] == data.user_ids[user]]
    of_user[7]["device"] = "television"
    other = text_data(tmp_path / "b", text_files(tmp_path / "b" / "raw", log), context_text="{device}")
    assert data.contexts is not None
    assert other.contexts is not None
    differs = [data.contexts.of_row(row) != other.contexts.of_row(row) for row in range(len(data.item))]
    assert np.flatnonzero(differs).tolist() == [place]
    rows = np.arange(first + 2, stop)
    same = scores(run, data, rows, None) == scores(run, other, rows, None)
    assert same[rows < place].all()
    assert not same[rows == place].any()
    assert not same[(rows > place) & (rows <= place + WINDOW)].any()


def test_strict_scores_do_not_move_with_labels_of_the_same_time(tmp_path: Path) -> None:
    """Rates in the target's own context once counted them."""
    data = text_data(tmp_path / "a")
    run = run_over(data)
    rows = np.arange(len(data.item))
    first = np.flatnonzero((data.timestamp[1:] == data.timestamp[:-1]) & (np.diff(data.users_of(rows)) == 0))
    before = int(first[len(first) // 2])
    log = some_rows()
    moment = data.user_ids[data.users_of(np.array([before]))[0]], int(data.timestamp[before])
    for row in log:
        if (row["user"], row["timestamp"]) == moment:
            row["liked"] = 1 - row["liked"]
    other = text_data(tmp_path / "b", text_files(tmp_path / "b" / "raw", log))
    of_moment = (data.timestamp == moment[1]) & (data.users_of(rows) == data.users_of(np.array([before]))[0])
    assert of_moment.sum() > 1
    assert (data.label != other.label).tolist() == of_moment.tolist()
    strict, plain = ([
        score_targets(run.model, run.config.dti, PromptBuilder(of, run.tokenizer, run.builder.format), rows[of_moment],
                      token_budget=1, strict_time=is_strict)
        for of in (data, other)
    ] for is_strict in (True, False))  # fmt: skip
    assert (strict[0] == strict[1]).all()
    assert (plain[0] != plain[1])[1:].all()
