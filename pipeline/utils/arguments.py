"""Keyword arguments that a function does not have are refused with the nearest name."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import ParamSpec, TypeVar

from framestream.pipeline.utils.command_line import nearest_name

P = ParamSpec("P")
R = TypeVar("R")


def refuse_unknown_arguments(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function without ``**kwargs``, so that the TypeError for an unknown argument names the nearest one."""
    names = [name for name in inspect.signature(function).parameters if name != "self"]

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        check_argument_names(function.__qualname__.removesuffix(".__init__"), kwargs, names)
        return function(*args, **kwargs)

    return call


def check_argument_names(owner: str, given: Iterable[str], known: Sequence[str]) -> None:
    """Compare names of arguments with those that ``owner`` has.

    Raises:
        TypeError: one is unknown; the message names the nearest one.
    """
    for name in given:
        if name not in known:
            raise TypeError(f"{owner}: unknown argument {name}{nearest_name(name, known)}")
