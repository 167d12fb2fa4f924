"""sentence-transformers' trainer around one of our embedders: its loss, inputs, order, checkpoints and evaluations.

The loss makes smaller what separates a right image from wrong ones, or a ranking from a reranker's judgement. Source:
`CachedMultipleNegativesRankingLoss` of sentence-transformers (GradCache, arXiv:2101.06983) at a temperature of 0.02. An
image that is right for a query is no wrong one, wherever else in the batch it stands.

A checkpoint holds the weights that are trained (safetensors), and the optimizer's and the generators' state, which
transformers writes and reads back as tensors alone.
"""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig, LoraModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.base.modules import InputModule
from sentence_transformers.base.sampler import DefaultBatchSampler
from sentence_transformers.sentence_transformer.evaluation import SentenceEvaluator
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
from sentence_transformers.util import all_gather, all_gather_with_grad, get_rank, get_world_size
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import EarlyStoppingCallback, PreTrainedModel, PrinterCallback, TrainerCallback

from mm_retriever.checkpoint import SAFETENSORS
from mm_retriever.embedders.embedder import Trainable
from mm_retriever.errors import QueryError
from mm_retriever.evaluation.datasets import LabelledQuery
from mm_retriever.packed_linear import unpack_linears
from mm_retriever.training.card import EVALUATIONS, LORA_RANK, PATIENCE, TEMPERATURE, Recipe
from mm_retriever.training.examples import CHOSEN, FIRST, Vectors
from mm_retriever.training.negatives import Row


class RetrievalLoss(CachedMultipleNegativesRankingLoss):
    """Cross-entropy of the right image over all images of the batch; with shares of a teacher, its own candidates too.

    Args:
        model: around an embedder whose vectors have length 1.
        rows: what is trained on; labels are their numbers.
        queries: that the rows are of.
        pass_size: contents that go through the model together.
    """

    def __init__(
        self, model: SentenceTransformer, rows: Sequence[Row], queries: Sequence[LabelledQuery], *, pass_size: int
    ) -> None:
        super().__init__(model, scale=1 / TEMPERATURE, mini_batch_size=pass_size, gather_across_devices=True)
        numbers: dict[Path, int] = {}
        table = [[numbers.setdefault(image, len(numbers)) for image in row.images] for row in rows]
        self.images = torch.tensor(table)  # (N, 1 + n)
        self.shares = torch.tensor([row.shares for row in rows]) if rows[0].shares else None  # (N, 1 + n)
        self.right = [[numbers[name] for name in queries[row.query].targets if name in numbers] for row in rows]

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor) -> Tensor:
        """The mean over the batch."""
        loss: Tensor = self.forward_cached(list(sentence_features), labels)
        return loss

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """The mean over this process's queries, from the vectors of a batch: first those of queries, then of images."""
        assert labels is not None
        queries, own = torch.cat(reps[0]), [torch.cat(column) for column in reps[1:]]
        loss = self._contrast(queries, own, labels) if self.shares is None else self._distance(queries, own, labels)
        if with_backward:
            loss.backward()
            loss = loss.detach()
        return loss

    def _contrast(self, queries: Tensor, own: Sequence[Tensor], labels: Tensor) -> Tensor:
        is_alone = get_world_size() == 1
        every = labels if is_alone else all_gather(labels)
        candidates = torch.cat([column if is_alone else all_gather_with_grad(column) for column in own])
        images = self.images[every.cpu()].T.flatten()  # of each candidate, in their order
        places = torch.arange(len(labels)) + get_rank() * len(labels)
        masked = torch.stack([torch.isin(images, torch.tensor(self.right[row])) for row in labels.tolist()])
        masked[torch.arange(len(labels)), places] = False
        logits = (queries @ candidates.T * self.scale).masked_fill(masked.to(queries.device), -torch.inf)
        return F.cross_entropy(logits, places.to(queries.device))

    def _distance(self, queries: Tensor, own: Sequence[Tensor], labels: Tensor) -> Tensor:
        """Kullback-Leibler divergence of the model's shares of a query's candidates from the teacher's."""
        assert self.shares is not None
        logits = torch.stack([(queries * column).sum(-1) for column in own], dim=1) * self.scale  # (B, 1 + n)
        shares = self.shares[labels.cpu()].to(logits)
        return F.kl_div(logits.log_softmax(-1), shares, reduction="batchmean")


_STATE = "trainer_state.json"  # transformers writes it last
_NEVER_USED = ("logit_scale", "logit_bias")  # of CLIP's own loss: no vector depends on them


class EmbedderModule(InputModule):
    """An embedder as a module of sentence-transformers."""

    def __init__(self, embedder: Trainable) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.network = embedder.network
        self._embedder = embedder

    @property
    def modalities(self) -> list[Any]:
        """What it takes."""
        return ["text", "image", ("image", "text")]

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        """Vectors of the rows of ``contents`` that ``input_ids`` numbers."""
        contents = [features["contents"][row] for row in features["input_ids"].tolist()]
        vectors = self._embedder.vectors(contents, query=features["asked"])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            # gradients are averaged parameter by parameter: one that a batch has no use for has a gradient of zero
            unused = [parameter.flatten()[0] for parameter in self.network.parameters() if parameter.requires_grad]
            vectors = vectors + 0 * torch.stack(unused).sum()
        return {"sentence_embedding": vectors}

    def save(self, output_path: str, *_: Any, **__: Any) -> None:
        """The trainer below writes its own checkpoints."""
        raise NotImplementedError


