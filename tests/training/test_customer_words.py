"""What the benchmark of fine-tuning trains on, chooses by and tests has nothing in common. Our choice."""

from __future__ import annotations

from itertools import combinations

import numpy as np
from customer_words import CHOSEN_ON, CUSTOMERS, TESTED, ask
from phrases import COLOUR_NAMES, KIND_NAMES, MODES, PATTERN_NAMES, templates

from mm_retriever.demo.catalogue import HELD_OUT, all_looks


def test_no_wording_and_no_pair_stands_in_two_parts():
    parts = [{one for templates_of in words.values() for one in templates_of} for words in CUSTOMERS.values()]
    parts += [{one for mode in MODES for one in templates(wording)[mode]} for wording in ("training", "held-out")]
    assert all(first.isdisjoint(second) for first, second in combinations(parts, 2))
    assert CHOSEN_ON | TESTED == HELD_OUT
    assert CHOSEN_ON.isdisjoint(TESTED)
    assert min(len(CHOSEN_ON), len(TESTED)) >= 16


def test_training_queries_neither_ask_for_nor_show_a_held_out_pair_and_say_what_is_not_wanted():
    seen = [looks for looks in all_looks() if (looks.kind, looks.pattern) not in HELD_OUT]
    asked = ask(seen, CUSTOMERS["train"], np.random.default_rng(0), 400, never=HELD_OUT)
    for one in asked:
        assert HELD_OUT.isdisjoint({(looks.kind, looks.pattern) for looks in (one.source, one.wanted)})
        assert "{" not in one.text
    names = [*KIND_NAMES.values(), *PATTERN_NAMES.values(), *COLOUR_NAMES.values()]
    two = [sum(any(name in one.text for name in synonyms) for synonyms in names) >= 2 for one in asked]
    assert np.mean(two) == 1
