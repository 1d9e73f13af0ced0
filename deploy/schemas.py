"""Keys that Ray Serve would drop without a word: its schemas take unknown ones, so that old versions read new files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel


def unknown_keys(tree: Mapping[str, Any]) -> list[str]:
    """Paths in a config for ``serve deploy`` that Serve's models do not name."""
    from ray.serve.schema import ServeDeploySchema

    return list(_unknown(tree, ServeDeploySchema, ""))


def _unknown(value: Any, annotation: Any, path: str) -> Iterator[str]:
    """Walks ``value`` beside the model that ``annotation`` allows for it; free mappings are not looked into."""
    models = list(_models(annotation))
    if isinstance(value, list):
        for index, one in enumerate(value):
            yield from _unknown(one, annotation, f"{path}[{index}]")
    elif isinstance(value, Mapping) and models:
        fields = {name: field for model in models for name, field in model.model_fields.items()}
        for key, inner in value.items():
            where = f"{path}.{key}" if path else str(key)
            if key in fields:
                yield from _unknown(inner, fields[key].annotation, where)
            else:
                yield where


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models among what ``annotation`` allows, those of lists' items included."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (Union, UnionType, list):
        for inner in get_args(annotation):
            yield from _models(inner)
