"""A method's settings, from `--config FILE` and `--set field=value`, typed by the method's own fields."""

from __future__ import annotations

import copy
import difflib
import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from ..errors import UsageError

Config = TypeVar("Config", bound=BaseModel)
_WORDS = {"True": True, "False": False, "None": None}


def read_config(file: Path | None) -> dict[str, Any]:
    """Fields in a TOML or JSON file; a suffix other than .toml means JSON.

    Raises:
        UsageError: when the file cannot be read or holds something else.
    """
    if file is None:
        return {}
    try:
        text = file.read_text(encoding="utf-8")
        content = tomllib.loads(text) if file.suffix == ".toml" else json.loads(text)
    except OSError as error:
        raise UsageError(
            f"--config {file} cannot be read: {error.strerror}.", "Check the path."
        ) from None
    except ValueError as error:  # both parsers', and bytes that are no text
        raise UsageError(
            f"--config {file} is not {'TOML' if file.suffix == '.toml' else 'JSON'}: {error}.",
            'Write for example {"criterion": "magnitude"}, or criterion = "magnitude" in a .toml file.',
        ) from None
    if not isinstance(content, dict):
        raise UsageError(f"--config {file} holds no fields.", "Write an object of field: value.")
    return content


def parse_sets(assignments: Sequence[str]) -> dict[str, str]:
    """Fields and their texts.

    Raises:
        UsageError: for what is not field=value, or a field that is set twice.
    """
    fields: dict[str, str] = {}
    for text in assignments:
        name, equals, value = text.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name:
            raise UsageError(f"--set '{text}' is not field=value.", "Write for example --set a=1.")
        if name in fields:
            raise UsageError(f"--set gives '{name}' twice.", "Give it once.")
        fields[name] = value.strip()
    return fields


def make_config(
    name: str, kind: type[Config], config: dict[str, Any], sets: dict[str, str]
) -> Config:
    """The method's configuration; `--set` wins over the file. A dot names a field of a field.

    Raises:
        UsageError: naming the field that is unknown or out of range.
    """
    values = copy.deepcopy(config)
    for field in values:
        _require_field(name, kind, field)
    for path, text in sets.items():
        outer, dot, inner = path.partition(".")
        _require_field(name, kind, outer)
        if not dot:
            values[outer] = _value(kind, outer, text)
            continue
        nested = _nested(kind, outer)
        if nested is None:
            raise UsageError(f"{name}'s '{outer}' has no settings of its own.", f"Set {outer}=...")
        _require_field(f"{name}'s {outer}", nested, inner)
        values[outer] = {**(values.get(outer) or {}), inner: _value(nested, inner, text)}
    return _build(name, kind, values)


def _nested(kind: type[BaseModel], field: str) -> type[BaseModel] | None:
    """The model of a field that has fields of its own, also where it may be None."""
    annotation = kind.model_fields[field].annotation
    for choice in (annotation, *get_args(annotation)):
        if isinstance(choice, type) and issubclass(choice, BaseModel):
            return choice
    return None


def _require_field(name: str, kind: type[BaseModel], field: str) -> None:
    if field not in kind.model_fields:
        close = difflib.get_close_matches(field, kind.model_fields, n=1)
        hint = f"Did you mean {close[0]}? " if close else ""
        known = ", ".join(kind.model_fields) or "none"
        raise UsageError(f"{name} has no setting '{field}'.", f"{hint}It has: {known}.")


def _value(kind: type[BaseModel], field: str, text: str) -> Any:
    """The text as JSON where the field takes that, else as it stands, or split at its commas."""
    try:
        value = _WORDS[text] if text in _WORDS else json.loads(text)
    except ValueError:
        value = text
    # A field of text may be given what looks like a number, and one of several texts needs no brackets.
    candidates: list[Any] = [value, text]
    if not isinstance(value, list):
        candidates.append([part.strip() for part in text.split(",")])
    for candidate in candidates:
        try:
            kind.model_validate_json(json.dumps({field: candidate}))
        except (ValidationError, UsageError):
            continue
        return candidate
    return value


def _build(name: str, kind: type[Config], values: dict[str, Any]) -> Config:
    from ..shape import describe_validation_error

    fix = "Correct --set or --config."
    try:
        return kind.model_validate_json(json.dumps(values, default=str))
    except ValidationError as error:
        raise UsageError(describe_validation_error(name, error), fix) from None
