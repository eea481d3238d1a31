"""A scorer whose passes are replayed (`benchmarks.scoring.Rerun`) gives the scores of one that computes them one by one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.scoring import Rerun
from dti_model.model import GraphedPasses
from dti_model.scorer import Scorer, StateCache
from tests.scorer.scoring_jobs import broken_off, score
from tests.scorer.test_scorer import CANDIDATES, HISTORY, RESET, TOLERANCE, WINDOW, alone, scorer_of
from tests.threads import in_threads


def through_graphs(scorer: Scorer) -> Scorer:
    """The scorer as on a GPU."""
    model = scorer.click_model
    scorer._passes = GraphedPasses(model.model, model.dti, model.prompt.labels, scorer.precision, Rerun)
    return scorer


@pytest.fixture
def scorer(small_folder: Path) -> Scorer:
    return through_graphs(scorer_of(small_folder, RESET))


def replayed(scorer: Scorer) -> int:
    passes: Any = scorer._passes
    return passes._capture.replayed


def test_scores_of_every_kind_of_request(scorer: Scorer, small_folder: Path) -> None:
    eager = scorer_of(small_folder, RESET)
    assert (scorer.uses_graphs, eager.uses_graphs) == (True, False)
    for history in (HISTORY[:2], HISTORY, [], HISTORY[1:3]) * 3:
        expected = alone(scorer, history, CANDIDATES)
        assert np.abs(scorer.score(history, CANDIDATES) - expected).max() < TOLERANCE
        state = scorer.encode([])
        for item, label in history:
            state = scorer.append(state, item, label)
        for known in (scorer.encode(history), state):
            assert np.abs(scorer.score(known, CANDIDATES) - expected).max() < TOLERANCE
    requests = [(HISTORY, CANDIDATES), ([], []), (scorer.encode(HISTORY[:3]), CANDIDATES[:3]), ([], ["1"])]
    for _ in range(3):
        found = scorer.score_many(requests)
        others = [alone(scorer, HISTORY, CANDIDATES), [], alone(scorer, HISTORY[:3], CANDIDATES[:3])]
        for one, other in zip(found, [*others, alone(scorer, [], ["1"])], strict=True):
            assert np.abs(one - other).max(initial=0) < TOLERANCE
    assert replayed(scorer) > 60


def test_a_candidate_never_influences_another(scorer: Scorer) -> None:
    """Bitwise, and not through what the last request has left either."""
    texts = ["yes no yes", "no no no"]
    found = []
    for text in (*texts, *texts, *texts):
        found.append(scorer.score(HISTORY, [*CANDIDATES[:3], {"text": text}, *CANDIDATES[3:]]))
    for one in found[1:]:
        assert np.array_equal(np.delete(one, 3), np.delete(found[0], 3))
    assert found[-1][3] != found[-2][3]
    assert np.array_equal(found[0], found[2])


def test_states_stay_what_they_are(scorer: Scorer) -> None:
    """Keys that a graph has recorded are copied: the next user's would lie where they lay."""
    histories = [HISTORY[i : i + 3] for i in range(4)]
    states = [scorer.encode(history) for history in histories]
    assert replayed(scorer) >= 2
    for history, state in zip(histories, states):
        expected = alone(scorer, history, CANDIDATES)
        assert np.abs(scorer.score(state, CANDIDATES) - expected).max() < TOLERANCE
        assert state.num_bytes == sum(
            x.untyped_storage().nbytes() for layer in state.layers for x in layer if x is not None
        )


def test_threads_share_a_scorer_and_a_cache(scorer: Scorer) -> None:
    cache = StateCache(scorer, max_bytes=1 << 30)
    events = [("1", 1), ("2", 0), ("9", 1), ("10", 0)]
    wrong: list[object] = []

    def work(thread: int) -> None:
        for turn in range(3):
            user = thread, turn
            cache.put(user, scorer.encode([]))
            for count, (item, label) in enumerate(events, 1):
                state = cache.append(user, item, label)
                assert state is not None
                if np.abs(scorer.score(state, CANDIDATES) - expected[count]).max() > TOLERANCE:
                    wrong.append((user, count))

    expected = [alone(scorer, events[:count], CANDIDATES) for count in range(WINDOW + 1)]
    in_threads(work, 4)
    assert wrong == []
    assert replayed(scorer) > 40


def test_nothing_is_captured_on_a_cpu(run_folder: Path) -> None:
    for graphs in (True, False):
        assert not Scorer.from_run(run_folder, device="cpu", graphs=graphs).uses_graphs


def test_a_job_goes_on_as_it_began(
    run_folder: Path, run_scorer: Scorer, requests_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padding rounds otherwise: a job that was begun through graphs, or without, is gone on with in the same way, and gives the same bytes."""
    whole, output = (requests_file.with_name(name) for name in ("whole.jsonl", "out.jsonl"))
    replaying = [through_graphs(Scorer.from_run(run_folder, device="cpu")) for _ in range(2)]
    score(replaying[0], requests_file, whole)
    assert replayed(replaying[0]) > 0
    broken_off(replaying[0], requests_file, output, monkeypatch)
    with pytest.raises(
        FileExistsError, match=re.escape("another device (cpu through CUDA graphs, not cpu): delete it and")
    ):
        score(run_scorer, requests_file, output)
    assert score(replaying[1], requests_file, output).resumed > 0
    assert output.read_bytes() == whole.read_bytes()
