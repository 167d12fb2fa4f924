"""A model in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPARED = """
import os, signal, sys
from mm_retriever.embedders.aside import model_aside
with model_aside() as aside:
    try:
        aside.load("no-such-model")
    except Exception as error:
        print(type(error).__name__, error)
    aside.load("tiny")
    import numpy as np
    from PIL import Image
    from mm_retriever.embedders.embedder import Content
    assert "torch" not in sys.modules
    image = Image.effect_noise((300, 200), 80).convert("P")
    pixels = aside.prepare(image)
    contents = [Content("a red mug"), Content(image=pixels), Content("in blue", pixels)]
    vectors = aside.encode(contents, query=True)
    from mm_retriever.embedders.registry import load_embedder
    here = load_embedder("tiny")
    assert (pixels == here.prepare(image)).all()
    assert (vectors == here.encode(contents, query=True)).all()
    for fact in ("name", "space", "note", "dimension", "device", "cache_identity"):
        assert getattr(aside, fact) == getattr(here, fact), fact
    import multiprocessing
    (process,) = multiprocessing.active_children()
    os.kill(process.pid, signal.SIGKILL)
    try:
        aside.encode(contents)
    except Exception as error:
        print(type(error).__name__, error)
print(multiprocessing.active_children())
with model_aside() as aside:
    print(aside)
"""


@pytest.mark.slow
@pytest.mark.skipif((os.cpu_count() or 1) < 2 or not hasattr(os, "fork"), reason="one processor, or no fork")
def test_a_model_aside_gives_the_vectors_and_errors_of_one_here_and_says_when_it_is_gone():
    """Our promise. Truth: the same model in the process that asks; the system's list of processes."""
    command = [sys.executable, "-c", COMPARED]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    wrong, gone, children, late = done.stdout.splitlines()
    assert wrong.startswith("ModelNotFoundError 'no-such-model' does not exist")
    assert gone == "CheckpointError the process that computes the model has ended: was it killed for memory?"
    assert (children, late) == ("[]", "None")  # a process that has loaded torch keeps the model to itself
