"""``mm-retriever demo``: index and search a drawn catalogue, your own photos, or the published Amazon images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mm_retriever.cli.options import (
    REAL_MODEL,
    Device,
    Dtype,
    check_places,
    confirm,
    embed_model,
    home,
    model_names,
    reranker,
    reranker_names,
)
from mm_retriever.errors import QueryError

if TYPE_CHECKING:
    from mm_retriever.demo import DemoQuery
    from mm_retriever.embedding import ComposedEmbedding
    from mm_retriever.rerank.reranker import Reranker


def demo(
    archive: Annotated[
        Path | None, typer.Argument(help="With --amazon: a copy of the published archive.", callback=home)
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for images, store and results.", callback=home)] = Path("demo"),
    photos: Annotated[Path | None, typer.Option(help="Run on this folder of your own instead.", callback=home)] = None,
    amazon: Annotated[bool, typer.Option("--amazon", help="Run on 900 images of Amazon Reviews 2023.")] = False,
    text: Annotated[str | None, typer.Option(help="With --photos: the text to search with.")] = None,
    image: Annotated[Path | None, typer.Option(help="With --photos: the image to search with.", callback=home)] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Default: tiny on drawings, BAAI's weights on photographs.", autocompletion=model_names),
    ] = None,
    rerank: Annotated[
        bool | None, typer.Option("--rerank/--no-rerank", help="Rank again with a vision model. Default: on drawings.")
    ] = None,
    rerank_model: Annotated[
        str | None, typer.Option(help="Default: as in `search`.", autocompletion=reranker_names)
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Download without asking.")] = False,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Search a drawn catalogue four ways; or your own photos; or the published Amazon images."""
    from mm_retriever.demo import DemoQuery, catalogue_queries, extract_amazon, folder_queries
    from mm_retriever.demo.catalogue import write_catalogue

    if photos is not None and amazon:
        raise QueryError("--photos and --amazon exclude each other: choose one")
    if archive is not None and not amazon:
        raise QueryError(f"{str(archive)!r} is taken only with --amazon; for your own folder use --photos {archive}")
    check_places(folders={"--out": out})
    drawn = photos is None and not amazon
    model = model or ("tiny" if drawn else REAL_MODEL)
    with_reranker = (drawn if rerank is None else rerank) or rerank_model
    load_ranker = reranker(model, rerank_model, {}, top_n=9, device=device) if with_reranker else None
    embedding = embed_model(model, device=device, dtype=dtype)
    out.mkdir(parents=True, exist_ok=True)
    sidecar: Path | None = None
    if amazon:
        source, leopard = extract_amazon(archive or _download(out, yes=yes), out / "amazon")
        queries = [DemoQuery(name="amazon", title="The published example", text="phone case with this", image=leopard)]
        db = out / "amazon.db"
    elif photos is not None:
        source, db, queries = photos, out / "photos.db", folder_queries(photos, text=text, image=image)
    else:
        written = write_catalogue(out / "catalogue", show_progress=True)
        source, sidecar, db = written.products, written.labels, out / "catalogue.db"
        queries = catalogue_queries(out / "queries")
    ranker = load_ranker() if load_ranker else None
    _run(source, db, queries, embedding, out, sidecar=sidecar, ranker=ranker)
    typer.echo(
        "\nYour own photos, with BAAI's weights (downloaded once, 400 MB):\n"
        "  mm-retriever index ~/Pictures --db photos.db\n"
        '  mm-retriever search --db photos.db --text "the same in red" --image shoe.jpg --html results.html'
    )


def _download(out: Path, *, yes: bool) -> Path:
    from mm_retriever.demo import AMAZON_URL
    from mm_retriever.terminal import download_archive

    target = out / "amazon_reviews_2023_subset.tar.gz"
    if not target.exists() and not yes:
        confirm(f"Download {AMAZON_URL} (21 MB)?")
    return download_archive(target)


def _run(
    source: Path,
    db: Path,
    queries: Sequence[DemoQuery],
    embedding: ComposedEmbedding,
    out: Path,
    *,
    sidecar: Path | None,
    ranker: Reranker | None,
) -> None:
    from mm_retriever.ingest import ingest_images
    from mm_retriever.report import write_html, write_png
    from mm_retriever.retriever import ComposedRetriever
    from mm_retriever.store import open_store
    from mm_retriever.terminal import print_search, search_report

    with open_store(db, embedding) as store:
        typer.echo(str(ingest_images(source, store, embedding, sidecar=sidecar)))
        retriever = ComposedRetriever(store, embedding, top_k=9)
        reports = []
        for query in queries:
            bundle = embedding.get_query_bundle(query.text, query.image)
            nodes = retriever.retrieve(bundle)
            reranking = ranker.rerank(nodes, bundle) if ranker else None
            report = search_report(query.text, query.image, nodes, title=query.title, reranking=reranking)
            typer.echo("")
            print_search(report)
            write_png(out / f"{query.name}.png", report)
            reports.append(report)
    write_html(out / "results.html", reports)
    typer.echo(f"\nLook at {out / 'results.html'} and {out}/*.png")
