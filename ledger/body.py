"""What every record body is made of."""

from __future__ import annotations

import msgspec

Knobs = dict[str, bool | int | float | str]


class Body(msgspec.Struct, frozen=True, kw_only=True):
    """Base of all bodies."""
