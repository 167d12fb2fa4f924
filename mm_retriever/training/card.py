"""`Recipe`, how a model is trained; `Training`, what became of it; and the model card that says both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from mm_retriever.errors import QueryError, one_line, shown
from mm_retriever.evaluation.metrics import Evaluation, Figure, difference
from mm_retriever.files import write_atomically

TEMPERATURE = 0.02
LORA_RANK = 32
EVALUATIONS = 10  # in the course of a training
PATIENCE = 3  # evaluations without a better one, after which it ends
SHARES = (1.0, 0.75, 0.5, 0.25)  # of the way from the weights before to the best ones, of which the best is kept


@dataclass(frozen=True)
class Recipe:
    """How a model is trained; the defaults are the published ones of VISTA, for a small set.

    Args:
        epochs: how often every query is seen, at most: training ends earlier when held-out queries get no better.
        batch_size: queries a step and process; the right images of the others are wrong ones of each.
        learning_rate: at its height; None: 2e-5, with LoRA 2e-4.
        negatives: wrong images of each query, beside those of the batch; the query image is always one of them.
        lora: train adapters of rank 32 on all linear layers, which are merged into the weights at the end.
        freeze: the side of the model that stays as it is.
        bf16: compute in bfloat16; the weights stay in float32.
        gradient_checkpointing: compute layers twice, for less memory.
        pass_size: contents that go through the model together; has no bearing on the result but for rounding.
        held_out: share of the queries that is evaluated on, and not trained on.
        seed: of the split and of the order.

    Raises:
        QueryError: a number that is out of range.
    """

    epochs: int = 3
    batch_size: int = 64
    learning_rate: float | None = None
    negatives: int = 4
    lora: bool = False
    freeze: Literal["text", "image"] | None = None
    bf16: bool = False
    gradient_checkpointing: bool = False
    pass_size: int = 32
    held_out: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least, most in (
            ("epochs", 1, 10_000),
            ("batch_size", 2, 2**20),
            ("negatives", 1, 64),
            ("pass_size", 1, 2**20),
            ("seed", 0, 2**31),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                raise QueryError(f"{name} is {shown(value)}; give a whole number from {least} to {most}")
        if not 0 < self.rate <= 1:
            raise QueryError(f"learning_rate is {shown(self.learning_rate)}; give a number above 0, at most 1")
        if not 0 < self.held_out < 1:
            raise QueryError(f"held_out is {shown(self.held_out)}; give a share between 0 and 1")
        if self.freeze not in (None, "text", "image"):
            raise QueryError(f"freeze is {shown(self.freeze)}; give text or image, or leave it out")

    @property
    def rate(self) -> float:
        """The learning rate at its height."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 2e-4 if self.lora else 2e-5


@dataclass(frozen=True)
class Training:
    """What became of a training.

    Args:
        folder: of the model, for `load_embedder`.
        before: figures of the held-out queries.
        after: the same of the trained model.
        history: step, loss and figures in the course of it.
        counts: of the data.
        steps: that were taken; the best weights of the evaluations are kept.
        kept: the step of the weights that are kept; 0 where no step made them better.
        share: how far the weights go from those before to those of that step, 0 to 1.
    """

    folder: Path
    before: Evaluation
    after: Evaluation
    history: Sequence[Mapping[str, float]]
    counts: Mapping[str, int]
    steps: int
    kept: int
    share: float

    @property
    def gain(self) -> Mapping[str, Figure]:
        """By measure: how much more held-out queries have after than before."""
        return {measure: difference(self.before, self.after, measure) for measure in self.before.figures}

    def to_dict(self) -> dict[str, Any]:
        """Counts and figures as JSON holds them."""

        def figures(of: Mapping[str, Figure]) -> dict[str, Any]:
            return {measure: asdict(figure) for measure, figure in of.items()}

        return {
            "folder": str(self.folder),
            "counts": dict(self.counts),
            "steps": self.steps,
            "kept_step": self.kept,
            "kept_share": self.share,
            "before": figures(self.before.figures),
            "after": figures(self.after.figures),
            "gain": figures(self.gain),
            "history": [dict(entry) for entry in self.history],
        }


def write_card(folder: Path, training: Training, *, base: str, recipe: Recipe, teacher: str | None) -> Path:
    """Writes ``README.md`` and returns it.

    Args:
        folder: of the model.
        training: what became of it.
        base: name of the model that was trained.
        recipe: how.
        teacher: name of the reranker that judged the candidates, if one did.
    """
    options = asdict(recipe) | {"learning_rate": recipe.rate, "temperature": TEMPERATURE}
    option_lines = [
        f"- {name.replace('_', ' ')}: {value}" for name, value in options.items() if value not in (None, False)
    ]
    learned = (
        f"what the reranker `{one_line(teacher, 200)}` says of the images that the model found (Kullback-Leibler "
        "divergence)"
        if teacher
        else "the right image of each query beside wrong ones: the query image, those given, those that look right, "
        "and the images of the other queries of a batch"
    )
    kept = (
        f"Of {training.steps} steps, the weights after step {training.kept} are kept, {training.share:.0%} of the way "
        "from those before."
        if training.kept
        else f"None of {training.steps} steps made it better on the held-out queries: **the weights are those of the "
        "model that was trained.**"
    )
    lines = [
        f"# {one_line(base, 200)}, fine-tuned",
        "",
        f"Trained by mm-retriever from `{one_line(base, 200)}` on {learned}. {kept} The licence of that model applies.",
        "",
        "    from mm_retriever import load_embedder",
        f'    embedder = load_embedder("{one_line(folder.name, 200)}")',
        "",
        "## Data",
        "",
        *(f"- {what}: {count:,}" for what, count in training.counts.items()),
        "",
        "No image is on both sides. Equal pixels count as one image, whatever file they are in.",
        "",
        "## Recipe",
        "",
        *option_lines,
        "",
        "## Figures",
        "",
        "On the held-out queries, each of which ranks all images that they name (the first 100 count); means with 95% "
        "bootstrap intervals over right images. The best weights were chosen on these queries, so that an evaluation "
        "on others is a little lower.",
        "",
        "| measure | before | after | gain |",
        "| --- | --- | --- | --- |",
        *_rows(training.before.figures, training.after.figures, training.gain),
        "",
        f"{training.before.figures['MRR'].queries} queries. Removed: the query image is left out of the ranking.",
        "",
    ]
    return write_atomically(folder / "README.md", "\n".join(lines).encode("utf-8", "backslashreplace"))


def _rows(before: Mapping[str, Figure], after: Mapping[str, Figure], gain: Mapping[str, Figure]) -> list[str]:
    return [f"| {measure} | {before[measure]} | {after[measure]} | {gain[measure]} |" for measure in before]
