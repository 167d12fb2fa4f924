"""``mm-retriever train``: a model that answers queries like a user's own better."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mm_retriever.cli import options
from mm_retriever.errors import QueryError


def train(
    queries: Annotated[
        Path,
        typer.Argument(
            help='Lines of {"image", "text", "targets", "negatives"}, or of MegaPairs; or the folder of queries.jsonl.',
            callback=options.home,
        ),
    ],
    model: options.Model,
    out: Annotated[Path, typer.Option(help="Folder to write; run it again to go on.", callback=options.home)],
    held_out: Annotated[
        Path | None, typer.Option(help="Queries to evaluate on. Default: a tenth of the others.", callback=options.home)
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            help="A reranker whose scores are learned, in place of the targets.", autocompletion=options.reranker_names
        ),
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="How often each query is seen, at most.")] = 3,
    batch_size: Annotated[int, typer.Option(min=2, help="Queries a step and process.")] = 64,
    learning_rate: Annotated[float | None, typer.Option(help="Default: 2e-5, with --lora 2e-4.")] = None,
    negatives: Annotated[int, typer.Option(min=1, max=64, help="Wrong images of each query.")] = 4,
    lora: Annotated[bool, typer.Option("--lora", help="Train adapters, merged in at the end: less memory.")] = False,
    freeze: Annotated[str | None, typer.Option(help="The side that stays as it is: text or image.")] = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16.")] = False,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Compute layers twice: less memory, more time.")
    ] = False,
    pass_size: Annotated[int, typer.Option(min=1, help="Contents in memory together.")] = 32,
    seed: Annotated[int, typer.Option(min=0, help="Of the split and of the order.")] = 0,
    device: options.Device = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print counts and figures as JSON.")] = False,
) -> None:
    """Train a model on your own queries. Images that are held out say whether it got better."""
    from mm_retriever.terminal import print_json
    from mm_retriever.training import Recipe, train

    if freeze not in (None, "text", "image"):
        raise QueryError(f"--freeze {freeze}: give text or image")
    recipe = Recipe(
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        negatives=negatives,
        lora=lora,
        freeze="text" if freeze == "text" else "image" if freeze == "image" else None,
        bf16=bf16,
        gradient_checkpointing=gradient_checkpointing,
        pass_size=pass_size,
        seed=seed,
    )
    result = train(
        queries,
        model,
        out,
        recipe=recipe,
        held_out=held_out,
        teacher=teacher,
        device=device,
        say=lambda line: typer.echo(line, err=True),
    )
    if as_json:
        print_json(result.to_dict())
        return
    for measure, figure in result.gain.items():
        typer.echo(
            f"{measure}: {result.before.figures[measure]} before, {result.after.figures[measure]} after, {figure}"
        )
    typer.echo(f"wrote {result.folder}; use it with --model {result.folder}")
