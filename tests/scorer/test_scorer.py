"""Scoring candidates: equal to one sliding-window prompt each, in any mode, order, company and batch; states; what goes wrong."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from dti_kernels import StreamLayout
from dti_model.config import MODES, DTIConfig, ModelConfig, TrainConfig
from dti_model.evaluation.scoring import score_targets
from dti_model.model.attention import token_logits
from dti_model.model.run import Run
from dti_model.prompts import Prompts
from dti_model.scorer import History, Scorer
from dti_model.scorer.items import ItemError
from dti_model.scorer.state_cache import StateCache
from tests.numerics import FLOAT64_RELATIVE
from tests.threads import in_threads

WINDOW, MAX_ITEM_TOKENS = 4, 12
TOLERANCE = 1e-5  # float32, as the scorer promises
LONG = {"text": "Land of Friends, Casino and Toy Story (1995); Drama " * 20}
CANDIDATES = ["1", 2, "9", "10", {"title": "Two  Stories (1995)", "genres": ["War", "Drama"]}, LONG, "1"]
HISTORY: History = [("101", 1), ("9", 0), ({"text": "Misérables"}, 1), ("2", 0), ("10", 1), (LONG, 0)]


def scorer_of(folder: Path, dti: DTIConfig, token_budget: int = 16384) -> Scorer:
    """Random weights, large enough that scores differ and that rows listen to each other."""
    config = TrainConfig(
        data=folder,
        out=Path("unused"),
        window=WINDOW,
        max_item_tokens=MAX_ITEM_TOKENS,
        dti=dti,
        model=ModelConfig(layers=3, width=32, heads=4, kv_heads=2, mlp_width=48, dropout=0.1),
    )
    run = Run.start(config)
    with torch.no_grad():
        for parameter in run.model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(5)
    return Scorer(run, token_budget)


RESET = DTIConfig(alpha_min=0.1, alpha_max=0.9, alpha_own=0.05, reset_layers=(1, 2))


@pytest.fixture(scope="module")
def scorer(small_folder: Path) -> Scorer:
    return scorer_of(small_folder, RESET)


@torch.no_grad()
def alone(scorer: Scorer, history: History, candidates: list) -> np.ndarray:
    """One k = 1 prompt per candidate, put together by hand."""
    run, scores = scorer.run, []
    texts = dict(zip(run.data.item_ids, run.data.item_texts))

    def tokens(item) -> list[int]:
        if item == CANDIDATES[4]:
            item = {"text": "Two Stories (1995); War, Drama"}
        text = item["text"] if isinstance(item, dict) else texts[str(item)]
        return run.tokenizer.encode(text, add_special_tokens=False)[:MAX_ITEM_TOKENS]

    used = list(history)[-WINDOW:]
    for candidate in candidates:
        items = [tokens(item) for item, _ in used] + [tokens(candidate)]
        labels = [run.tokenizer.encode("yes" if label else "no") for _, label in used] + [[]]
        lengths = [list(map(len, texts)) for texts in (items, labels)]
        layout = StreamLayout.build([lengths[0]], [lengths[1]], [1], WINDOW, prefix_lengths=[1])
        ids = [run.tokenizer.bos_token_id, *(t for pair in zip(items, labels) for text in pair for t in text)]
        ids += run.tokenizer.encode("[SUM]")
        logits = token_logits(run.model, torch.tensor(ids), layout, run.config.dti, run.builder.format.labels)
        scores.append(float(logits.double().softmax(-1)[0, 1]))
    return np.asarray(scores)


@pytest.mark.parametrize("num_history", [0, 2, WINDOW, 6])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, TOLERANCE), (torch.float64, FLOAT64_RELATIVE)], ids=str
)
def test_scores_are_those_of_a_prompt_each(
    small_folder: Path, mode: str, num_history: int, dtype: torch.dtype, tolerance: float
) -> None:
    """In one pass, from a state, and from a state that grew one interaction at a time."""
    scorer = scorer_of(small_folder, dataclasses.replace(RESET, mode=mode))
    scorer.run.model.to(dtype)
    history = HISTORY[:num_history]
    expected = alone(scorer, history, CANDIDATES)
    assert np.ptp(expected) > 0.01
    assert np.abs(scorer.score(history, CANDIDATES) - expected).max() < tolerance
    assert np.abs(scorer.score(scorer.encode(history), CANDIDATES) - expected).max() < tolerance
    state, origins = scorer.encode([]), []
    for item, label in history:
        state = scorer.append(state, item, label)
        origins.append(state.origin)
    assert origins == ["extended"] * min(num_history, WINDOW) + ["re-encoded"] * max(0, num_history - WINDOW)
    assert state.num_interactions == min(num_history, WINDOW)
    assert np.abs(scorer.score(state, CANDIDATES) - expected).max() < tolerance


def test_stored_users_score_as_in_evaluation(scorer: Scorer) -> None:
    run = scorer.run
    rows = run.data.targets("test")
    expected = score_targets(run.model, run.config.dti, run.builder, rows)
    requests = []
    for row, user in zip(rows.tolist(), run.data.users_of(rows).tolist()):
        history = scorer.history_of(run.data.user_ids[user])[: row - run.data.history_offsets[user]]
        requests.append(scorer.request(history, [run.data.item_ids[run.data.item[row]]]))
    assert np.abs(np.concatenate(scorer.score_many(requests)) - expected).max() < TOLERANCE


@pytest.mark.parametrize("token_budget", [1, 60, 300])
def test_neither_order_nor_company_nor_batches_matter(
    small_folder: Path, scorer: Scorer, token_budget: int
) -> None:
    expected = scorer.score(HISTORY, CANDIDATES)
    order = [3, 6, 0, 5, 1, 4, 2]
    small = scorer_of(small_folder, RESET, token_budget)
    state = small.encode(HISTORY)
    shuffled = [CANDIDATES[i] for i in order]
    requests = [(HISTORY, shuffled), ([], []), (state, shuffled[:4]), (HISTORY[:1], ["2"]), (state, [])]
    results = small.score_many([small.request(*request) for request in requests])
    assert list(map(len, results)) == [7, 0, 4, 1, 0]
    assert np.abs(results[0] - expected[order]).max() < TOLERANCE
    assert np.abs(results[2] - expected[order[:4]]).max() < TOLERANCE
    assert np.abs(results[3] - scorer.score(HISTORY[:1], ["2"])).max() < TOLERANCE


def test_no_pass_is_larger_than_the_budget(small_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small, sizes = scorer_of(small_folder, RESET, 120), []
    forward = small._forward

    def watched(parts, **wanted):
        logits, recorded = forward(parts, **wanted)
        sizes.append(sum(len(one) for part in parts for one in part.history) + len(parts))
        sizes[-1] += sum(len(tokens) + 1 for part in parts for tokens in part.candidates)
        return logits, recorded

    monkeypatch.setattr(small, "_forward", watched)
    requests = [(HISTORY, CANDIDATES * 3), (HISTORY[:2], CANDIDATES), (HISTORY, ["1"])]
    small.score_many([small.request(*request) for request in requests])
    assert max(sizes) <= 120
    assert len(sizes) > 3


@pytest.mark.parametrize("from_state", [False, True])
def test_a_candidate_never_influences_another(scorer: Scorer, from_state: bool) -> None:
    """Bitwise: another text of the same length in its place moves no other score."""
    history = scorer.encode(HISTORY) if from_state else HISTORY
    texts = ["yes no yes", "no no no"]
    lengths = {len(scorer.run.tokenizer.encode(text, add_special_tokens=False)) for text in texts}
    assert len(lengths) == 1
    for place in (0, 3, 6):
        both = []
        for text in texts:
            candidates = list(CANDIDATES)
            candidates[place] = {"text": text}
            both.append(scorer.score(history, candidates))
        others = np.arange(len(CANDIDATES)) != place
        assert np.array_equal(both[0][others], both[1][others])
        assert both[0][place] != both[1][place]


def test_ten_thousand_candidates(scorer: Scorer) -> None:
    scores = scorer.score(HISTORY, ["1", "2", "9", "10"] * 2500)
    assert scores.shape == (10_000,)
    assert np.abs(scores.reshape(-1, 4) - scores[:4]).max() < TOLERANCE


def test_a_window_of_nothing(small_folder: Path) -> None:
    """n = 0: histories are empty, and appending keeps them so."""
    run = scorer_of(small_folder, RESET).run
    no_history = dataclasses.replace(run.builder.format, window=0)
    run.builder.format = no_history
    scorer = Scorer(run)
    state = scorer.append(scorer.encode(HISTORY), "1", 1)
    assert state.num_interactions == 0
    assert np.array_equal(scorer.score(state, CANDIDATES), scorer.score(scorer.encode([]), CANDIDATES))


@pytest.mark.parametrize(
    ("history", "candidates", "message"),
    [
        (HISTORY, ["1", "777"], r"candidates\[1\]: no item with id '777'"),
        (HISTORY, [{"text": ""}], r"candidates\[0\]: an item text must not be empty"),
        (HISTORY, [{"title": "A", "year": 3}], r"candidates\[0\]: an item here has the fields title, genres"),
        (HISTORY, [None], r"candidates\[0\]: an item is an id, its fields or"),
        (HISTORY, "1", r"candidates must be a list of items, got '1'"),
        ([("1", 1), ("777", 1)], [], r"history\[1\]: no item with id '777'"),
        ([("1", 2)], ["1"], r"history\[0\]: a label must be 0 or 1, got 2"),
        ([("1", "yes")], ["1"], r"history\[0\]: a label must be 0 or 1, got 'yes'"),
        ("12", ["1"], r"history must be a list of \(item, label\) pairs, got '12'"),
        (["1"], ["1"], r"history\[0\]: must be an \(item, label\) pair, got '1'"),
    ],
)
def test_errors_name_the_place(scorer: Scorer, history, candidates, message: str) -> None:
    with pytest.raises(ItemError, match=message):
        scorer.score(history, candidates)


def test_other_errors(scorer: Scorer, small_folder: Path) -> None:
    with pytest.raises(ItemError, match="no user with id 'nobody'"):
        scorer.history_of("nobody")
    with pytest.raises(ValueError, match="another scorer"):
        scorer_of(small_folder, RESET).score(scorer.encode([]), ["1"])
    with pytest.raises(ValueError, match="token_budget must be >= 1, got 0"):
        Scorer(scorer.run, 0)


def test_the_cache_drops_the_longest_unused_and_counts_bytes(scorer: Scorer) -> None:
    state = scorer.encode(HISTORY)
    assert state.num_bytes == sum(
        x.untyped_storage().nbytes() for layer in state.layers for x in layer if x is not None
    )
    cache = StateCache(scorer, max_bytes=2 * state.num_bytes)
    for user in ("a", "b"):
        cache.put(user, state)
    assert cache.get("a") is state  # "b" is now the one unused longest
    cache.put("c", state)
    assert (cache.get("b"), len(cache)) == (None, 2)
    assert cache.append("b", "1", 1) is None
    grown = cache.append("c", "1", 1)
    assert grown is cache.get("c")
    assert grown.origin == "re-encoded"
    assert cache.num_bytes <= cache.max_bytes
    with pytest.raises(ValueError, match="max_bytes"):
        StateCache(scorer, 0)
    StateCache(scorer, 1).put("a", state)  # larger than the whole cache: not kept


def test_threads_share_a_scorer_and_a_cache(scorer: Scorer) -> None:
    """Every append of every thread counts, and scores are those of one thread."""
    cache = StateCache(scorer, max_bytes=1 << 30)
    events = [("1", 1), ("2", 0), ("9", 1), ("10", 0)]
    cache.put("shared", scorer.encode([]))
    results: dict[int, np.ndarray] = {}

    def work(thread: int) -> None:
        cache.put(thread, scorer.encode([]))
        for item, label in events:
            cache.append(thread, item, label)
            scorer.score(cache.get(thread), CANDIDATES)
        cache.append("shared", "101", 1)
        results[thread] = scorer.score(cache.get(thread), CANDIDATES)

    in_threads(work, WINDOW)
    expected = scorer.score(events, CANDIDATES)
    assert len(results) == WINDOW
    assert all(np.abs(scores - expected).max() < TOLERANCE for scores in results.values())
    assert cache.get("shared").num_interactions == WINDOW


@pytest.mark.parametrize("mode", MODES)
def test_evaluation_gives_the_scores_of_a_prompt_per_target(small_folder: Path, mode: str) -> None:
    """Targets near the beginning of a history share a prompt, and the others do not."""
    run = scorer_of(small_folder, dataclasses.replace(RESET, mode=mode)).run
    rows = np.random.default_rng(0).permutation(np.flatnonzero(run.data.split >= 0)[:160])
    prompts = Prompts.streaming(run.data, rows, WINDOW, 1)
    assert len(Prompts.sliding_windows(run.data, rows, WINDOW)) < len(prompts)
    batch = run.builder.batch(prompts)
    with torch.no_grad():
        logits = token_logits(
            run.model, batch.input_ids, batch.layout, run.config.dti, run.builder.format.labels
        )
    expected = logits.double().softmax(-1)[:, 1].numpy()[np.searchsorted(batch.targets.numpy(), rows)]
    for token_budget in (100, 1 << 20):
        scores = score_targets(run.model, run.config.dti, run.builder, rows, token_budget)
        assert np.abs(scores - expected).max() < TOLERANCE


@pytest.mark.parametrize("device", ["cuda:7", "warp", "cpu:x", ""])
def test_a_device_that_is_not_there_is_one_line(run_folder: Path, device: str) -> None:
    """It was a traceback, after the model had been loaded."""
    if device == "cuda:7" and torch.cuda.device_count() > 7:
        pytest.skip("there is one")
    for load in (Scorer.from_run, Scorer.from_export):
        with pytest.raises(ValueError, match=r"^device .* cannot be used \([^\n]*\): name another") as raised:
            load(run_folder, device=device)
        assert "\n" not in str(raised.value)
