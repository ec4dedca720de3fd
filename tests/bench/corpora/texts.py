"""Real texts that come with two packages of the registry: what 771 cloud services document.

botocore carries the service models of one cloud, google-api-python-client the discovery documents
of another: some 300,000 distinct English passages, from a line to a page, each with the service it
belongs to and the kind of thing it describes. Both are read as files; neither package is imported.
"""

import gzip
import html
import importlib.util
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

LENGTH_MIN: Final = 40
"""Characters. Shorter ones are labels ("The name.") and mostly repeated."""

OPERATION: Final = "operation"
STRUCTURE: Final = "structure"
FIELD: Final = "field"

_TAG: Final = re.compile(r"<[^>]+>")
_SPACE: Final = re.compile(r"\s+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """service: "aws.s3", "google.drive". kind: OPERATION, STRUCTURE or FIELD."""

    text: str
    service: str
    kind: str


def collect_passages() -> list[Passage]:
    """Returns every distinct passage, always in the same order for the same package versions."""
    seen: set[str] = set()
    passages = []
    for passage in (*_of_botocore(), *_of_google()):
        if len(passage.text) >= LENGTH_MIN and passage.text not in seen:
            seen.add(passage.text)
            passages.append(passage)
    return passages


def _of_botocore() -> Iterator[Passage]:
    for directory in sorted(_package("botocore", "data").iterdir()):
        models = sorted(directory.glob("*/service-2.json.gz"))
        if not models:
            continue
        with gzip.open(models[-1], "rt", encoding="utf-8") as file:
            model = json.load(file)
        service = f"aws.{directory.name}"
        for operation in model["operations"].values():
            yield _passage(operation, "documentation", service, OPERATION)
        for shape in model["shapes"].values():
            yield _passage(shape, "documentation", service, STRUCTURE)
            for member in shape.get("members", {}).values():
                yield _passage(member, "documentation", service, FIELD)


def _of_google() -> Iterator[Passage]:
    documents = _package("googleapiclient", "discovery_cache", "documents")
    for path in sorted(documents.glob("*.json")):
        document = json.loads(path.read_text(encoding="utf-8"))
        if "name" not in document:
            continue
        service = f"google.{document['name']}"
        for method in _methods(document):
            yield _passage(method, "description", service, OPERATION)
            for parameter in method.get("parameters", {}).values():
                yield _passage(parameter, "description", service, FIELD)
        for schema in document.get("schemas", {}).values():
            yield _passage(schema, "description", service, STRUCTURE)
            for field in schema.get("properties", {}).values():
                yield _passage(field, "description", service, FIELD)


def _methods(resource: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield from resource.get("methods", {}).values()
    for inner in resource.get("resources", {}).values():
        yield from _methods(inner)


def _passage(described: dict[str, Any], key: str, service: str, kind: str) -> Passage:
    text = html.unescape(_TAG.sub(" ", described.get(key) or ""))
    return Passage(text=_SPACE.sub(" ", text).strip(), service=service, kind=kind)


def _package(name: str, *parts: str) -> Path:
    found = importlib.util.find_spec(name)
    assert found is not None and found.origin is not None, f"{name} is not installed"
    return Path(found.origin).parent.joinpath(*parts)
