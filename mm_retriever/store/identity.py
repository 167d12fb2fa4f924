"""Whose vectors a collection holds, and whether another model's may be compared with them.

Owns the form of a model's identity: `family@weights.inputs`, the fingerprint of the weights and that of what is made of
inputs before they reach the weights. Place, name and float format of the weights are no part of it: a copy in another
folder, and bfloat16 beside float32, give vectors that may be compared. Knows no model and no collection.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_IDENTITY = re.compile(r".*@(?P<weights>[0-9a-f]{12})(?:\.(?P<inputs>[0-9a-f]{6}))?(?:/\w+)?", re.DOTALL)


@dataclass(frozen=True)
class StoredIdentity:
    """The identity that a collection itself states, for opening it without a model.

    Args:
        dimension: numbers in one vector.
        model_id: of the model whose vectors they are.
        metric: how they are compared.
        model_note: name and float format of that model, for people.
        sparse_model: the model of its sparse vectors; None where it has none.
    """

    dimension: int
    model_id: str
    metric: str = "IP"
    model_note: str = ""
    sparse_model: str | None = None


def same_model(stored: str, given: str) -> bool:
    """Return whether vectors of two models may be compared, by their identities.

    Identities of any other form are compared as they are. Collections of earlier versions say `name@weights/dtype`;
    the fingerprint of the weights is the same in both forms.
    """
    if stored == given:
        return True
    ours, theirs = _IDENTITY.fullmatch(stored), _IDENTITY.fullmatch(given)
    if ours is None or theirs is None or ours["weights"] != theirs["weights"]:
        return False
    return ours["inputs"] is None or theirs["inputs"] is None or ours["inputs"] == theirs["inputs"]
