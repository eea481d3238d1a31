"""Contexts of interactions, from columns of the log and from facts that it implies, by a template."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import polars as pl

from dti_model.data.coded_texts import CodedTexts, Column, coded_texts
from dti_model.data.contexts import BUILT_IN, OF_TIME
from dti_model.data.errors import DataError
from dti_model.data.row_facts import RowFacts
from dti_model.data.texts import FINISHED, MAX_CHARS, Template, clean_text, shorten
from dti_model.data.times import Clock

if TYPE_CHECKING:
    from dti_model.data.index import Indexed
    from dti_model.data.sources import RawData


def context_template(text: str) -> Template:
    """The template of a context.

    Raises:
        ValueError: it is malformed, or names a column that requests could not give: "text" and "timestamp" mean something else there.
    """
    template = Template(text, missing_title=None)
    for name, meaning in (
        (FINISHED, "finished parts"),
        ("timestamp", "the moment that hour, weekday and gap follow from"),
    ):
        if name in template.columns:
            raise ValueError(
                f"context_text {text!r} names a column {name}, which in the context of a request means {meaning}: rename that column in "
                "the log and in the template"
            )
    return template


def facts_of(raw: RawData, data: Indexed, columns: Mapping[str, npt.NDArray[Any]], timezone: str) -> RowFacts:
    """What the log implies of rows whose columns of interactions.arrow are known."""
    by_time = np.empty_like(columns["order"])
    by_time[columns["order"]] = np.arange(by_time.size)
    return RowFacts(
        offsets=data.offsets,
        item=columns["item"],
        label=columns["label"],
        timestamp=columns["timestamp"],
        by_time=by_time,
        split=columns["split"],
        unit=raw.timestamp_unit,
        timezone=timezone,
        place=str(raw.interactions_path),
        item_texts=data.items["text"],
    )


def contexts_of(
    template: Template,
    facts: RowFacts,
    extra: dict[str, tuple[npt.NDArray[np.int32], pl.Series]],
) -> tuple[CodedTexts, dict[str, Any]]:
    """Contexts of all interactions, and their rule, as stats.json has it.

    Args:
        template: of a context.
        facts: what the log implies.
        extra: columns of the log by name: codes of the rows, and values by code. They come before facts of the same name.

    Raises:
        DataError: the template names neither a column nor a built-in fact, or the time stamps are no dates.
    """
    missing = [name for name in template.columns if name not in extra and name not in BUILT_IN]
    if missing:
        raise DataError(
            f"{facts.place}: there is no column {', '.join(missing)}, which context_text {template.template!r} names; "
            f"built in are {', '.join(BUILT_IN)}"
        )
    columns, built_in = {}, []
    for name in template.columns:
        if name in extra:
            codes, values = extra[name]
            columns[name] = Column(codes, [shorten(clean_text(str(value)), MAX_CHARS) for value in values])
        else:
            columns[name] = BUILT_IN[name](facts)
            built_in.append(name)
    per_second = None
    if not OF_TIME.isdisjoint(built_in):
        times = facts.timestamp
        per_second = Clock(facts.unit, int(times.min()), int(times.max()), facts.place).per_second()
    rule = {
        "text": template.template,
        "max_chars": MAX_CHARS,
        "built_in": built_in,
        "timezone": facts.timezone,
        "per_second": per_second,
    }
    return coded_texts(template, columns, len(facts.item)), rule
