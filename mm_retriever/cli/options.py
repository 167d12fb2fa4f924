"""Options that several commands share, the values read from them, and how a command fails."""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, NoReturn

import typer

from mm_retriever.errors import QueryError, one_line

if TYPE_CHECKING:
    from mm_retriever.embedders.aside import EmbedderAside
    from mm_retriever.embedding import ComposedEmbedding
    from mm_retriever.rerank.reranker import Reranker


REAL_MODEL = "BAAI/bge-visualized-base-en-v1.5"
"""`embedding.DEFAULT_MODEL`, which would load torch."""

EXIT_INCOMPLETE = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
KEPT = "their files cannot be looked at or read now, so nobody knows what they are; run it again when they can"


def home(path: Any) -> Any:
    """Return a path option with "~" expanded, for clients that start commands without a shell."""
    if path is None:
        return None
    if isinstance(path, list | tuple):
        return [home(item) for item in path]
    if isinstance(path, str):
        if path[:5].lower() == "file:":
            from mm_retriever.ingest.folder import local_path

            path = local_path(path)
        return os.path.expanduser(path)  # noqa: PTH111 - may be a URL
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise QueryError(f"{str(path)!r}: {error}") from error


def named_path(text: str) -> Path:
    """Return a path; an empty one, as of an unset shell variable, is refused, and not the working directory."""
    if not text.strip():
        raise QueryError(f"{text!r} names no folder and no image; the folder that you are in is '.'")
    return Path(text)


Db = Annotated[str, typer.Option(help="A Milvus Lite file (photos.db) or the URI of a Milvus server.")]
Collection = Annotated[str, typer.Option(help="The collection in the store.")]
Token = Annotated[
    str | None,
    typer.Option(envvar="MM_RETRIEVER_TOKEN", help="The server's token, or user:password.", show_envvar=True),
]


def model_names(incomplete: str) -> list[str]:
    """Return the completions of `--model`, without loading a model or torch."""
    from mm_retriever.embedders.registry import published_models

    return [name for name, _ in published_models() if name.startswith(incomplete)]


def reranker_names(incomplete: str) -> list[str]:
    """Return the completions of `--rerank-model`."""
    from mm_retriever.rerank.published import NAMES

    return [name for name in NAMES if name.startswith(incomplete)]


