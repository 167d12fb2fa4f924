"""Training of a small random model: what is checked before, what is written after, what stays and what changes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mm_retriever import load_embedder
from mm_retriever.embedders.embedder import Trainable
from mm_retriever.errors import QueryError
from mm_retriever.training import Recipe, Training, train
from mm_retriever.training.examples import Vectors, read_examples
from mm_retriever.training.run import CHECKPOINTS, best_share
from tests.support.colour_scorer import load as load_colour_scorer
from tests.support.training_data import coloured, write_model, write_queries
from tests.support.warm import warm_run

ROOT = Path(__file__).resolve().parents[2]
RECIPE = Recipe(epochs=1, batch_size=4, learning_rate=1e-2, negatives=2, held_out=0.2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def queries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_queries(tmp_path_factory.mktemp("queries"), 20)


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def changed(model: Path, trained: Path) -> set[str]:
    before, after = weights(model), weights(trained)
    assert before.keys() == after.keys()
    return {name for name, tensor in before.items() if not tensor.equal(after[name])}


@pytest.fixture(scope="module")
def training(model: Path, queries: Path, tmp_path_factory: pytest.TempPathFactory) -> Training:
    return train(queries, model, tmp_path_factory.mktemp("out") / "tuned", recipe=RECIPE, device="cpu")


def test_a_trained_model_is_a_folder_with_a_space_of_its_own(model: Path, training: Training) -> None:
    """Vectors of the two must never be compared."""
    assert training.kept > 0
    assert changed(model, training.folder)
    assert load_embedder(training.folder, device="cpu").space != load_embedder(model, device="cpu").space
    assert not [path for path in training.folder.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl")]
    assert not (training.folder / CHECKPOINTS).exists()


def test_the_figures_after_training_are_those_of_the_model_that_is_written(queries: Path, training: Training) -> None:
    """They were measured before it was written, while the best weights were chosen."""
    examples = read_examples(queries, share=RECIPE.held_out, seed=RECIPE.seed)
    written = Vectors(load_embedder(training.folder, device="cpu")).evaluate(examples.held_out)[0]
    assert written.figures == training.after.figures


def test_the_card_and_the_file_of_figures_say_what_was_done(training: Training) -> None:
    card = (training.folder / "README.md").read_text(encoding="utf-8")
    kept = f"the weights after step {training.kept} are kept, {training.share:.0%} of the way from those before"
    assert kept in card
    assert "- queries trained on: 16\n- queries held out: 4" in card
    figures = json.loads((training.folder / "training.json").read_text(encoding="utf-8"))
    assert figures["before"]["MRR"]["queries"] == 4
    assert [entry["step"] for entry in figures["history"]] == [1, 2, 3, 4]
    assert all("MRR" in entry and "loss" in entry for entry in figures["history"])


@pytest.mark.parametrize(("summit", "before", "share"), [(9.0, -64.0, 1.0), (4.5, -12.0, 0.5), (4.5, -0.1, 0.0)])
def test_weights_end_where_they_are_worth_most_on_the_way(summit: float, before: float, share: float) -> None:
    """From 1 to 9; 0 and the start where nothing on the way is worth more than that."""
    weights = [torch.tensor([9.0])]
    found = best_share(weights, [torch.tensor([1.0])], before, lambda: -abs(float(weights[0]) - summit))
    assert (found, float(weights[0])) == (share, 1 + 8 * share)


def test_a_folder_that_holds_something_is_not_written_into(queries: Path, training: Training) -> None:
    with pytest.raises(QueryError, match=r"holds 'README\.md' already; give a folder that is new"):
        train(queries, "no such model", training.folder, recipe=RECIPE)


def test_images_that_cannot_be_read_are_named_and_counted_before_a_model_is_loaded(tmp_path: Path) -> None:
    """The model does not even exist."""
    path = write_queries(tmp_path, 8)
    for name in ("target2.png", "query5.png"):
        (tmp_path / name).write_bytes(b"no image")
    with pytest.raises(QueryError, match=r"^2 of 16 images cannot be read: .*query5\.png.*; .*target2\.png"):
        train(path, "no such model", tmp_path / "out", recipe=RECIPE)
    assert not (tmp_path / "out").exists()


def test_no_image_is_trained_on_and_evaluated_on(tmp_path: Path) -> None:
    """Not under another name either: a copy with the same pixels is the same image."""
    path = write_queries(tmp_path, 12)
    (tmp_path / "copy.png").write_bytes((tmp_path / "target3.png").read_bytes())
    with path.open("a", encoding="utf-8") as file:
        file.write('\n{"image": "query7.png", "text": "white", "targets": ["copy.png"], "negatives": ["target0.png"]}')
    for seed in range(6):
        examples = read_examples(path, share=0.3, seed=seed)
        sides = [{image for query in side for image in query.images} for side in (examples.train, examples.held_out)]
        assert not sides[0] & sides[1]
        assert 1 <= len(examples.held_out) <= 4
        assert len(examples.train) + len(examples.held_out) == 13
        assert examples.counts["copies of images"] == 1


def test_lines_of_the_same_words_are_one_query_in_any_case_and_spacing(tmp_path: Path) -> None:
    """Apart, each made the right image of the other a wrong one."""
    for number in range(6):
        coloured(tmp_path / f"{number}.png", "red", number)
    words = ["a mug", "A  mug ", "a mug\u00a0", "another", "a third", "a fourth"]
    lines = [{"text": text, "targets": [f"{number}.png"]} for number, text in enumerate(words)]
    (tmp_path / "queries.jsonl").write_text("\n".join(map(json.dumps, lines)))
    examples = read_examples(tmp_path, share=0.3, seed=0)
    by_words = {query.text: len(query.targets) for query in (*examples.train, *examples.held_out)}
    assert by_words == {"a mug": 3, "another": 1, "a third": 1, "a fourth": 1}


def test_queries_that_hang_together_cannot_be_split(tmp_path: Path) -> None:
    coloured(tmp_path / "one.png", "red", 0)
    lines = [{"text": f"mug {number}", "targets": ["one.png"]} for number in range(9)]
    (tmp_path / "queries.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(
        QueryError, match="9 hang together by images that they share: give the queries that are held out"
    ):
        read_examples(tmp_path, share=0.2, seed=0)


def test_queries_to_evaluate_on_that_were_trained_on_are_refused(tmp_path: Path) -> None:
    path = write_queries(tmp_path, 4)
    with pytest.raises(QueryError, match="8 images are trained on and evaluated on, such as "):
        read_examples(path, held_out=path, share=0.1, seed=0)


@pytest.mark.parametrize("side", ["text", "image"])
def test_a_frozen_side_stays_as_it_is(model: Path, queries: Path, tmp_path: Path, side: str) -> None:
    recipe = replace(RECIPE, freeze=side)
    result = train(queries, model, tmp_path / "out", recipe=recipe, device="cpu")
    of = {"text": "bge_", "image": ("model_visual.", "visual_proj.")}
    different = changed(model, result.folder)
    assert different
    assert not [name for name in different if name.startswith(of[side])]


def test_adapters_are_merged_into_weights_of_the_same_names(model: Path, queries: Path, tmp_path: Path) -> None:
    """LoRA: only matrices of linear layers change; bfloat16 and gradient checkpointing go with it."""
    recipe = Recipe(
        epochs=1, batch_size=8, learning_rate=1e-2, held_out=0.2, lora=True, bf16=True, gradient_checkpointing=True
    )
    result = train(queries, model, tmp_path / "out", recipe=recipe, device="cpu")
    different = changed(model, result.folder)
    assert different
    assert all(name.endswith(".weight") for name in different)
    assert not [name for name in different if "norm" in name.lower() or "embeddings" in name or "patch_embed" in name]


def test_a_teacher_is_learned_from_without_the_targets(model: Path, queries: Path, tmp_path: Path) -> None:
    """The scorer likes what has the colour of the query image, whatever the file says is right."""
    teacher = load_colour_scorer("mean-colour", top_n=8)
    recipe = Recipe(epochs=2, batch_size=8, learning_rate=1e-2, held_out=0.2)
    said: list[str] = []
    result = train(queries, model, tmp_path / "out", recipe=recipe, teacher=teacher, device="cpu", say=said.append)
    losses = [float(line.partition("loss ")[2].split(",")[0]) for line in said if line.startswith("step")]
    assert losses[-1] < losses[0]
    assert "what the reranker `mean-colour` says" in (result.folder / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["optimizer.pt", "model.safetensors", "rng_state.pth", "trainer_state.json"])
def test_of_a_damaged_checkpoint_training_goes_on_from_the_one_before(
    model: Path, queries: Path, tmp_path: Path, name: str
) -> None:
    """As a power cut leaves one. The weights are those of a training that was never ended."""
    lines: list[str] = []

    def ended(line: str) -> None:
        lines.append(line)
        if line.startswith("step 4 "):
            raise InterruptedError

    recipe = replace(RECIPE, epochs=2)
    with pytest.raises(InterruptedError):
        train(queries, model, tmp_path / "out", recipe=recipe, device="cpu", say=ended)
    checkpoints = tmp_path / "out" / CHECKPOINTS
    damaged = checkpoints / "checkpoint-3" / name
    damaged.write_bytes(damaged.read_bytes()[: damaged.stat().st_size // 2])
    (checkpoints / "checkpoint-of somebody").mkdir()
    train(queries, model, tmp_path / "out", recipe=recipe, device="cpu", say=lines.append)
    assert f"going on from {checkpoints / 'checkpoint-2'}" in lines
    train(queries, model, tmp_path / "whole", recipe=recipe, device="cpu")
    assert not changed(tmp_path / "out", tmp_path / "whole")


# ------------------------------------------------------------------------------------------ slow

KILLED = """
import os, signal, sys
from mm_retriever.training import Recipe, train

