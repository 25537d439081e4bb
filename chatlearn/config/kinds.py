"""The kinds of value that keys have, each refusing what it is not with a remedy."""

from __future__ import annotations

from datetime import date
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError


def _refuse(message: str) -> PydanticCustomError:
    return PydanticCustomError("refused", "{message}", {"message": message})


def only(value: str | bool, because: str) -> BeforeValidator:
    """A key that users of ChatLearn write and that has one sensible value here."""

    def check(given: Any) -> Any:
        if given != value:
            raise _refuse(f"must be {str(value).lower()}: {because}")
        return given

    return BeforeValidator(check)


def _folder_name(name: str) -> str:
    if not name or name in (".", "..") or "/" in name or "\\" in name:
        raise _refuse("must name one folder, without a slash; see runtime_args.output_dir")
    return name


def _top_k(value: int) -> int:
    if value < 1 and value != -1:
        raise _refuse("must be at least 1, or -1 for no limit")
    return value


def _explores(temperature: float) -> float:
    if temperature <= 0:
        raise _refuse(
            "must be more than 0: without exploration all rollouts of a prompt are equal; for "
            "greedy evaluation set models.policy.eval_temperature=0"
        )
    return temperature


def _file_list(text: str) -> str:
    if text.strip() and not all(part.strip() for part in text.split(",")):
        raise _refuse("has an empty name between its commas; name one file, or several as a,b")
    return text


def _iso_date(given: Any) -> Any:
    """YAML reads 2025-01-31 as a date."""
    text = given.isoformat() if isinstance(given, date) else given
    try:
        date.fromisoformat(text)
    except (TypeError, ValueError):
        raise _refuse("must be a day like 2025-01-31") from None
    return text


def _not_blank(text: str) -> str:
    if not text.strip():
        raise _refuse("must name something; it is empty")
    return text


Whole = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(gt=0, le=1)]
Below1 = Annotated[float, Field(ge=0, lt=1)]
TopK = Annotated[int, AfterValidator(_top_k)]
Name = Annotated[str, AfterValidator(_not_blank)]
FolderName = Annotated[str, AfterValidator(_folder_name)]
Temperature = Annotated[float, AfterValidator(_explores)]
FileList = Annotated[str, AfterValidator(_file_list)]
Day = Annotated[str, BeforeValidator(_iso_date)]
Layers = Annotated[tuple[Name, ...], Field(strict=False)] | Literal["all-linear"]
Scalar = bool | int | float | str


class FrozenDict(dict):
    """A mapping of a frozen tree: it cannot be written, and can be hashed and pickled."""

    def __setitem__(self, name: str, value: Any) -> None:
        raise TypeError("the configuration is frozen")

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def __reduce__(self) -> tuple:
        return FrozenDict, (dict(self),)


Flags = Annotated[dict[str, Scalar], AfterValidator(FrozenDict)]
FileNames = Annotated[FileList, AfterValidator(_not_blank)]


class Section(BaseModel):
    """A node of the tree."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )
