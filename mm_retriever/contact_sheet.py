"""The old place of what is in `mm_retriever.sheet`. ``mm_retriever.contact_sheet`` is the function, always.

Importing a submodule binds its name in the package, over a function of the same name. So what this module leaves in
`sys.modules` is the function, which also answers for the names that were imported from here.
"""

from __future__ import annotations

import sys
from typing import Any

from mm_retriever.sheet import before_after, contact_sheet, with_text

__all__ = ["before_after", "contact_sheet", "with_text"]

_function: Any = contact_sheet
for _name, _value in (("before_after", before_after), ("contact_sheet", contact_sheet), ("with_text", with_text)):
    setattr(_function, _name, _value)
sys.modules[__name__] = _function
