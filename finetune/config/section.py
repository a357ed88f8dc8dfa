"""What every section of a recipe is made of."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo

Text = Annotated[str, Field(min_length=1)]
Patterns = Annotated[list[Text], Field(min_length=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Probability = Annotated[float, Field(ge=0.0, lt=1.0)]


class Section(BaseModel):
    """A mapping of a recipe: strict, frozen, no key but those it lists."""

    chosen_by: ClassVar[str] = "kind"
    """The key that says which section is meant, where one of several may stand."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        serialize_by_alias=True,  # `for` is a word of Python's
    )


def fields(section: type[Section]) -> dict[str, FieldInfo]:
    """What a section lists, by its keys in a recipe."""
    return {field.alias or name: field for name, field in section.model_fields.items()}