HeldModel = Annotated[
    str | None,
    typer.Option(
        help="A name of `mm-retriever models`, a local folder or file, or `tiny` (drawn products only). Default: the "
        "model that the collection was made with; for a new one " + REAL_MODEL + ".",
        autocompletion=model_names,
        show_default=False,
    ),
]
Model = Annotated[
    str,
    typer.Option(
        help="A name of `mm-retriever models`, a local folder or file, or `tiny` (drawn products only).",
        autocompletion=model_names,
    ),
]
ModelUrl = Annotated[
    str | None,
    typer.Option(help="A server that embeds, like http://gpu:8000/v1; --model is then the name that it serves."),
]
ModelKey = Annotated[
    str | None,
    typer.Option(
        envvar="MM_RETRIEVER_MODEL_KEY", help="The key that the server of --model-url wants.", show_envvar=True
    ),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps. Default: the best there is.")]
Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16; int8 with --backend openvino. Default: float32.")
]
Backend = Annotated[
    str | None,
    typer.Option(
        help="What computes the model: torch; openvino, faster on CPUs; or auto, the fastest here that keeps the "
        "vectors. Default: as the collection was made, or torch."
    ),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")]
reranking = partial(typer.Option, rich_help_panel="Reranking")
RerankUrl = Annotated[
    str | None,
    reranking(help="An OpenAI-compatible server that runs the model that reranks."),
]
RerankApi = Annotated[
    str | None,
    reranking(help="What the server is asked: chat (a vision LLM), rerank or score (a reranking model)."),
]
RerankKey = Annotated[
    str | None,
    reranking(
        envvar="MM_RETRIEVER_RERANK_KEY", help="The key that the server of --rerank-url wants.", show_envvar=True
    ),
]
Root = Annotated[
    list[Path] | None,
    typer.Option(
        help="A folder that images may be read from; repeat for more. Default: only the indexed ones.", callback=home
    ),
]
BatchSize = Annotated[int, typer.Option(min=1, max=4096, help="Images embedded at a time.")]
Sidecar = Annotated[
    Path | None,
    typer.Option(
        help="JSON, JSONL, CSV or TSV with columns for each image. Default: metadata.jsonl and .csv in the folder.",
        callback=home,
    ),
]
NoSidecar = Annotated[bool, typer.Option("--no-sidecar", help="Take no columns from files in the folder.")]
NoExif = Annotated[bool, typer.Option("--no-exif", help="Do not store date, camera and place of photographs.")]


def embed_model(
    name: str,
    *,
    device: str | None,
    dtype: str | None,
    revision: str | None = None,
    url: str | None = None,
    key: str | None = None,
    batch_size: int = 32,
    backend: str | None = None,
    calibration: Path | None = None,
    aside: EmbedderAside | None = None,
) -> ComposedEmbedding:
    """Return the model of `--model`, on this machine (in the process of `aside`, if given) or on that of `--model-url`.

    A single image is no calibration: the drawn catalogue is used, as without `calibration`. Prints how a backend was
    chosen, or the quality of its quantisation.
    """
    from mm_retriever.embedding import ComposedEmbedding

    if backend not in (None, "torch", "openvino", "auto"):
        raise QueryError(f"--backend {backend}: there are torch, openvino and auto")
    if dtype == "int8" and backend not in ("openvino", "auto"):
        raise QueryError("--dtype int8 is computed by OpenVINO: give --backend openvino with it")
    here = {"--device": device, "--dtype": dtype, "--revision": revision, "--backend": backend}
    if url is not None and (given := [option for option, value in here.items() if value]):
        raise QueryError(f"{', '.join(given)}: the server of --model-url chooses for itself; leave that out")
    if revision is not None and (Path(name).expanduser().exists() or name == "tiny"):
        raise QueryError(f"--revision {revision} is of a hub repository; {name!r} is on this machine: leave it out")
    chosen: dict[str, Any] = {"device": device, "dtype": dtype, "revision": revision, "backend": backend or "torch"}
    if aside is not None:
        embedding = ComposedEmbedding(aside.load(name, **chosen))
    else:
        drawn = calibration is None or calibration.is_file() or backend in (None, "torch")
        embedding = ComposedEmbedding(
            name,
            **chosen,
            base_url=url,
            api_key=key if url is not None else None,  # from the environment, for another run
            embed_batch_size=batch_size,
            calibration=None if drawn else calibration,
        )
    if remark := getattr(embedding.embedder, "remark", ""):
        typer.echo(one_line(remark, 2_000), err=True)
    return embedding


def check_places(
    files: Mapping[str, Path | None] | None = None, folders: Mapping[str, Path | None] | None = None
) -> None:
    """Refuse, before any work, a folder as the place of a file to write, and a file as that of a folder."""
    for option, path in (files or {}).items():
        if path is not None and path.is_dir():
            raise QueryError(f"{option} {str(path)!r} is a folder: give the name of a file in it")
    for option, path in (folders or {}).items():
        if path is not None and path.exists() and not path.is_dir():
            raise QueryError(f"{option} {str(path)!r} is a file: give the name of a folder")


def confirm(question: str) -> None:
    """Ask a question; return after a yes, abort otherwise."""
    try:
        agreed = typer.confirm(question)
    except typer.Abort:
        if sys.stdin.isatty():  # Ctrl-C
            raise
        raise QueryError("nobody answered, so nothing was done: --yes does it without asking") from None
    if not agreed:
        raise typer.Abort


def served_by(url: str | None, api: str | None, key: str | None, option: str) -> dict[str, Any]:
    """Return the server of a reranker as options of `load_reranker`; empty without a server.

    Args:
        url: of the server.
        api: "chat", "rerank", "score" or None.
        key: of the server.
        option: the prefix of the three options.
    """
    if api not in (None, "chat", "rerank", "score"):
        raise QueryError(f"--{option}-api {api}: there are chat, rerank and score")
    if url is None:
        if api is not None:
            raise QueryError(f"--{option}-api {api} is asked of a server: give --{option}-url")
        return {}
    if not url.lower().startswith(("http://", "https://")):
        raise QueryError(f"--{option}-url {url!r}: give the address of a server, like http://gpu:8000/v1")
    server = {"base_url": url, "api": api, "api_key": key}
    return {name: value for name, value in server.items() if value is not None}


def reranker(
    model: str, rerank_model: str | None, server: Mapping[str, Any], *, top_n: int, device: str | None, **more: Any
) -> Callable[[], Reranker]:
    """Return a function that loads the reranker of `--rerank-model` or `--rerank-url`, or the one that suits `model`.

    An unknown name is an error now, before any model is loaded. More options go to `load_reranker`.
    """
    from mm_retriever.phi3_vision.config import DEFAULT_MODEL
    from mm_retriever.rerank.registry import check_reranker, load_reranker

    if server.get("api") in ("rerank", "score") and not rerank_model:
        raise QueryError("--rerank-api needs --rerank-model: the name under which the server serves a reranking model")
    name = rerank_model or ("tiny" if model == "tiny" and not server else DEFAULT_MODEL)
    check_reranker(name, base_url=server.get("base_url"))
    return partial(load_reranker, name, top_n=top_n, device=None if server else device, **server, **more)


def sidecar_of(path: Path | None, *, no_sidecar: bool) -> Path | Literal[False] | None:
    """Return `--sidecar` and `--no-sidecar` as one value."""
    if path is not None and no_sidecar:
        raise QueryError("--sidecar and --no-sidecar exclude each other: choose one")
    return False if no_sidecar else path


def fail(message: str, code: int = EXIT_USAGE) -> NoReturn:
    """End the process with one line on stderr; the message may repeat untrusted text."""
    print(f"mm-retriever: {one_line(message)}", file=sys.stderr)  # noqa: T201 - output of the command line
    if code == EXIT_USAGE and os.environ.get("MM_RETRIEVER_DEBUG"):
        traceback.print_exc()
    sys.exit(code)


_NOTE = re.compile(
    r"(?P<name>.*?)(?:, (?P<dtype>float32|bfloat16|float16|int8)(?P<openvino> openvino)?\b.*)?", re.DOTALL
)


class Wanted(NamedTuple):
    """The model to load: its name; dtype and backend if they are given."""

    name: str
    dtype: str | None
    backend: str | None


def model_to_load(
    model: str | None,
    dtype: str | None,
    backend: str | None = None,
    *,
    url: str | None,
    db: str,
    collection: str,
    token: str | None,
) -> Wanted:
    """Return the model to load: that of the options, else that of the collection.

    Args:
        model: of `--model`; checked against the collection when the store is opened.
        dtype: of `--dtype`.
        backend: of `--backend`.
        url: of `--model-url`; the server chooses the dtype.
        db: the store, which may not exist yet.
        collection: its collection, which may not exist yet.
        token: of the store's server.

    Raises:
        QueryError: the collection's model cannot be loaded by its name.
    """
    if model is not None:
        return Wanted(model, dtype, backend)
    space, note = _held(db, collection, token)
    return model_of(space, note, dtype, backend, url=url, holder="the collection holds")


def model_of(space: str, note: str, dtype: str | None, backend: str | None, *, url: str | None, holder: str) -> Wanted:
    """Return the model to load for vectors that are there already, or that of a new collection.

    Args:
        space: the model of the vectors; "" if there are none, or it is not known.
        note: its name and float format; "" as for `space`.
        dtype: of `--dtype`.
        backend: of `--backend`.
        url: of `--model-url`.
        holder: what holds the vectors, and the verb, for messages.

    Raises:
        QueryError: the model cannot be loaded by its name.
    """
    if not (space or note):
        return Wanted(REAL_MODEL, dtype, backend)
    kept = _NOTE.fullmatch(note)
    assert kept is not None  # any text
    name = kept["name"] if kept["dtype"] else note.rpartition(", ")[0]
    if space.startswith("remote@"):
        raise QueryError(
            f"{holder} vectors of the model {name!r}, which a server computes: give --model and --model-url"
        )
    if url is not None:
        raise QueryError("--model-url needs --model: the name under which the server serves the model")
    if not _may_be_loaded(name):
        raise QueryError(
            f"{holder} vectors of the model {note or space!r}, which is not on this machine by that name: "
            "give --model, a name or a folder"
        )
    held = "openvino" if kept["openvino"] else "torch"
    if backend is None and dtype != "float16":  # which our OpenVINO backend does not support
        backend = held
    return Wanted(name, dtype or (kept["dtype"] if backend in (None, held) else None), backend)


def _may_be_loaded(name: str) -> bool:
    """Whether a model is published or on this machine; a store must not make this process download others."""
    from mm_retriever.embedders.registry import published_models

    if name in dict(published_models()) or (name and Path(name).exists()):
        return True
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return any(isinstance(try_to_load_from_cache(name, file), str) for file in ("config.json", "modules.json"))
    except HFValidationError:
        return False


def _held(db: str, collection: str, token: str | None) -> tuple[str, str]:
    """The model id and the note of a collection; "" if it is missing, or does not name them."""
    from mm_retriever.errors import StoreError
    from mm_retriever.store import check_exists, describe_store

    try:
        check_exists(db)
    except StoreError:
        return "", ""
    described = describe_store(db, token=token).get(collection, {})
    space = described.get("model", "")
    return "" if space == "not said" else space, described.get("model_note", "")
