"""The sources of a data set: one, or several with settings of their own."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from custom_components.datasets.dialog_rules import OnEmptyAnswer, OnUnevenTurns
from custom_components.runtime.errors import UserError
from custom_components.runtime.validation import nearest_name, value_problems


def _is_named(source: str) -> str:
    if not source.strip():
        raise ValueError(
            "the name of a file, a folder, a glob or a data set on the hub; this is empty: "
            "a shell variable may be unset"
        )
    return source


SourceName = Annotated[str, AfterValidator(_is_named)]


class WeightedSource(BaseModel):
    """One of several sources. What it leaves out is as for the whole data set, see :func:`chat_dataset`.

    `weight` is how often its rows are seen in an epoch: 0.5 takes half of them.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    source: SourceName
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    split: str = "train"
    subset: str | None = None
    revision: str | None = None
    streaming: bool = False
    max_rows: PositiveInt | None = None
    format: str | None = None
    column_map: dict[str, str] = {}
    system_prompt: str | None = None
    on_overlong: Literal["truncate", "drop", "error"] = "truncate"
    on_bad_row: Literal["error", "skip"] = "error"
    on_uneven_turns: OnUnevenTurns = "error"
    on_empty_answer: OnEmptyAnswer = "drop"


def weighted_sources(source: Any, for_all: Mapping[str, Any]) -> dict[str, WeightedSource]:
    """Read the sources of a data set, before any of their files is opened.

    Args:
        source: a name, or a list of names and of what :class:`WeightedSource` holds.
        for_all: the settings of sources that have none of their own.

    Returns:
        the sources by their key in the config.

    Raises:
        UserError: no source, an unknown key, or a value that is not of its type or range: all of them at once.
    """
    if isinstance(source, str):
        entries = {"dataset.source": source}
    else:
        entries = {f"dataset.source[{index}]": entry for index, entry in enumerate(source)}
    if not entries:
        raise UserError("dataset.source: is an empty list; name a file or a data set on the hub")
    sources: dict[str, WeightedSource] = {}
    problems: list[str] = []
    for key, entry in entries.items():
        values = {"source": entry} if isinstance(entry, str) else entry
        if isinstance(values, WeightedSource):
            values = values.model_dump(exclude_unset=True)
        try:
            if isinstance(values, Mapping):
                values = {**for_all, **values}
            name_key = key if isinstance(entry, str) else f"{key}.source"
            sources[name_key] = WeightedSource.model_validate(values)
        except ValidationError as error:
            for place, message in value_problems(error, values, _hint).items():
                is_name = isinstance(entry, str)
                where = key if is_name and place == ".source" else f"{'dataset' if is_name else key}{place}"
                problems.append(f"{where}: {message}")
    if problems:
        raise UserError(*problems)
    return sources


def _hint(place: str) -> str:
    near = nearest_name(place.rpartition(".")[2], WeightedSource.model_fields)
    return f"; did you mean {near!r}?" if near else ""