class Collator:
    """Rows of the data set as the loss takes them."""

    valid_label_columns = ("label",)

    def __init__(self, rows: Sequence[Row], queries: Sequence[LabelledQuery], vectors: Vectors) -> None:
        self._rows, self._queries, self._vectors = rows, queries, vectors

    def __call__(self, numbers: Sequence[dict[str, int]]) -> dict[str, Any]:
        """One batch: a column of queries, one of right images, and those of wrong ones."""
        rows = [self._rows[number["row"]] for number in numbers]
        queries = [self._queries[row.query] for row in rows]
        columns = {"query": [(query.image, query.text) for query in queries]}
        columns |= {f"image{place}": [(row.images[place], "") for row in rows] for place in range(len(rows[0].images))}
        contents = iter(self._vectors.contents([part for column in columns.values() for part in column]))
        batch: dict[str, Any] = {"label": torch.tensor([number["row"] for number in numbers])}
        for name, column in columns.items():
            batch[f"{name}_input_ids"] = torch.arange(len(column))
            batch[f"{name}_contents"] = [next(contents) for _ in column]
            batch[f"{name}_asked"] = name == "query"
        return batch


class Shuffled(Sampler[int]):
    """Another order in every epoch, the same whenever it is asked for."""

    def __init__(self, count: int, seed: int) -> None:
        self._count, self._seed = count, seed
        self.epoch = 0

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed + self.epoch)
        return iter(torch.randperm(self._count, generator=generator).tolist())

    def __len__(self) -> int:
        return self._count


class _Epochs(TrainerCallback):
    """Tells the order which epoch it is, also where training is resumed."""

    def __init__(self, order: Shuffled) -> None:
        self._order = order

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._order.epoch = int(state.epoch or 0)


class _Told(TrainerCallback):
    """Says how far training is, and how good."""

    def __init__(self, say: Callable[[str], object]) -> None:
        self._say = say

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        metrics: dict[str, float] = kwargs["metrics"]
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        figures = ", ".join(f"{measure} {metrics[f'eval_{measure}']:.3f}" for measure in (CHOSEN, FIRST))
        loss = f"loss {losses[-1]:.4f}, " if losses else ""
        self._say(f"step {state.global_step} of {state.max_steps}: {loss}{figures}")


class HeldOut(SentenceEvaluator):
    """The figures of held-out queries."""

    def __init__(self, vectors: Vectors, queries: Sequence[LabelledQuery]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._vectors, self._queries = vectors, queries

    def __call__(self, model: nn.Module, *_: Any, **__: Any) -> dict[str, float]:
        """The means by measure."""
        was_training = model.training
        model.train(False)
        evaluation, worth = self._vectors.evaluate(self._queries)
        model.train(was_training)
        return {measure: figure.mean for measure, figure in evaluation.figures.items()} | {"worth": worth}


class EmbedderTrainer(SentenceTransformerTrainer):
    """The trainer with our order and our checkpoints, and without a model card of its own."""

    order: Shuffled

    def get_batch_sampler(self, dataset: Any, batch_size: int, drop_last: bool, *_: Any, **__: Any) -> Any:
        """Batches of `order`."""
        return DefaultBatchSampler(self.order, batch_size=batch_size, drop_last=drop_last)

    def add_model_card_callback(self, *_: Any) -> None:
        """None."""

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        assert output_dir is not None
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.detach().contiguous() for name, tensor in trained(self.model).items()}
        save_file(tensors, folder / SAFETENSORS)

    def _load_from_checkpoint(self, checkpoint_path: str, model: Any = None) -> None:
        saved = load_file(Path(checkpoint_path) / SAFETENSORS)
        own = trained(self.model)
        if own.keys() != saved.keys():
            raise QueryError(f"{checkpoint_path} is of another training; remove the folder, or write to another")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(saved[name])

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def prepare_network(embedder: Trainable, recipe: Recipe) -> LoraModel | None:
    """Decides which weights are trained; returns the adapters, which are to be merged, if there are any.

    Raises:
        QueryError: a side to freeze that the model does not have, or nothing left to train.
    """
    network = unpack_linears(embedder.network)
    frozen = embedder.sides.get(recipe.freeze, ()) if recipe.freeze else ()
    if recipe.freeze and not frozen:
        raise QueryError(f"{embedder.name!r} has no {recipe.freeze} side of its own that could be frozen")
    still = {id(module) for part in frozen for module in part.modules()}
    fixed = {id(parameter) for part in frozen for parameter in part.parameters()}
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(id(parameter) not in fixed and name.rpartition(".")[2] not in _NEVER_USED)
    if recipe.gradient_checkpointing:
        models = [module for module in network.modules() if isinstance(module, PreTrainedModel)]
        layered = [model for model in models if model.supports_gradient_checkpointing]
        if not layered:
            raise QueryError(f"{embedder.name!r} knows no gradient checkpointing: train without it")
        for module in layered[:1]:
            # transformers renamed it
            enable = getattr(module, "activation_checkpointing_enable", None) or module.gradient_checkpointing_enable
            enable({"use_reentrant": False})
    if not recipe.lora:
        return None
    linear = [
        name for name, module in network.named_modules() if isinstance(module, nn.Linear) and id(module) not in still
    ]
    config = LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=linear)
    return LoraModel(network, config, "default")


