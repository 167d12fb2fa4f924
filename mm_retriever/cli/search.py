"""``mm-retriever search``: text, image or both, with or without reranking."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mm_retriever.cli import options
from mm_retriever.errors import QueryError

if TYPE_CHECKING:
    from llama_index.core.vector_stores import MetadataFilters


def search(
    text: Annotated[str | None, typer.Option("--text", "-t", help="What to look for, or what to change.")] = None,
    image: Annotated[
        str | None,
        typer.Option(
            "--image",
            "-i",
            help="An image to look for, or to start from: a file, a URL or a data URI.",
            callback=options.home,
        ),
    ] = None,
    db: options.Db = "photos.db",
    model: options.Model = options.REAL_MODEL,
    model_url: options.ModelUrl = None,
    model_key: options.ModelKey = None,
    collection: options.Collection = "mm_retriever",
    top_k: Annotated[int, typer.Option("--top-k", "-k", min=1, max=16_384, help="How many results.")] = 9,
    where: Annotated[
        list[str] | None,
        typer.Option(
            help="What a result must be: label=shoes, year>2020, taken>=2024-01-31, 'label in mug, cup', "
            "'caption contains red', 'price is empty'; repeat for more."
        ),
    ] = None,
    min_score: Annotated[float | None, typer.Option(help="Leave out results below this similarity (-1 to 1).")] = None,
    hybrid: Annotated[
        bool, typer.Option("--hybrid", help="Search by words too, in a store of `index --hybrid`; scores tell ranks.")
    ] = False,
    each_once: Annotated[
        bool, typer.Option("--each-once", help="Show copies of one file once; the next results take their places.")
    ] = False,
    per_item: Annotated[
        bool,
        typer.Option("--per-item", help="Only the best image of each item (column `item`); --top-k counts items."),
    ] = False,
    exclude_query: Annotated[bool, typer.Option("--exclude-query", help="Leave out the query image itself.")] = False,
    rerank: Annotated[bool, typer.Option("--rerank", help="Let a vision model rank the results and say why.")] = False,
    rerank_model: Annotated[
        str | None,
        typer.Option(
            help="Default: Phi-3.5 Vision; `tiny` if that is the --model.", autocompletion=options.reranker_names
        ),
    ] = None,
    rerank_url: Annotated[
        str | None, typer.Option(help="An OpenAI-compatible server that runs the model that reranks.")
    ] = None,
    rerank_api: Annotated[
        str | None,
        typer.Option(help="What the server is asked: chat (a vision LLM), rerank or score (a reranking model)."),
    ] = None,
    rerank_key: Annotated[
        str | None,
        typer.Option(
            envvar="MM_RETRIEVER_RERANK_KEY", help="The key that the server of --rerank-url wants.", show_envvar=True
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write a page of the results.", callback=options.home)] = None,
    png: Annotated[
        Path | None, typer.Option(help="Write a numbered sheet of the results.", callback=options.home)
    ] = None,
    token: options.Token = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    revision: options.Revision = None,
) -> None:
    """Search by text, by image, or by both: `--text "phone case with this" --image leopard.jpg`."""
    from mm_retriever.own_keys import ITEM_KEY
    from mm_retriever.retriever import ComposedRetriever
    from mm_retriever.store import check_exists, open_store
    from mm_retriever.terminal import print_json, print_search, result_rows, search_report, write_search

    if not (text and text.strip()) and image is None:
        raise QueryError("nothing to search for: give --text, --image, or both")
    filters = options.filters_of(where)
    group_by = ITEM_KEY if per_item else None
    server = options.served_by(rerank_url, rerank_api, rerank_key, "rerank")
    check_exists(db)  # before a model is loaded
    load_ranker = None
    if rerank or rerank_url or rerank_model:
        load_ranker = options.reranker(model, rerank_model, server, top_n=top_k, device=device)
    embedding = options.embed_model(model, device=device, dtype=dtype, revision=revision, url=model_url, key=model_key)
    with open_store(db, embedding, collection=collection, token=token, create=False) as store:
        if hybrid and not store.hybrid:
            raise QueryError(f"{db!r} has no index of words; make one: mm-retriever index FOLDER --db NEW.db --hybrid")
        options.check_items(store, group_by)
        retriever = ComposedRetriever(
            store,
            embedding,
            top_k=top_k,
            filters=filters,
            min_score=min_score,
            mode="hybrid" if hybrid else "default",
            exclude_query_image=exclude_query,
            unique=each_once,
            group_by=group_by,
        )
        options.check_filters(store, filters)
        # whoever types a URL wants it fetched; addresses in a private network stay closed
        policy = replace(embedding.image_policy, allow_urls=True)
        query = embedding.get_query_bundle(text, image, image_policy=policy)
        nodes = retriever.retrieve(query)
        if len(nodes) < top_k:
            limits = {"--each-once": each_once, "--per-item": per_item, "--exclude-query": exclude_query}
            reason = _why_fewer(store.count(), filters, min_score, limits)
            typer.echo(f"{len(nodes)} of the {top_k} results that were asked for: {reason}", err=True)
    reranking = None if load_ranker is None else load_ranker().rerank(nodes, query)
    report = search_report(text, query.image_path, nodes, reranking=reranking)
    if as_json:
        print_json(result_rows(nodes if reranking is None else reranking.nodes))
    else:
        print_search(report)
    write_search(report, html=html, png=png, quiet=as_json)


def _why_fewer(rows: int, filters: MetadataFilters | None, min_score: float | None, others: Mapping[str, bool]) -> str:
    limits = {"--where": filters, "--min-score": min_score is not None, **others}
    given = [option for option, is_given in limits.items() if is_given]
    total = f"the collection holds {rows} rows"
    return f"{total}, and {', '.join(given)} {'leaves' if len(given) == 1 else 'leave'} out others" if given else total
