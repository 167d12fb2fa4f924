"""How hard tests try that throw random input at the code; `EFFORT=20 pytest -m hostile` tries twenty times as much."""

from __future__ import annotations

import os

EFFORT = max(1, int(os.environ.get("EFFORT", "1")))
