"""``mm-retriever serve``: a web page, a JSON API and MCP over HTTP, from one process that keeps the model loaded."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Annotated

import typer

from mm_retriever.cli import options
from mm_retriever.errors import QueryError

_OFTEN = (10_000, 20, 20)
"""Thresholds of the garbage collector while the server runs: rarer collections let the garbage of requests pile up."""


def serve(
    db: options.Db = "photos.db",
    model: options.HeldModel = None,
    collection: options.Collection = "mm_retriever",
    root: options.Root = None,
    allow_urls: Annotated[bool, typer.Option("--allow-urls", help="Let people name images by URL.")] = False,
    index_root: Annotated[
        list[Path] | None,
        typer.Option(
            help="A folder that people may index from the page, with all below it; repeat for more. Default: none.",
            callback=options.home,
        ),
    ] = None,
    review: Annotated[
        Path | None,
        typer.Option(
            help="A queries.jsonl of `evaluate --make`, whose drafts people keep, correct or drop on the page.",
            callback=options.home,
        ),
    ] = None,
    ratings: Annotated[
        Path | None,
        typer.Option(
            help="The file that keeps thumbs up and down as an evaluation set. Default: beside the file of --db, "
            "like photos.queries.jsonl; none for a Milvus server.",
            callback=options.home,
            show_default=False,
        ),
    ] = None,
    no_ratings: Annotated[bool, typer.Option("--no-ratings", help="Do not keep ratings.")] = False,
    rerank: Annotated[
        str | None,
        options.reranking(
            help="A model that ranks results when somebody asks for it on the page. Default: none.",
            autocompletion=options.reranker_names,
        ),
    ] = None,
    rerank_url: options.RerankUrl = None,
    rerank_api: options.RerankApi = None,
    rerank_key: options.RerankKey = None,
    host: Annotated[str, typer.Option(help="Other than loopback only with a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65_535, help="0: any that is free.")] = 8765,
    http_token: Annotated[
        str | None,
        typer.Option(envvar="MM_RETRIEVER_HTTP_TOKEN", help="What clients and people must give.", show_envvar=True),
    ] = None,
    token: options.Token = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    backend: options.Backend = None,
    revision: options.Revision = None,
) -> None:
    r"""Serve a web page, a JSON API and MCP; `search` uses it by itself. Needs: pip install "mm-retriever\[web]"."""
    from web_mm_retriever import serve_web, web_app
    from web_mm_retriever.admission import Access
    from web_mm_retriever.serving import listen_on
    from web_mm_retriever.waiting import waiting_page

    from mm_retriever.downloads import watched
    from mm_retriever.embedders.registry import check_embedder
    from mm_retriever.rerank.registry import check_reranker
    from mm_retriever.store import open_store, open_stored

    if http_token is None:
        http_token = os.environ.get("MM_RETRIEVER_HTTP_TOKEN")  # an empty one, which typer takes for none
    server = options.served_by(rerank_url, rerank_api, rerank_key, "rerank")
    if server and rerank is None:
        raise QueryError("--rerank-url needs --rerank: the name under which the server serves the model")
    if review is not None and not review.is_file():
        raise QueryError(f"--review {str(review)!r}: there is no such file; `evaluate FOLDER --make N` writes one")
    open_stored(db, collection=collection, token=token).close()  # before a model is looked for
    if rerank is not None:
        check_reranker(rerank, base_url=server.get("base_url"))
    wanted = options.model_to_load(model, dtype, backend, url=None, db=db, collection=collection, token=token)
    listener = listen_on(host, port)
    with waiting_page(listener, Access(host, http_token), wanted.name) as tell, watched(tell):
        check_embedder(wanted.name, revision=revision)  # downloads what is not here
    embedding = options.embed_model(**wanted._asdict(), device=device, revision=revision)
    with open_store(db, embedding, collection=collection, token=token, create=False) as store:
        app = web_app(
            store,
            embedding,
            host=host,
            token=http_token,
            roots=root,
            allow_urls=allow_urls,
            ratings=_ratings(ratings, db, keep=not no_ratings),
            index_roots=index_root or (),
            review=review,
            rerank=rerank,
            rerank_server=server,
            device=device,
        )
        file = Path(options.home(db))
        gc.collect()
        gc.freeze()  # all that was loaded stays for as long as the server runs: not to be looked through again
        gc.set_threshold(*_OFTEN)
        serve_web(
            app,
            host=host,
            port=port,
            db=file if file.is_dir() else None,
            collection=collection,
            model=wanted.name,
            listener=listener,
        )


def _ratings(file: Path | None, db: str, *, keep: bool) -> Path | None:
    """The file that keeps ratings."""
    if file is not None and not keep:
        raise QueryError("--ratings and --no-ratings exclude each other: choose one")
    store = Path(options.home(db))
    if file is not None or not keep or not store.exists():
        return file
    return store.absolute().with_suffix(".queries.jsonl")