def training_arguments(recipe: Recipe, folder: Path, device: torch.device) -> SentenceTransformerTrainingArguments:
    """The recipe as transformers takes it; where several processes train, they are together after this.

    Args:
        recipe: how a model is trained.
        folder: of the checkpoints.
        device: of the model.
    """
    is_cpu = device.type == "cpu"
    return SentenceTransformerTrainingArguments(
        output_dir=str(folder),
        num_train_epochs=recipe.epochs,
        per_device_train_batch_size=recipe.batch_size,
        learning_rate=recipe.rate,
        warmup_steps=0.1,
        bf16=recipe.bf16,
        use_cpu=is_cpu,
        seed=recipe.seed,
        eval_strategy="steps",
        save_strategy="steps",
        save_total_limit=2,
        load_best_model_at_end=True,
        restore_callback_states_from_checkpoint=True,  # how long there was nothing better
        metric_for_best_model="eval_worth",
        greater_is_better=True,
        logging_strategy="steps",
        report_to="none",
        disable_tqdm=True,
        dataloader_drop_last=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        ddp_backend="gloo" if is_cpu and int(os.environ.get("WORLD_SIZE", "1")) > 1 else None,
    )


def make_trainer(
    embedder: Trainable,
    vectors: Vectors,
    rows: Sequence[Row],
    queries: Sequence[LabelledQuery],
    held_out: Sequence[LabelledQuery],
    recipe: Recipe,
    arguments: SentenceTransformerTrainingArguments,
    say: Callable[[str], object],
) -> EmbedderTrainer:
    """The trainer of these rows.

    Args:
        embedder: whose network `prepare_network` has prepared.
        vectors: of the same embedder.
        rows: to train on.
        queries: that the rows are of.
        held_out: queries to evaluate on.
        recipe: how.
        arguments: from `training_arguments`.
        say: called with a line after each evaluation.

    Raises:
        QueryError: fewer rows than one step takes.
    """
    steps = recipe.epochs * (len(rows) // (recipe.batch_size * arguments.world_size))
    if not steps:
        raise QueryError(
            f"{len(rows)} rows to train on are fewer than a step of {arguments.world_size} times {recipe.batch_size} "
            "takes; give a smaller batch size, or more queries"
        )
    every = max(1, steps // EVALUATIONS)
    arguments.eval_steps = arguments.save_steps = arguments.logging_steps = every
    device = next(embedder.network.parameters()).device
    model = SentenceTransformer(modules=[EmbedderModule(embedder)], device=str(device))
    EmbedderTrainer.order = order = Shuffled(len(rows), recipe.seed)
    trainer = EmbedderTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict({"row": list(range(len(rows)))}),
        loss=RetrievalLoss(model, rows, queries, pass_size=recipe.pass_size),
        evaluator=HeldOut(vectors, held_out),
        data_collator=Collator(rows, queries, vectors),  # type: ignore[arg-type]
        callbacks=[_Epochs(order), EarlyStoppingCallback(PATIENCE), _Told(say)],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of a training that was ended; damaged ones, as of a power cut, go."""
    steps = {place: place.name.removeprefix("checkpoint-") for place in folder.glob("checkpoint-*")}
    checkpoints = sorted((place for place, step in steps.items() if step.isdecimal()), key=lambda p: int(steps[p]))
    for checkpoint in reversed(checkpoints):
        if _is_whole(checkpoint):
            return checkpoint
        shutil.rmtree(checkpoint)
    return None


def _is_whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
        with safe_open(checkpoint / SAFETENSORS, "pt"):  # refuses a file of another length than its header says
            pass
    except (OSError, ValueError, SafetensorError):
        return False
    # torch.save writes zip archives, whose directory is their end
    return all(zipfile.is_zipfile(place) for place in checkpoint.iterdir() if place.suffix in (".pt", ".pth"))


def history(trainer: EmbedderTrainer) -> list[dict[str, float]]:
    """What was measured in the course of training: step, loss, and figures of held-out queries."""
    steps: dict[int, dict[str, float]] = {}
    for entry in trainer.state.log_history:
        kept = {
            key.removeprefix("eval_"): value
            for key, value in entry.items()
            if key == "loss" or "@" in key or "MRR" in key
        }
        steps.setdefault(int(entry["step"]), {}).update(kept)
    return [{"step": step, **values} for step, values in sorted(steps.items()) if values]
