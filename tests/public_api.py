"""Writes down the public API as text, for the snapshot in `public_api.txt`: names, signatures, fields, methods.

.venv/bin/python -P tests/public_api.py > tests/public_api.txt      # when a change is meant; say it in the changelog
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from typing_extensions import is_typeddict

import overnight


def described() -> str:
    """Return the whole API, one line for each name, method and field."""
    parts = [("overnight", overnight), ("overnight.events", overnight.events)]
    return "\n\n".join("\n".join(_module(name, module)) for name, module in parts) + "\n"


def _module(title: str, module: ModuleType) -> Iterator[str]:
    yield f"# {title}"
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.isclass(value):
            yield from _class(name, value)
        elif callable(value):
            yield f"{name}{inspect.signature(value)}"
        else:
            yield f"{name} (module)"


def _class(name: str, value: type[Any]) -> Iterator[str]:
    bases = ", ".join(base.__name__ for base in value.__bases__ if base is not object)
    yield f"{name}({bases})"
    if is_typeddict(value) or dataclasses.is_dataclass(value):
        for field, annotation in inspect.get_annotations(value).items():
            yield f"    {field}: {getattr(annotation, '__forward_arg__', annotation)}"
    for method, function in vars(value).items():
        if not method.startswith("_"):
            yield from _member(method, function)


def _member(name: str, member: Any) -> Iterator[str]:
    if isinstance(member, property):
        yield f"    {name} (property)"
    elif isinstance(member, classmethod | staticmethod):
        yield f"    {name}{inspect.signature(member.__func__)} (class)"
    elif inspect.isfunction(member):
        yield f"    {name}{inspect.signature(member)}"


if __name__ == "__main__":
    sys.stdout.write(described())
