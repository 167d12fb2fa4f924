"""Objects that hold models, connections and locks: pickled as what they are made of, and made anew from that.

LlamaIndex's components leave out of a pickle what cannot be pickled and come back without it; ours come back whole, or
are refused in one line. Knows nothing of what it rebuilds.
"""

from __future__ import annotations

import inspect
import os
import pickle
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ValidationError

from mm_retriever.errors import CopyError, one_line, reason_of, shown
from mm_retriever.images import ImagePolicy

Name = Annotated[str | None, BeforeValidator(lambda value: str(value).removeprefix("torch."))]
"""A device or dtype: torch's own is kept by its name, which JSON and other processes take."""
_LEFT_OUT = "not_described"
_NOT_CARRIED = frozenset(("callback_manager", "rate_limiter"))
"""Fields that belong to a process: they hold locks and open handlers."""


class Secret:
    """Stands for a key where things are written down."""


class Rebuilt:
    """Put before a LlamaIndex component whose constructor loads or connects; `_made_of` says what it was given.

    A pickle holds the arguments and loads the model again where it is opened; a copy shares the model.
    """

    @classmethod
    def class_name(cls) -> str:
        """LlamaIndex's name for the class, under which it is serialised."""
        return cls.__name__

    def _made_of(self) -> dict[str, Any]:
        """The constructor's arguments for an equal object in another process.

        Raises:
            CopyError: there are none.
        """
        raise NotImplementedError

    def _described(self) -> dict[str, Any]:
        """The arguments that `to_dict` writes down; `from_dict` asks for those that JSON does not hold."""
        return self._made_of()

    def _changed_since(self) -> dict[str, Any]:
        """What was set after construction and is no argument; `_change` takes it."""
        return {}

    def _change(self, changes: Mapping[str, Any]) -> None:
        """Set on a new object what `_changed_since` gave."""

    def _unshare(self) -> None:
        """Give a copy its own of what must not be shared; models and fields are."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _made, (type(self), self._made_of(), self._changed_since())

    def __copy__(self) -> Self:
        copied: Self = BaseModel.__copy__(self)  # type: ignore[type-var]
        copied._unshare()
        return copied

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        return self.__copy__()

    def to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """The fields and the constructor's arguments, as JSON holds them; `from_dict` makes an equal object of them."""
        described: dict[str, Any] = super().to_dict(**kwargs)  # type: ignore[misc]
        try:
            made_of = self._described()
        except CopyError:
            made_of = {"model": self}
        left_out = sorted(name for name, value in made_of.items() if not _is_plain(value))
        described |= {name: _plain(value) for name, value in made_of.items() if _is_plain(value)}
        return {**described, _LEFT_OUT: left_out} if left_out else described

    @classmethod
    def from_dict(cls, data: dict[str, Any], **kwargs: Any) -> Self:
        """The object that `to_dict` described, loaded again; keyword arguments replace what it says.

        Raises:
            CopyError: it was made of something that a dict does not hold, and that is not given.
        """
        known = inspect.signature(cls).parameters
        given = {name: value for name, value in data.items() if name in known and name not in _NOT_CARRIED} | kwargs
        if missing := [name for name in data.get(_LEFT_OUT, ()) if name not in kwargs]:
            raise CopyError(
                f"this {cls.__name__} was made with {', '.join(missing)}, which a dict does not hold: "
                f"{cls.__name__}.from_dict(data, {missing[0]}=...)"
            )
        if isinstance(policy := given.get("image_policy"), Mapping):
            given["image_policy"] = ImagePolicy(**policy)
        return cls(**given)


def field_arguments(component: Any) -> dict[str, Any]:
    """Return the fields of a component that its constructor takes under the same name."""
    known = inspect.signature(type(component)).parameters
    return {
        name: getattr(component, name) for name in type(component).model_fields if name in known.keys() - _NOT_CARRIED
    }


def portable_name(model: str | os.PathLike[str]) -> str:
    """Return the name of a model for another process: a path that is there is made absolute."""
    path = Path(model).expanduser()
    return str(path.resolve()) if path.exists() else os.fspath(model)


def check_whole(component: Any) -> Any:
    """Return the component; its own pickle leaves no field out.

    Raises:
        CopyError: LlamaIndex would drop a field that cannot be pickled, and the copy would be another object.
    """
    if component is None or isinstance(component, Rebuilt):
        return component
    private = getattr(component, "__pydantic_private__", None) or {}
    parts = {name: getattr(component, name, None) for name in getattr(type(component), "model_fields", ())}
    parts |= {name: value for name, value in private.items() if inspect.isroutine(value)}  # clients are made anew
    for name in sorted(parts.keys() - _NOT_CARRIED):
        if reason := _pickling_problem(parts[name]):
            raise CopyError(
                f"this {type(component).__name__} cannot be pickled: its {name!r} cannot ({reason}). "
                "Make it anew in the other process"
            )
    return component


def _pickling_problem(value: Any) -> str:
    try:
        pickle.dumps(value)
    except Exception as error:  # whatever a part of it raises
        return reason_of(error, 200)
    return ""


def wrong_options(cls: type, error: ValidationError) -> str:
    """Return what is wrong with the options of a component, on one line."""
    problems = []
    for problem in error.errors():
        name = ".".join(map(str, problem["loc"]))
        if problem["type"] == "extra_forbidden":
            known = ", ".join(sorted(inspect.signature(cls).parameters))
            problems.append(f"{cls.__name__} has no option {name!r}; there are {known}")
        else:
            problems.append(f"{name}={shown(problem['input'])}: {one_line(problem['msg'], 300).lower()}")
    return "; ".join(problems)


def loaded_model_error(what: str) -> CopyError:
    """Return the error for an object that was made from a loaded model."""
    return CopyError(
        f"this {what} was made from a loaded model, which a pickle does not hold: make it from a model name or folder, "
        "or make it anew in the other process (copy.deepcopy works: it shares the model)"
    )


def _made(cls: type[Rebuilt], arguments: dict[str, Any], changes: dict[str, Any]) -> Rebuilt:
    made = cls(**arguments)
    made._change(changes)
    return made


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    return value is None or isinstance(value, str | int | float | bool | ImagePolicy)


def _plain(value: Any) -> Any:
    if not isinstance(value, ImagePolicy):
        return value
    plain = {field.name: getattr(value, field.name) for field in fields(value)}
    return plain | {"roots": None if value.roots is None else [str(root) for root in value.roots]}
