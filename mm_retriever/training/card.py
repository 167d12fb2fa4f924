"""`Training`, and its model card: what a model was trained on, how, and what it answers better or worse since."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mm_retriever.errors import one_line
from mm_retriever.evaluation.metrics import Evaluation, Figure, difference
from mm_retriever.files import write_atomically
from mm_retriever.training.recipe import TEMPERATURE, Recipe


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
    told = [f"- {name.replace('_', ' ')}: {value}" for name, value in options.items() if value not in (None, False)]
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
        *told,
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
