"""What every section of a recipe is."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError, ValidationError


def inconsistent(sentence: str) -> PydanticCustomError:
    """Return the error of keys that are valid one by one but not together; its message is `sentence` alone."""
    return PydanticCustomError("inconsistent", "{sentence}", {"sentence": sentence})


class Section(BaseModel):
    """Unknown keys, infinite numbers, and true or false in place of a number are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _refuse_truth_for_a_number(cls, values: Any) -> Any:
        """Refuse true and false, which pydantic would read as 1 and 0."""
        error = PydanticCustomError("truth", "this key is not true or false")
        wrong = [
            InitErrorDetails(type=error, loc=(key,), input=value)
            for key, value in (values.items() if isinstance(values, dict) else ())
            if isinstance(value, bool)
            and key in cls.model_fields
            and cls.model_fields[key].annotation is not bool
        ]
        if wrong:
            raise ValidationError.from_exception_data(cls.__name__, wrong)
        return values
