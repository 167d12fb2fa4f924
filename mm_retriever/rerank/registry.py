"""Rerankers by name: the same name in Python, on the command line, for the query engine, tools and MCP.

A family of models is a module with three members, and a word in `FAMILIES`:

    MODELS                                 published models by name, each with its facts or a short note
    recognises(name, config, base_url)     whether a model is of this family; `config` is its config.json, if it has
                                           one, with "sentence_transformers_class", if that library saved it
    load(name, **options)                  its reranker; for a `Scorer`: ``ScorerRerank(scorer, **options)``

`load` gets `top_n`, the caller's options, and of device, dtype, revision and base_url those that are not None.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast

from llama_index.core.postprocessor.types import BaseNodePostprocessor

from mm_retriever.checkpoint import ModelEntry
from mm_retriever.errors import ModelNotFoundError, QueryError, one_line, shown
from mm_retriever.rerank.remote import API
from mm_retriever.rerank.reranker import Reranker

FAMILIES: tuple[str, ...] = ("remote", "phi3_vision", "cross_encoder")
"""A word is a module of `mm_retriever.rerank`; a dotted name is any module that can be imported. The first family that
recognises a model loads it."""


class Family(Protocol):
    """A module in `FAMILIES`."""

    MODELS: Mapping[str, ModelEntry | str]

    def recognises(self, name: str, config: Mapping[str, Any], base_url: str | None) -> bool:
        """Whether a model is of this family."""
        ...

    def load(self, name: str, **options: Any) -> Reranker:
        """The reranker of a model of this family."""
        ...


def load_reranker(
    name: str,
    *,
    top_n: int = 9,
    device: str | None = None,
    dtype: str | None = None,
    revision: str | None = None,
    base_url: str | None = None,
    api: API | None = None,
    **options: Any,
) -> Reranker:
    """Return the reranker called `name`.

    Args:
        name: "tiny", a hub id or folder of Phi-3 Vision or of a cross-encoder, a name that another family knows, or
            the name under which a server serves a model.
        top_n: how many nodes it keeps.
        device: "cpu", "cuda", ...; default: the fastest there is.
        dtype: "float32", "bfloat16", ...; default: that of the stored weights.
        revision: of a hub repository.
        base_url: of a server that speaks OpenAI's protocol.
        api: of that server: "chat" (default) asks a vision LLM for a ranking, "rerank" and "score" ask a reranking
            model for scores.
        options: of the reranker, for example `fusion_weight`, `on_error` or `image_policy`.

    Raises:
        ModelNotFoundError: no family knows the model, or the hub is out of reach.
        QueryError: an option that this reranker does not have.
    """
    if api is not None and base_url is None:
        raise QueryError(f"api={shown(api)} is of a server: give its base_url")
    given = {"device": device, "dtype": dtype, "revision": revision, "base_url": base_url, "api": api}
    given = {option: value for option, value in given.items() if value is not None}
    return _family(name, revision, base_url).load(name, top_n=top_n, **given, **options)


def check_reranker(name: str, *, revision: str | None = None, base_url: str | None = None) -> None:
    """Refuse a name that `load_reranker` would refuse, without loading anything.

    Raises:
        ModelNotFoundError: no family knows the model, or the hub is out of reach.
    """
    _family(name, revision, base_url)


def as_postprocessors(
    rerank: str | BaseNodePostprocessor | Sequence[BaseNodePostprocessor], **options: Any
) -> tuple[BaseNodePostprocessor, ...]:
    """Return the postprocessors of an argument that holds or names them; a named one is loaded with the options."""
    if isinstance(rerank, str):
        return (load_reranker(rerank, **options),)
    return (rerank,) if isinstance(rerank, BaseNodePostprocessor) else tuple(rerank)


def _families() -> Iterator[Family]:
    """Yield the families, each imported when it is needed."""
    for word in FAMILIES:
        yield cast(Family, import_module(word if "." in word else f"mm_retriever.rerank.{word}"))


def _family(name: str, revision: str | None, base_url: str | None) -> Family:
    for family in _families():
        if family.recognises(name, {}, base_url):
            return family
    config = _config(name, revision)
    for known in (config, config | {"sentence_transformers_class": _saved_by(name, revision)}):
        for family in _families():
            if family.recognises(name, known, base_url):
                return family
    kind = one_line(config.get("model_type"), 80)
    raise ModelNotFoundError(f"{name!r} is a model of type {kind!r}, which is no reranker; {_choices()}")


def _config(name: str, revision: str | None) -> dict[str, Any]:
    """The config.json of a folder or hub repository, from the hub's cache if it is there."""
    from huggingface_hub.errors import HFValidationError

    from mm_retriever.checkpoint import read_json
    from mm_retriever.downloads import hub_files

    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelNotFoundError(f"{name!r} has no config.json; {_choices()}")
        return read_json(folder / "config.json")
    reason: Exception | None = None
    for cached in (True, False):
        try:
            return read_json(hub_files(name, ["config.json"], revision, cached=cached) / "config.json")
        except (OSError, HFValidationError) as error:
            reason = error
    raise ModelNotFoundError(
        f"{name!r} is no folder here, and its config.json cannot be downloaded from the hub ({one_line(reason, 200)}); "
        f"{_choices()}"
    ) from reason


def published_rerankers() -> Iterator[tuple[str, ModelEntry]]:
    """Yield every published reranker, family by family."""
    for family in _families():
        for name, entry in family.MODELS.items():
            yield name, entry if isinstance(entry, ModelEntry) else ModelEntry(note=entry)


def _saved_by(name: str, revision: str | None) -> str:
    """The class of sentence-transformers that saved a folder or hub repository; "" if none did."""
    from huggingface_hub.errors import HFValidationError

    from mm_retriever.checkpoint import read_json
    from mm_retriever.downloads import hub_files
    from mm_retriever.embedders.sentence_files import LIBRARY_CONFIG, library_kind

    folder = Path(name).expanduser()
    if folder.is_dir():
        return library_kind(folder)
    for cached in (True, False):
        with suppress(OSError, HFValidationError):
            folder = hub_files(name, [LIBRARY_CONFIG], revision, cached=cached)
            return str(read_json(folder / LIBRARY_CONFIG).get("model_type", ""))
    return ""


def _choices() -> str:
    known = [repr(name) for name, _ in published_rerankers()]
    return f"rerankers: {', '.join(known)}, or with a base_url any model of a server"
