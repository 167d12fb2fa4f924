"""``mm-retriever mcp``: image search for an MCP client."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mm_retriever.cli import options
from mm_retriever.errors import QueryError

if TYPE_CHECKING:
    from mm_retriever.store import ImageStore


def mcp(
    db: options.Db = "photos.db",
    model: options.HeldModel = None,
    model_url: options.ModelUrl = None,
    model_key: options.ModelKey = None,
    collection: options.Collection = "mm_retriever",
    vision_model: Annotated[
        str | None,
        typer.Option(
            help="A model that ranks results and, if it can, describes images. Default: none.",
            autocompletion=options.reranker_names,
        ),
    ] = None,
    vision_url: Annotated[
        str | None, typer.Option(help="An OpenAI-compatible server that runs the --vision-model.")
    ] = None,
    vision_api: Annotated[
        str | None,
        typer.Option(help="What the server is asked: chat (a vision LLM), rerank or score (a reranking model)."),
    ] = None,
    vision_key: Annotated[
        str | None,
        typer.Option(
            envvar="MM_RETRIEVER_VISION_KEY", help="The key that the server of --vision-url wants.", show_envvar=True
        ),
    ] = None,
    root: options.Root = None,
    per_item: Annotated[
        bool, typer.Option("--per-item", help="Give the best image of each item (column `item`), and its other images.")
    ] = False,
    allow_urls: Annotated[bool, typer.Option("--allow-urls", help="Let a client name images by URL.")] = False,
    thumbnails: Annotated[
        int, typer.Option(min=0, help="Most images in one answer; 0 for models that take no images.")
    ] = 9,
    structured: Annotated[
        bool | None,
        typer.Option(
            help="Also give answers as JSON; many clients that read it leave out the images. Default: with "
            "--thumbnails 0."
        ),
    ] = None,
    http: Annotated[bool, typer.Option("--http", help="Serve streamable HTTP instead of stdin and stdout.")] = False,
    host: Annotated[str, typer.Option(help="With --http: other than loopback only with a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65_535, help="With --http.")] = 8765,
    http_token: Annotated[
        str | None,
        typer.Option(envvar="MM_RETRIEVER_MCP_TOKEN", help="With --http: what clients must send.", show_envvar=True),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(help="With --http: a web page, https://..., that may read the answers; repeat for more."),
    ] = None,
    token: options.Token = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    backend: options.Backend = None,
    revision: options.Revision = None,
) -> None:
    r"""Serve image search to an MCP client. Needs: pip install "mm-retriever\[mcp]"."""
    from mcp_server_mm_retriever import check_access, image_search, serve_http, serve_stdio

    from mm_retriever.own_keys import ITEM_KEY
    from mm_retriever.rerank.registry import check_reranker
    from mm_retriever.search_tools import SearchLimits
    from mm_retriever.search_tools.rows import check_items
    from mm_retriever.store import check_exists, open_store, open_stored

    group_by = ITEM_KEY if per_item else None
    if http:
        if http_token is None:
            http_token = os.environ.get("MM_RETRIEVER_MCP_TOKEN")  # an empty one, which typer takes for none
        check_access(host, http_token, cors_origin or ())
    elif host != "127.0.0.1" or port != 8765 or cors_origin:
        raise QueryError("--host, --port and --cors-origin need --http: without it no port is opened")
    server = options.served_by(vision_url, vision_api, vision_key, "vision")
    if server and vision_model is None:
        raise QueryError("--vision-url needs --vision-model: the name under which the server serves the model")
    check_exists(db)
    with open_stored(db, collection=collection, token=token) as stored:  # before a model is loaded
        check_items(stored, group_by)
    if vision_model is not None:
        check_reranker(vision_model, base_url=server.get("base_url"))
    with redirect_stdout(sys.stderr):  # stdout belongs to the protocol
        wanted = options.model_to_load(model, dtype, backend, url=model_url, db=db, collection=collection, token=token)
        embedding = options.embed_model(
            **wanted._asdict(),
            device=device,
            revision=revision,
            url=model_url,
            key=model_key,
        )
        with open_store(db, embedding, collection=collection, token=token, create=False) as store:
            search = image_search(
                store,
                embedding,
                vision_model=vision_model,
                vision_server=server,
                roots=root,
                allow_urls=allow_urls,
                device=device,
                group_by=group_by,
                limits=SearchLimits(thumbnails=thumbnails),
            )
            if http:
                served: dict[str, Any] = {"token": http_token, "origins": cors_origin or (), "structured": structured}
                serve_http(search, host=host, port=port, **served)
            else:
                with redirect_stdout(sys.__stdout__), _ends_on_interrupt(store):
                    serve_stdio(search, structured=structured)


@contextmanager
def _ends_on_interrupt(store: ImageStore) -> Iterator[None]:
    """Close the store and end the process on Ctrl-C, where a thread that reads stdin would wait for one more line."""

    def end(*_: object) -> None:
        closing = threading.Thread(target=store.close, daemon=True)
        closing.start()
        closing.join(5)
        os._exit(options.EXIT_INTERRUPTED)

    before = signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
