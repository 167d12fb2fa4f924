"""Whether vectors of two models may be compared, by the models' identities.

An identity has the form `family@weights.inputs`: fingerprints of the weights, and of what happens to inputs before they
reach the weights. Place, name and float format of the weights are no part of it: a copy in another folder, and bfloat16
beside float32, give vectors that may be compared.
"""

from __future__ import annotations

import re

_IDENTITY = re.compile(r".*@(?P<weights>[0-9a-f]{12})(?:\.(?P<inputs>[0-9a-f]{6}))?(?:/\w+)?", re.DOTALL)


def same_model(stored: str, given: str) -> bool:
    """Return whether vectors of two models may be compared.

    Identities of any other form are compared as they are. Collections of earlier versions have `name@weights/dtype`;
    the fingerprint of the weights is the same in both forms.
    """
    if stored == given:
        return True
    ours, theirs = _IDENTITY.fullmatch(stored), _IDENTITY.fullmatch(given)
    if ours is None or theirs is None or ours["weights"] != theirs["weights"]:
        return False
    return ours["inputs"] is None or theirs["inputs"] is None or ours["inputs"] == theirs["inputs"]