def say(line):
    if line.startswith(sys.argv[4]):  # an evaluation; the checkpoint of the one before is whole
        os.kill(os.getpid(), signal.SIGKILL)

recipe = Recipe(epochs=3, batch_size=4, learning_rate=1e-2, negatives=2, held_out=0.2, lora=sys.argv[5] == "lora")
train(sys.argv[1], sys.argv[2], sys.argv[3], recipe=recipe, device="cpu", say=say)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_killed_and_resumed_training_gives_the_same_weights_to_the_bit(
    model: Path, queries: Path, tmp_path: Path, kind: str
) -> None:
    """Killed twice in the second epoch; the other run was never ended."""
    arguments = (queries, model, tmp_path / "killed")
    for step in ("step 5 ", "step 6 "):
        assert warm_run("-c", KILLED, *arguments, step, kind).returncode == -signal.SIGKILL
    for folder in ("killed", "whole"):
        done = warm_run("-c", KILLED, queries, model, tmp_path / folder, "never", kind)
        assert done.returncode == 0, done.stderr
    assert not changed(tmp_path / "killed", tmp_path / "whole")
    assert changed(model, tmp_path / "whole")
    histories = [json.loads((tmp_path / name / "training.json").read_text())["history"] for name in ("killed", "whole")]
    assert histories[0] == histories[1]


