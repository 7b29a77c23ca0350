"""What pydantic found wrong, for a sentence to a person."""

from __future__ import annotations

from pydantic import ValidationError

__all__ = ["first_problem"]


def first_problem(error: ValidationError, *within: str) -> str:
    """The first problem as "field: what is wrong", the field with dots; `within` goes before it. No full stop."""
    first = error.errors()[0]
    return f"{'.'.join([*within, *(str(part) for part in first['loc'])])}: {first['msg']}"
