"""``mm-retriever embed | import``: files of vectors that a Milvus server imports by itself."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from mm_retriever.cli import options
from mm_retriever.errors import QueryError


def embed(
    out: Annotated[
        Path, typer.Argument(help="A folder for the files; what is done there already stays.", callback=options.home)
    ],
    source: Annotated[
        Path | None,
        typer.Argument(help="A folder of images. Default: go on with what OUT was begun for.", callback=options.home),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="As of `index`. Default: the model that OUT was begun with; for a new one " + options.REAL_MODEL + ".",
            autocompletion=options.model_names,
            show_default=False,
        ),
    ] = None,
    model_url: options.ModelUrl = None,
    model_key: options.ModelKey = None,
    rows_per_file: Annotated[
        int | None, typer.Option(min=1, help="Images in one file. Default: as OUT was begun, 10,000 in a new one.")
    ] = None,
    batch_size: options.BatchSize = 32,
    sidecar: options.Sidecar = None,
    no_sidecar: options.NoSidecar = False,
    no_exif: options.NoExif = False,
    hybrid: Annotated[bool, typer.Option("--hybrid", help="For a collection that indexes the words too.")] = False,
    ray: Annotated[
        bool, typer.Option("--ray", help="On a Ray cluster (RAY_ADDRESS), or a local Ray: a file to a worker.")
    ] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, help="With --ray. Default: as many as there is room for.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the report as JSON, with all that was skipped.")
    ] = False,
    device: options.Device = None,
    dtype: options.Dtype = None,
    backend: options.Backend = None,
    revision: options.Revision = None,
) -> None:
    """Embed millions of images into files that a Milvus server imports by itself. Run it again to go on."""
    from mm_retriever.bulk import embed_to_shards, embed_to_shards_on_ray
    from mm_retriever.terminal import print_ingestion, print_json

    if workers is not None and not ray:
        raise QueryError("--workers is taken only with --ray")
    options.check_places(folders={"OUT": out})
    wanted = _model_to_load(out, model, dtype, backend, url=model_url)
    embedding = options.embed_model(
        wanted.name,
        device=device,
        dtype=wanted.dtype,
        backend=wanted.backend,
        calibration=source,
        revision=revision,
        url=model_url,
        key=model_key,
        batch_size=batch_size,
    )
    run = partial(embed_to_shards_on_ray, workers=workers) if ray else embed_to_shards
    with redirect_stdout(sys.stderr):  # where Ray says that a worker died
        result = run(
            source,
            out,
            embedding,
            rows_per_shard=rows_per_file,
            batch_size=batch_size,
            sidecar=options.sidecar_of(sidecar, no_sidecar=no_sidecar),
            exif=not no_exif,
            hybrid=hybrid,
            show_progress=not as_json,
        )
    if as_json:
        print_json(result.to_dict())
    else:
        print_ingestion(result, rest="--json lists them all")


def _model_to_load(
    out: Path, model: str | None, dtype: str | None, backend: str | None, *, url: str | None
) -> options.Wanted:
    """The model of the options, else the one that the files in `out` were begun with."""
    from mm_retriever.bulk.plan import is_planned, read_plan

    plan = read_plan(out) if model is None and is_planned(out) else None
    if plan is None or not plan.model_note:
        return options.Wanted(model or options.REAL_MODEL, dtype, backend)
    holder = f"the files in {str(out)!r} hold"
    return options.model_of(plan.model_id, plan.model_note, dtype, backend, url=url, holder=holder)


def import_(
    out: Annotated[Path, typer.Argument(help="The folder that `embed` filled.", callback=options.home)],
    db: Annotated[str, typer.Option(help="The URI of a Milvus server.")],
    remote_folder: Annotated[
        str, typer.Option(help="Where the server's object storage has the files of OUT/shards.")
    ] = "",
    collection: options.Collection = "mm_retriever",
    timeout: Annotated[float, typer.Option(help="Seconds without any progress of the server.")] = 600.0,
    token: options.Token = None,
) -> None:
    """Have a Milvus server import what `embed` made, each image exactly once. Run it again to go on."""
    from mm_retriever.bulk import import_shards
    from mm_retriever.bulk.plan import read_plan
    from mm_retriever.store import ImageStore, check_exists
    from mm_retriever.store.words import analyzer_of

    check_exists(db)
    plan = read_plan(out)  # knows the model that it is for: nothing is loaded
    analyzer = analyzer_of(plan.words)
    store = ImageStore(
        db,
        token,
        collection=collection,
        dimension=plan.dimension,
        model_id=plan.model_id,
        model_note=plan.model_note,
        hybrid=analyzer is not None,
        analyzer=analyzer,
        rows=plan.images,
    )
    with store:
        typer.echo(str(import_shards(out, store, remote_folder=remote_folder, timeout=timeout)))