@pytest.mark.slow
def test_a_training_is_not_resumed_with_other_options(model: Path, queries: Path, tmp_path: Path) -> None:
    assert warm_run("-c", KILLED, queries, model, tmp_path / "out", "step 6 ", "full").returncode == -signal.SIGKILL
    refused = warm_run("-c", KILLED, queries, model, tmp_path / "out", "never", "lora")
    assert refused.returncode == 1
    assert "holds a training of other queries, of another model or with other options" in refused.stderr


@pytest.mark.slow
def test_right_targets_lift_and_shuffled_ones_do_not(model: Path, tmp_path: Path) -> None:
    """The gain is in what the targets say, on images that were never trained on: the control of every fine-tuning."""
    recipe = Recipe(epochs=12, batch_size=16, learning_rate=3e-3, negatives=2)
    held_out = write_queries(tmp_path, 80, first=2)  # 20 images have the colour of a target: MRR can be .18 at most
    gains = {}
    for shuffled in (False, True):
        path = write_queries(tmp_path / str(shuffled), 160, first=1, shuffled=shuffled)
        result = train(path, model, tmp_path / f"out{shuffled}", recipe=recipe, held_out=held_out, device="cpu")
        gains[shuffled] = result.gain["MRR, query image removed"]
    assert gains[False].low > 0.02
    assert gains[True].mean < gains[False].mean / 2


TOGETHER = """
import sys
from mm_retriever.training import Recipe, train

recipe = Recipe(epochs=3, batch_size=int(sys.argv[4]), learning_rate=1e-3, negatives=2, held_out=0.2)
train(sys.argv[1], sys.argv[2], sys.argv[3], recipe=recipe, device="cpu")
"""
NOISE = 2e-4  # of losses between 0.5 and 4: sums in another order, in float32, through twelve steps of Adam


@pytest.mark.slow
def test_two_processes_train_as_one_with_the_doubled_batch(model: Path, queries: Path, tmp_path: Path) -> None:
    """Over gloo, on this machine."""
    script = tmp_path / "together.py"
    script.write_text(TOGETHER)
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    command = [sys.executable, *launch, *map(str, (script, queries, model, tmp_path / "two", "2"))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    both = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert both.returncode == 0, both.stderr
    alone = warm_run("-c", TOGETHER, queries, model, tmp_path / "one", "4")
    assert alone.returncode == 0, alone.stderr
    losses = [
        [entry["loss"] for entry in json.loads((tmp_path / name / "training.json").read_text())["history"]]
        for name in ("two", "one")
    ]
    assert len(losses[0]) == len(losses[1]) > 4
    np.testing.assert_allclose(losses[0], losses[1], atol=NOISE, rtol=NOISE)


def test_what_is_trained_is_in_torch(queries: Path, tmp_path: Path) -> None:
    from tests.support.colour_embedding import ColourEmbedder

    embedder = ColourEmbedder()
    assert not isinstance(embedder, Trainable)
    with pytest.raises(QueryError, match="'colours' has no weights on this machine to train"):
        train(queries, embedder, tmp_path / "out", recipe=RECIPE)
    compiled = load_embedder("tiny", backend="openvino")
    with pytest.raises(QueryError, match=r"'tiny' is computed by OpenVINO.*load it with backend torch"):
        train(queries, compiled, tmp_path / "out", recipe=RECIPE)
