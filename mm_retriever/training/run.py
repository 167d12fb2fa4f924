"""`train`: from a file of queries to the folder of a model that answers them better."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_retriever.embedders.embedder import Embedder, Trainable
from mm_retriever.errors import MissingExtraError, QueryError
from mm_retriever.evaluation.metrics import Evaluation
from mm_retriever.files import write_atomically
from mm_retriever.rerank.reranker import Reranker
from mm_retriever.training.card import SHARES, Recipe, Training, write_card
from mm_retriever.training.examples import Examples, Vectors, read_examples
from mm_retriever.training.negatives import JUDGED, Row, judged_rows, mined_rows

if TYPE_CHECKING:
    from torch import Tensor

CHECKPOINTS = "checkpoints"
FIGURES = "training.json"
_SETTINGS = "settings.json"


def train(
    queries: str | os.PathLike[str],
    model: str | os.PathLike[str] | Embedder,
    out: str | os.PathLike[str],
    *,
    recipe: Recipe | None = None,
    held_out: str | os.PathLike[str] | None = None,
    teacher: str | Reranker | None = None,
    device: Any = None,
    say: Callable[[str], object] = lambda _: None,
) -> Training:
    """Train a model on queries and their right images, or on scores of a reranker, and write it to the folder `out`.

    The same call continues an interrupted training. Under `accelerate launch`, several processes train together; the
    first of them writes.

    Args:
        queries: a file as of `read_queries`, or its folder.
        model: any name of `load_embedder`, or such a model; it is trained itself.
        out: a folder, created if missing.
        recipe: how it is trained.
        held_out: queries to evaluate on; default: a part of the others that shares no image with the rest.
        teacher: a reranker, or its name: the model learns its scores of retrieved images, in place of the targets.
        device: default: the fastest there is.
        say: called with a line about each step.

    Raises:
        QueryError: wrong queries or images, a model that cannot be trained here, or a folder with other contents.
        CheckpointError: the model cannot be loaded.
        MissingExtraError: a library of the extra "train" is not installed.
    """
    recipe = recipe or Recipe()
    folder = Path(out).expanduser()
    _check_folder(folder)
    _check_extra()
    if isinstance(teacher, str):
        from mm_retriever.rerank.registry import check_reranker

        check_reranker(teacher)
    examples = read_examples(queries, held_out=held_out, share=recipe.held_out, seed=recipe.seed)
    say(", ".join(f"{count:,} {what}" for what, count in examples.counts.items() if count))
    embedder = _load(model, device)
    return _train(embedder, examples, folder, recipe, teacher, say)


def _train(
    embedder: Trainable,
    examples: Examples,
    folder: Path,
    recipe: Recipe,
    teacher: str | Reranker | None,
    say: Callable[[str], object],
) -> Training:
    from accelerate.utils import broadcast_object_list, set_seed

    from mm_retriever.training.trainer import (
        history,
        make_trainer,
        newest_checkpoint,
        prepare_network,
        trained,
        training_arguments,
    )

    embedder.network.float()
    space, vectors, checkpoints = embedder.space, Vectors(embedder), folder / CHECKPOINTS
    arguments = training_arguments(recipe, checkpoints, next(embedder.network.parameters()).device)
    is_main = arguments.process_index == 0
    say = say if is_main else _silent
    title = teacher if isinstance(teacher, str) or teacher is None else teacher.model_name
    if is_main:
        _check_settings(checkpoints, [space, title, asdict(recipe), _content(examples)])
    before, worth = vectors.evaluate(examples.held_out)
    say(f"before: {_figures(before)}")
    rows = [_rows(examples, vectors, recipe, teacher, say)] if is_main else [[]]
    rows = broadcast_object_list(rows)
    set_seed(recipe.seed)
    adapters = prepare_network(embedder, recipe)
    trainer = make_trainer(embedder, vectors, rows[0], examples.train, examples.held_out, recipe, arguments, say)
    checkpoint = broadcast_object_list([newest_checkpoint(checkpoints) if is_main else None])[0]
    if checkpoint is not None:
        say(f"going on from {checkpoint}")
    start = [parameter.detach().clone() for parameter in trained(embedder.network).values()]
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    embedder.network.train(False)
    weights = [parameter.data for parameter in trained(embedder.network).values()]
    share, after = _keep_best(weights, start, vectors, examples, before, worth)
    kept = int(trainer.state.best_global_step or 0) if share else 0
    if share:
        say(f"kept: the weights after step {kept}, {share:.0%} of the way from those before")
    else:
        say("no step made it better on the held-out queries: the model stays as it was")
    if adapters is not None:
        adapters.merge_and_unload()
    say(f"after: {_figures(after)}")
    steps = trainer.state.global_step
    result = Training(folder, before, after, history(trainer), examples.counts, steps, kept, share)
    if is_main:
        embedder.save(folder)
        write_card(folder, result, base=embedder.name, recipe=recipe, teacher=title)
        write_atomically(folder / FIGURES, json.dumps(result.to_dict(), indent=2).encode())
        shutil.rmtree(checkpoints)
    trainer.accelerator.wait_for_everyone()
    return result


def _keep_best(
    weights: Sequence[Tensor],
    start: Sequence[Tensor],
    vectors: Vectors,
    examples: Examples,
    before: Evaluation,
    worth: float,
) -> tuple[float, Evaluation]:
    """Set the weights as `best_share` does; return the share, and the evaluation with these weights."""
    evaluations: list[Evaluation] = []

    def worth_now() -> float:
        evaluation, worth = vectors.evaluate(examples.held_out)
        evaluations.append(evaluation)
        return worth

    share = best_share(weights, start, worth, worth_now)
    return share, evaluations[SHARES.index(share)] if share else before


def best_share(weights: Sequence[Tensor], start: Sequence[Tensor], before: float, worth: Callable[[], float]) -> float:
    """Set the weights to the best point between their start and their end, and return its share of the way.

    Source: WiSE-FT (arXiv:2109.01903): before the end, the model keeps more of its earlier knowledge.

    Args:
        weights: after training.
        start: the same before training.
        before: the worth of the model before training.
        worth: returns the worth of the current weights.
    """
    end = [tensor.clone() for tensor in weights]

    def move(share: float) -> None:
        for tensor, first, last in zip(weights, start, end, strict=True):
            tensor.copy_(first.lerp(last, share))

    worths = {}
    for share in SHARES:
        move(share)
        worths[share] = worth()
    best = max(worths, key=lambda share: worths[share])
    best = best if worths[best] > before else 0.0
    move(best)
    return best


def _silent(_: str) -> None:
    """Print nothing, in all processes but the first."""


def _rows(
    examples: Examples,
    vectors: Vectors,
    recipe: Recipe,
    teacher: str | Reranker | None,
    say: Callable[[str], object],
) -> list[Row]:
    if teacher is None:
        rows = mined_rows(examples.train, vectors, recipe.negatives)
        say(f"{len(rows):,} rows to train on, each with {len(rows[0].images) - 1} wrong images")
        return rows
    if isinstance(teacher, str):
        from mm_retriever.rerank.registry import load_reranker

        teacher = load_reranker(teacher, top_n=JUDGED, device=getattr(vectors.embedder, "device", None))
    done = 0

    def progress() -> None:
        nonlocal done
        done += 1
        if done % 100 == 0:
            say(f"{teacher.model_name} has judged {done:,} of {len(examples.train):,} queries")

    return judged_rows(examples.train, vectors, teacher, progress)


def _load(model: str | os.PathLike[str] | Embedder, device: Any) -> Trainable:
    from mm_retriever.embedders.registry import chosen_backend, load_embedder

    embedder = load_embedder(model, device=device) if isinstance(model, str | os.PathLike) else model
    if not isinstance(embedder, Trainable):
        raise QueryError(f"{embedder.name!r} has no weights on this machine to train; give a model that torch runs")
    if chosen_backend(embedder)[0] != "torch":
        raise QueryError(
            f"{embedder.name!r} is computed by OpenVINO, which trains no weights; load it with backend torch"
        )
    return embedder


def _check_folder(folder: Path) -> None:
    """Refuse to write into a folder that holds anything but an interrupted training."""
    if folder.is_dir() and (other := sorted(entry.name for entry in folder.iterdir() if entry.name != CHECKPOINTS)):
        raise QueryError(f"{str(folder)!r} holds {other[0]!r} already; give a folder that is new or empty")
    if folder.exists() and not folder.is_dir():
        raise QueryError(f"{str(folder)!r} is no folder; give a folder that is new or empty")


def _check_extra() -> None:
    for name in ("accelerate", "datasets", "ir_measures", "peft", "sentence_transformers"):
        MissingExtraError.check(name, "train")


def _check_settings(folder: Path, settings: list[Any]) -> None:
    """Refuse to continue a training of other data, another model or another recipe."""
    path = folder / _SETTINGS
    content = json.dumps(settings, sort_keys=True).encode()
    if any(folder.glob("checkpoint-*")) and (not path.is_file() or path.read_bytes() != content):
        raise QueryError(
            f"{str(folder)!r} holds a training of other queries, of another model or with other options: remove it to "
            "begin anew, or give another folder"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content)


def _content(examples: Examples) -> str:
    lines = [repr((query.image, query.text, query.targets, query.negatives)) for query in examples.train]
    lines += [repr((query.image, query.text, query.targets)) for query in examples.held_out]
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogatepass")).hexdigest()


def _figures(evaluation: Evaluation) -> str:
    return ", ".join(f"{measure} {figure}" for measure, figure in evaluation.figures.items())
