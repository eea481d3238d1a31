"""Scoring candidates of a user with a trained run, a hundred of them in one pass.

    scorer = Scorer.from_run("runs/mine")
    scorer.score([("50", 1), ("172", 0)], ["181", "1", {"title": "Brazil (1985)", "genres": ["Sci-Fi"]}])
    scorer = Scorer.from_export("models/clicks")             made by `dti export`; knows no ids unless it is given prepared data

In bfloat16 (`precision`) weights are cast once, when the scorer is made. Its probabilities lie within BFLOAT16_BOUND of those in float32.

The history is computed once and every candidate sees the history and itself, so its score is that of a
sliding-window prompt of its own. `encode` keeps the history for later calls; `append` adds what the user did next.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from dti_model.model import ClickModel, GraphedPasses, LayerKeys, Run, cast_once, passes_of
from dti_model.precision import DEFAULT, Precision, resolve
from dti_model.prompts import IntArray, consecutive_batches
from dti_model.scorer.contexts import Facts
from dti_model.scorer.items import Item, ItemError
from dti_model.scorer.reader import Candidate, History, RequestReader
from dti_model.scorer.requests import HistoryState, Request, Tokens, packed_pass
from dti_model.shown import shown

# How far a probability in bfloat16 may lie from the one in float32: several times the most that a small model shows which has learnt its
# labels by heart. Models of real data stay nearer. A calibration of temperature T, fitted after training, makes it 1 / T of that.
BFLOAT16_BOUND = 0.02

Scores = npt.NDArray[np.float64]


class Scorer:
    """Click probabilities of candidates. Safe to call from several threads.

    Attributes:
        click_model: model, tokenizer, and what prompts are made of.
        token_budget: rows of a pass at most; more candidates take more passes.
        precision: that it computes in, states of histories included.

    Probabilities are calibrated as the run's own are, if `click_model` has a calibration.
    """

    def __init__(
        self,
        run: Run | ClickModel,
        token_budget: int = 16384,
        precision: Precision = DEFAULT,
        graphs: bool = True,
    ) -> None:
        """Score with a run that is loaded already; its model is put into evaluation mode.

        Args:
            run: the run or export. In bfloat16 the scorer's model is another one, which shares what is not cast.
            token_budget: rows of a pass at most.
            precision: to compute in.
            graphs: replay passes as CUDA graphs where the model is on a GPU (`dti_model.model.graphs`): the host does less, from the third
                pass of a shape on, and graphs hold memory. Passes are padded, small ones by up to 16 rows, others by a quarter at most. No
                effect elsewhere, on models that are quantised or compiled, and on passes so large that the device takes longer than its host.

        Raises:
            ValueError: the token budget is below 1, or float32 is asked of weights that another scorer has cast to bfloat16.
        """
        if token_budget < 1:
            raise ValueError(f"token_budget must be >= 1, got {token_budget}")
        click_model = ClickModel.of_run(run) if isinstance(run, Run) else run
        self.precision = resolve(precision, click_model.model.device)
        model = replace(click_model, model=cast_once(click_model.model, self.precision))
        self.click_model, self.token_budget = model, token_budget
        self._run = (
            replace(run, model=model.model, precision=self.precision) if isinstance(run, Run) else None
        )
        self._format = model.prompt
        self._passes = passes_of(model.model, model.dti, model.prompt.labels, self.precision, graphs)
        self._reader = RequestReader(model)

    @property
    def run(self) -> Run:
        """The run; an export has none.

        Raises:
            ValueError: the scorer was made from an export.
        """
        if self._run is None:
            raise ValueError("this scorer was made from an export, which has no run: see click_model")
        return self._run

    @property
    def uses_graphs(self) -> bool:
        """Whether passes are replayed as CUDA graphs, or would be if they could be captured."""
        return isinstance(self._passes, GraphedPasses)

    @staticmethod
    def from_run(
        folder: str | Path,
        data: str | Path | None = None,
        device: str | None = None,
        token_budget: int = 16384,
        other_data: bool = False,
        base: str | None = None,
        precision: Precision = DEFAULT,
        graphs: bool = True,
        calibration: bool = True,
    ) -> Scorer:
        """Load a run folder (safetensors, JSON and YAML; nothing is unpickled).

        Args:
            folder: made by `dti train`.
            data: prepared folder that items and users are looked up in; default: the one of the run.
            device: torch device; default: cuda where there is one.
            token_budget: rows of a pass at most.
            other_data: the prepared folder may be another one than the run was trained on.
            base: where the pretrained model of a LoRA run is now.
            precision: to compute in; it need not be that of the training.
            graphs: replay CUDA graphs on a GPU.
            calibration: calibrate the probabilities, if the run has a calibration; False: as the model was trained.

        Raises:
            FileNotFoundError: no run folder, or its training has not ended.
            DataError: the prepared folder cannot be read.
            ValueError: it is not the one that the run was trained on, and `other_data` is False; or there is no such device.
        """
        place = None if data is None else Path(data)
        run = Run.load(Path(folder), place, device, other_data, base, calibration)
        return Scorer(run, token_budget, precision, graphs)

    @staticmethod
    def from_export(
        folder: str | Path,
        data: str | Path | None = None,
        device: str | None = None,
        token_budget: int = 16384,
        other_data: bool = False,
        precision: Precision = DEFAULT,
        graphs: bool = True,
        calibration: bool = True,
    ) -> Scorer:
        """Load a folder that `dti export` made, in any mode (safetensors and JSON; nothing is unpickled).

        Scores are those of `from_run` bit for bit where the export has the run's weights: from scratch, or fine-tuned in full. Of a
        LoRA run the export has W + B A where the run computes W x + B (A x): equal within rounding of `model.dtype`. The base of a
        quantised run is exported unquantised, and its scores differ by what quantisation cost.

        Args:
            folder: made by `dti export`.
            data: prepared folder that item ids and users are looked up in; default: none, and items are given by their fields or as
                {"text": ...}, histories in full.
            device, token_budget, other_data, precision, graphs, calibration: as in `from_run`.

        Raises:
            FileNotFoundError: no folder made by `dti export`.
            DamagedFileError: a file of it is not what was written.
            DataError: the prepared folder cannot be read, or is another one.
            ValueError: there is no such device.
        """
        data = None if data is None else Path(data)
        model = ClickModel.of_export(Path(folder), data, device, other_data, calibration)
        return Scorer(model, token_budget, precision, graphs)

    def score(
        self,
        history: History | HistoryState,
        candidates: Sequence[Candidate],
        *,
        user: str | int | None = None,
        profile: Mapping[str, Any] | None = None,
        context: Mapping[str, Any] | None = None,
    ) -> Scores:
        """Click probabilities of one user's candidates.

        Args:
            history: `(item, label)` pairs, oldest first, label 1 (or True) for a click and 0 (or False) for none; the last n count (n is the
                run's window). Empty: a new user. Where interactions have a context, `(item, label, context)`. Or the state that `encode` made.
            candidates: items, each an id, its fields or {"text": ...} (see `dti_model.scorer.items`). Every candidate is scored by
                itself: order, company and repetition do not matter. {"item": ..., "context": {...}} adds to the context.
            user: whose profile in the prepared data is meant; one who is not there has none.
            profile: the fields of the user's profile, in the place of those of `user`.
            context: of all candidates, fields by name (see `dti_model.scorer.contexts`).

        Returns:
            `(len(candidates),)` float64.

        Raises:
            ItemError: an item is unknown or its text empty, a label is neither 0 nor 1, or a field of a context is missing; the message
                names the place.
            ValueError: the state belongs to another scorer.

        Cost: one pass over `history + candidates` tokens; beyond the token budget the history is encoded once and the
        candidates take several passes.
        """
        return self.score_many(
            [self.request(history, candidates, user=user, profile=profile, context=context)]
        )[0]

    def request(
        self,
        history: History | HistoryState,
        candidates: Sequence[Candidate],
        *,
        user: str | int | None = None,
        profile: Mapping[str, Any] | None = None,
        context: Mapping[str, Any] | None = None,
    ) -> Request:
        """The arguments of `score`, checked and in token ids, for `score_many`; raises the errors of `score`."""
        if isinstance(history, HistoryState):
            self._check_owner(history)
        return self._reader.request(history, candidates, user, profile, context)

    def score_many(
        self, requests: Sequence[Request | tuple[History | HistoryState, Sequence[Item]]]
    ) -> list[Scores]:
        """`score` of many users at once, packed into passes of at most the token budget; in the order of the requests.

        Args:
            requests: results of `request`, or `(history, candidates)` pairs, its arguments.

        Raises:
            ItemError: as in `score`; the message names the pair.
            TypeError: one is neither.
        """
        checked = [self._checked(place, request) for place, request in enumerate(requests)]
        parts = [part for request in checked for part in self._parts(request)]
        num_rows = np.asarray([rows for _, rows in parts], np.int64)
        batches = consecutive_batches(num_rows, self.token_budget)
        logits = [self._forward([parts[i][0] for i in batch])[0] for batch in batches]
        scores = [torch.softmax(one.double(), -1)[:, 1].cpu().numpy() for one in logits]
        flat = np.concatenate([np.empty(0), *scores])
        if self.click_model.calibration is not None:
            flat = self.click_model.calibration(flat)
        return np.split(flat, np.cumsum([len(request.candidates) for request in checked]))[: len(checked)]

    def encode(
        self,
        history: History,
        *,
        user: str | int | None = None,
        profile: Mapping[str, Any] | None = None,
    ) -> HistoryState:
        """Compute a history's last n interactions once, for any number of calls of `score`.

        Raises:
            ItemError: as in `score`.
        """
        head = self._reader.profile(user, profile)
        return self._encoded(*self._reader.history(history), head, "encoded")

    def append(
        self, state: HistoryState, item: Item, label: int, context: Mapping[str, Any] | None = None
    ) -> HistoryState:
        """The state after one more interaction; the given one stays as it is.

        While the history is shorter than the window, only the new interaction is computed (`origin` is `extended`). Afterwards
        the oldest one leaves: the states of the others have read it, which no sliding-window prompt has, so the last n are
        computed anew (`re-encoded`).

        Raises:
            ItemError: as in `score`.
            TypeError: `state` is none.
            ValueError: the state belongs to another scorer.
        """
        self._check_owner(state)
        new, facts = self._reader.interaction(item, label, context, state.facts)
        interactions = (*state.interactions, new)
        if len(interactions) > self._format.window:
            return self._encoded(interactions[1:], facts, state.profile, "re-encoded")
        request = Request(state.interactions, [new], state, state.profile)
        _, layers = self._forward([request], records=True)
        return HistoryState("extended", interactions, state.profile, facts, tuple(layers), self)

    def history_of(self, user: str | int) -> list[Any]:
        """The stored history of a user of the prepared data, oldest first: `(item id, label)` pairs, or `(item id, label, context)`.

        Raises:
            ItemError: the prepared data has no such user.
        """
        return self._reader.history_of(user)

    def text_of(self, item: Item) -> str:
        """The text of an item, before it is cut to the model's limit.

        Raises:
            ItemError: the item is unknown.
        """
        return self._reader.items.text(item)

    # Requests to parts: token ids, and no more than fits a pass.

    def _checked(self, place: int, request: Any) -> Request:
        if isinstance(request, Request):
            return request
        if not isinstance(request, (tuple, list)) or len(request) != 2:
            raise TypeError(
                f"requests[{place}] must be a (history, candidates) pair, or what scorer.request(history, candidates) makes of one, "
                f"got {shown(request)}"
            )
        try:
            return self.request(*request)
        except ItemError as error:
            raise ItemError(f"requests[{place}]: {error}") from None

    def _parts(self, request: Request) -> Iterator[tuple[Request, int]]:
        """The request, cut where it would pass the token budget, and the rows of each part."""
        shared = len(self._format.prefix) + len(request.profile) + sum(map(len, request.history))
        num_rows = np.asarray([len(tokens) + 1 for tokens in request.candidates], np.int64)
        state = request.state
        if shared + num_rows.sum() > self.token_budget and len(num_rows) > 1:
            state = state or self._encoded(request.history, Facts(), request.profile, "encoded")
        for some in consecutive_batches(num_rows, self.token_budget - shared):
            part = Request(request.history, [request.candidates[i] for i in some], state, request.profile)
            yield part, shared + int(num_rows[some].sum())

    def _check_owner(self, state: HistoryState) -> None:
        if not isinstance(state, HistoryState):
            raise TypeError(f"a state is what encode or append returns, got {shown(state)}")
        if state.owner is not self:
            raise ValueError("the state was made by another scorer: encode the history with this one")

    # Parts to the model.

    def _encoded(
        self, history: Tokens, facts: Facts, profile: IntArray, origin: Literal["encoded", "re-encoded"]
    ) -> HistoryState:
        _, layers = self._forward([Request(history, [], None, profile)], records=True)
        return HistoryState(origin, history, profile, facts, tuple(layers), self)

    def _forward(self, parts: list[Request], records: bool = False) -> tuple[torch.Tensor, list[LayerKeys]]:
        """Logits `(S, 2)` of the candidates of a packed pass and, if they are wanted, the keys of its context rows by layer."""
        return self._passes.compute(packed_pass(parts, self._format), records)
