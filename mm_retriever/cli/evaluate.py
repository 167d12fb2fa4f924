"""``mm-retriever evaluate``: how good models, rerankers and weights are on a data set or on images of one's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mm_retriever.cli import options
from mm_retriever.errors import MissingExtraError, QueryError, one_line
from mm_retriever.files import cache_folder

if TYPE_CHECKING:
    from mm_retriever.embedding import ComposedEmbedding
    from mm_retriever.evaluation.datasets import EvaluationSet
    from mm_retriever.evaluation.runs import Run
    from mm_retriever.rerank.reranker import Reranker

PLAIN = "{text}"


def evaluate(
    data: Annotated[
        Path,
        typer.Argument(
            help="A queries.jsonl, or a folder: with one, or of CIRR, FashionIQ, CIRCO or GeneCIS; with --make or "
            "--health also any folder of images.",
            callback=options.home,
        ),
    ],
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="As of `search`; repeat it to compare. Default: " + options.REAL_MODEL + ".",
            autocompletion=options.model_names,
            show_default=False,
        ),
    ] = None,
    rerank: Annotated[
        list[str] | None,
        typer.Option(help="A reranker by name; repeat it to compare.", autocompletion=options.reranker_names),
    ] = None,
    rerank_url: options.RerankUrl = None,
    rerank_api: options.RerankApi = None,
    rerank_key: options.RerankKey = None,
    rerank_depth: Annotated[int, typer.Option(min=2, max=100, help="How many of the 100 nearest are reranked.")] = 10,
    weights: Annotated[
        str | None,
        typer.Option(
            help="Fusion weights of the retrieval score to choose from, like 0,0.5,1: the best on one half of the "
            "queries is reported on the other."
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help='What is asked, like "Find an image that is {text}"; repeat it to compare. Default: {text}.'),
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Of a published data set: val, test or train. Default: val.")
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="The folder of images, if it is not beside the queries.", callback=options.home)
    ] = None,
    health: Annotated[
        bool,
        typer.Option("--health", help="Without labels: near duplicates, hubs, unreadable files, shortcuts of queries."),
    ] = False,
    make: Annotated[
        int | None,
        typer.Option(min=1, help="Draft so many queries from a folder of images with a vision LLM (--rerank)."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="With --make: the file. Default: DATA/queries.jsonl.", callback=options.home)
    ] = None,
    submit: Annotated[
        Path | None,
        typer.Option(help="Write the files that the servers of CIRR and CIRCO take here.", callback=options.home),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write a page with the tables and the worst queries.", callback=options.home)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    cache: Annotated[
        Path | None,
        typer.Option(help="Folder that keeps vectors. Default: ~/.cache/mm_retriever/vectors.", callback=options.home),
    ] = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
) -> None:
    """Compare models, rerankers, fusion weights and prompts on labelled queries, with intervals and costs."""
    names, rankers = list(dict.fromkeys(model or [options.REAL_MODEL])), list(dict.fromkeys(rerank or []))
    prompts, chosen = list(dict.fromkeys(prompt or [PLAIN])), _weights(weights)
    _check_options(rankers, chosen, make=make, health=health, out=out, submit=submit, names=names, prompts=prompts)
    options.check_places({"--html": html, "--out": out}, {"--submit": submit})
    server = options.served_by(rerank_url, rerank_api, rerank_key, "rerank")
    embedding = _Loading(cache, device=device, dtype=dtype)
    if make is not None:
        rerank_model = next(iter(rankers), None)
        load = partial(options.reranker, names[0], rerank_model, server, top_n=9, device=device)
        _make(data, names[0], embedding, load, make, out or data / "queries.jsonl", html, as_json)
        return
    if health:
        _health(data, names[0], embedding, split=split, images=images, as_json=as_json)
        return
    from mm_retriever.evaluation.datasets import read_evaluation

    parts = read_evaluation(data, split=split, images=images)
    loads = {
        name: options.reranker(names[0], name, server, top_n=rerank_depth, device=device, on_error="keep_order")
        for name in rankers
    }
    _check(parts, prompts, names, chosen, submit)
    runs = _runs(parts, names, prompts, embedding, loads, rerank_depth, show_progress=not as_json)
    _report(runs, chosen, html=html, submit=submit, as_json=as_json)


# ------------------------------------------------------------------------------------------ before a model is loaded


def _weights(given: str | None) -> list[float]:
    if given is None:
        return []
    try:
        chosen = [float(word) for word in given.split(",")]
    except ValueError:
        raise QueryError(f"--weights {given!r}: give numbers with commas between them, like 0,0.5,1") from None
    if not all(math.isfinite(weight) and weight >= 0 for weight in chosen):
        raise QueryError(f"--weights {given!r}: a weight is 0 or more")
    return chosen


def _check_options(
    rankers: Sequence[str],
    weights: Sequence[float],
    *,
    make: int | None,
    health: bool,
    out: Path | None,
    submit: Path | None,
    names: Sequence[str],
    prompts: Sequence[str],
) -> None:
    alone = make is not None or health
    if weights and not rankers:
        raise QueryError("--weights says how much the retrieval counts beside a reranker: give --rerank")
    if make is not None and health:
        raise QueryError("--make and --health exclude each other: choose one")
    if out is not None and make is None:
        raise QueryError("--out goes with --make; results are written by --json and --html")
    if alone and (len(names) > 1 or len(rankers) > 1 or prompts != [PLAIN] or weights or submit):
        way = "--health" if health else "--make"
        raise QueryError(
            f"{way} takes one --model and at most one --rerank, and neither --prompt, --weights nor --submit"
        )
    if health and rankers:
        raise QueryError("--health asks no reranker: leave --rerank out")


def _check(
    parts: Sequence[EvaluationSet],
    prompts: Sequence[str],
    names: Sequence[str],
    weights: Sequence[float],
    submit: Path | None,
) -> None:
    from mm_retriever.embedders.registry import check_embedder
    from mm_retriever.evaluation.comparison import check_halves
    from mm_retriever.evaluation.results import check_submission

    for prompt in prompts:
        parts[0].queries[0].asked(prompt)
        if "{" not in prompt:
            raise QueryError(f"--prompt {prompt!r} has no blank such as {{text}}: every query would be the same")
    if submit is not None:
        check_submission(parts[0])
    elif not parts[0].labelled:
        raise QueryError(
            f"{parts[0].name}: its answers are not published; --submit FOLDER writes what their server takes"
        )
    if parts[0].labelled:
        MissingExtraError.check("ir_measures", "evaluate")
    if weights:
        check_halves(parts)
    for name in names:
        check_embedder(name)


# ------------------------------------------------------------------------------------------ runs


class _Loading:
    """Loads models by name, with vectors kept on disk."""

    def __init__(self, cache: Path | None, *, device: str | None, dtype: str | None) -> None:
        self._cache = cache or cache_folder("vectors")
        self._options: dict[str, Any] = {"device": device, "dtype": dtype}

    def __call__(self, name: str) -> ComposedEmbedding:
        from mm_retriever.embedding import ComposedEmbedding

        return ComposedEmbedding(name, cache_dir=self._cache, **self._options)


def _runs(
    parts: Sequence[EvaluationSet],
    names: Sequence[str],
    prompts: Sequence[str],
    embedding: _Loading,
    rerankers: dict[str, Callable[[], Reranker]],
    depth: int,
    *,
    show_progress: bool,
) -> list[Run]:
    """Run all models, then all rerankers, with one in memory at a time."""
    import gc

    from mm_retriever.evaluation.runs import model_runs, reranked

    alone: list[Run] = []
    for name in names:
        typer.echo(f"embedding with {name}", err=True)
        alone += model_runs(embedding(name), parts, prompts, show_progress=show_progress)
        gc.collect()
    after: list[Run] = []
    for name, load in rerankers.items():
        typer.echo(f"reranking with {name}", err=True)
        ranker = load()
        after += [reranked(run, ranker, name, depth) for run in alone]
        del ranker
        gc.collect()
    return [run for first in alone for run in (first, *(late for late in after if late.follows(first)))]


def _report(
    runs: Sequence[Run], weights: Sequence[float], *, html: Path | None, submit: Path | None, as_json: bool
) -> None:
    from mm_retriever.evaluation.results import results_of, write_submissions
    from mm_retriever.evaluation.tables import print_results, write_evaluation
    from mm_retriever.terminal import print_json, screen

    results = results_of(runs, weights)
    written = [] if submit is None else [path for run in runs for path in write_submissions(run, submit)]
    if html is not None:
        written.append(write_evaluation(html, results))
    if as_json:
        print_json(results.to_dict())
    else:
        print_results(results, screen())
    for path in written:
        typer.echo(f"wrote {path}", err=as_json)


# ------------------------------------------------------------------------------------------ without labels


def _images(folder: Path) -> list[Path]:
    from mm_retriever.evaluation.datasets.queries import images_below

    if not folder.is_dir():
        raise QueryError(f"{str(folder)!r} is no folder of images")
    paths = images_below(folder)
    if len(paths) < 2:
        raise QueryError(f"{str(folder)!r} holds {len(paths)} images: two are needed at least")
    return paths


def _make(
    folder: Path,
    name: str,
    embedding: _Loading,
    checked: Callable[[], Callable[[], Reranker]],
    count: int,
    out: Path,
    html: Path | None,
    as_json: bool,
) -> None:
    from mm_retriever.embedders.registry import check_embedder
    from mm_retriever.evaluation.health import readable_vectors
    from mm_retriever.evaluation.made import draft_queries, near_pairs, refuse_existing, write_drafts
    from mm_retriever.report import Hit, SearchReport, write_html
    from mm_retriever.terminal import print_json

    paths = _images(folder)
    refuse_existing(out)
    load = checked()
    check_embedder(name)
    kept, vectors, dead = readable_vectors(embedding(name), paths, show_progress=not as_json)
    pairs = near_pairs(vectors, count)
    if not pairs:
        raise QueryError(f"no two of {len(kept)} images are near each other without being near duplicates")
    ranker = load()
    drafts = draft_queries(kept, pairs, ranker)
    write_drafts(drafts, out, ranker.model_name)
    page = write_html(
        html or out.with_suffix(".html"),
        [
            SearchReport(draft.text, str(draft.image), (Hit(1, str(draft.target), draft.cosine, str(draft.target)),))
            for draft in drafts.queries
        ],
        title="Drafted queries: are they right?",
        subtitle=f"Left what someone has, right what they look for. Correct the words in {out}, or delete lines.",
    )
    facts = {
        "queries": len(drafts.queries),
        "asked_for": count,
        "file": str(out),
        "page": str(page),
        "left_out": [{"image": str(path), "reason": reason} for path, reason in drafts.left_out],
        "unreadable": [{"image": path, "reason": reason} for path, reason in dead],
    }
    if as_json:
        print_json(facts)
        return
    typer.echo(f"{len(drafts.queries)} of {count} queries drafted by {one_line(ranker.model_name)}: {out}")
    typer.echo(f"look at {page}, then correct or delete lines of {out}, or `mm-retriever serve --review {out}`")
    for title, left in (("unreadable", dead), ("no words for", drafts.left_out)):
        if left:
            typer.echo(one_line(f"{title}: {len(left)} images, such as {left[0][0]}: {left[0][1]}"))


def _health(
    place: Path, name: str, embedding: _Loading, *, split: str | None, images: Path | None, as_json: bool
) -> None:
    from mm_retriever.embedders.registry import check_embedder
    from mm_retriever.evaluation.tables import print_health
    from mm_retriever.terminal import print_json, screen

    measure = _health_of(place, split=split, images=images)
    check_embedder(name)
    states = measure(embedding(name), not as_json)
    if as_json:
        print_json({title: state.to_dict() for title, state in states.items()})
        return
    for title, state in states.items():
        print_health(title, state, screen())


def _health_of(place: Path, *, split: str | None, images: Path | None) -> Callable[[ComposedEmbedding, bool], Any]:
    """A function that measures the health of a data set or, without queries, of a folder of images."""
    from mm_retriever.evaluation.datasets import is_evaluation, read_evaluation
    from mm_retriever.evaluation.health import folder_health, set_health

    if is_evaluation(place) or split is not None or images is not None:
        parts = read_evaluation(place, split=split, images=images)
        MissingExtraError.check("ir_measures", "evaluate")
        return lambda model, progress: {part.name: set_health(model, part, show_progress=progress) for part in parts}
    paths = _images(place)
    return lambda model, progress: {str(place): folder_health(model, paths, show_progress=progress)}
