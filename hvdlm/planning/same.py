"""A key of caches that is equal to itself alone."""

from __future__ import annotations

from typing import Generic, TypeVar

Value = TypeVar("Value")


class Same(Generic[Value]):
    """A value as an argument of cached functions: the same object is the same key.

    Descriptions of models and machines are never modified; comparing or hashing their thousands of fields would take
    longer than what is cached.
    """

    __slots__ = ("value",)

    def __init__(self, value: Value) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)
