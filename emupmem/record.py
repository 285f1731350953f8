# SPDX-License-Identifier: Apache-2.0
"""Values, as `@dataclass(frozen=True, slots=True)` makes them, for a tenth of its price.

`dataclasses` writes methods for each class as text and compiles them whenever the program starts: with the classes that
`emupmem suggest` needs, that was a tenth of its time. Here the methods are ready, and all classes share them.
`dataclasses.replace`, `asdict` and `fields` work as with any dataclass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, Field, FrozenInstanceError, dataclass, field, fields
from operator import attrgetter
from typing import Any, NoReturn, TypeVar, dataclass_transform

T = TypeVar("T")


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def record(made: type[T]) -> type[T]:
    """Make a class a frozen dataclass with slots."""
    kind: Any = open_record(made)
    values = _values(kind)
    kind.__hash__ = lambda self: hash(values(self))
    kind.__setattr__ = kind.__delattr__ = _refuse
    return kind  # type: ignore[no-any-return]


@dataclass_transform(field_specifiers=(field,))
def open_record(made: type[T]) -> type[T]:
    """Make a class a dataclass with slots whose values may be set anew."""
    made.__doc__ = made.__doc__ or made.__name__  # else `dataclass` looks for one, with half of `inspect`
    kind: Any = dataclass(init=False, repr=False, eq=False, slots=True)(made)
    kind.__init__ = _init(kind, fields(kind))
    values = _values(kind)
    kind.__eq__ = lambda self, other: (
        values(self) == values(other) if other.__class__ is self.__class__ else NotImplemented
    )
    kind.__hash__ = None
    kind.__repr__ = _repr
    kind.__reduce__ = _reduce
    return kind  # type: ignore[no-any-return]


def _values(kind: Any) -> Callable[[Any], Any]:
    """What two of a kind are compared by."""
    compared = [f.name for f in fields(kind) if f.compare]
    return attrgetter(*compared) if compared else lambda one: ()


def _init(kind: Any, all_fields: tuple[Field[Any], ...]) -> Callable[..., None]:
    """What sets the attributes, positional values first; TypeError for one too many, or one too few."""
    setters = {f.name: getattr(kind, f.name).__set__ for f in all_fields}
    in_order = tuple(setters.values())
    after = getattr(kind, "__post_init__", None)

    def set_all(self: Any, *given: Any, **named: Any) -> None:
        if len(given) > len(in_order):
            raise TypeError(f"{kind.__name__} has {len(in_order)} values, not {len(given)}")
        for setter, value in zip(in_order, given, strict=False):
            setter(self, value)
        for one in all_fields[len(given) :]:
            if not one.init:
                continue
            setters[one.name](self, named.pop(one.name) if one.name in named else _default(kind, one))
        if named:
            raise TypeError(f"{kind.__name__} does not take {', '.join(named)}")
        if after is not None:
            after(self)

    return set_all


def _default(kind: Any, one: Field[Any]) -> Any:
    if one.default_factory is not MISSING:
        return one.default_factory()
    if one.default is MISSING:
        raise TypeError(f"{kind.__name__} needs {one.name}")
    return one.default


def _repr(self: Any) -> str:
    shown = ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if f.repr)
    return f"{self.__class__.__qualname__}({shown})"


def _refuse(self: Any, name: str, *value: Any) -> NoReturn:
    raise FrozenInstanceError(f"{self.__class__.__name__}.{name} cannot be set")


def _reduce(self: Any) -> tuple[Any, tuple[Any, ...]]:
    return self.__class__, tuple(getattr(self, f.name) for f in fields(self))
