"""Cuts while decoding, as every eviction method takes them: `method.decode`."""

from __future__ import annotations

from dataclasses import dataclass

from methods.core.typed import Count


@dataclass(frozen=True)
class Decode:
    """When slots go after the prompt.

    every: tokens between two cuts: K + every slots are cut down to K. None: as the method does by itself.
    """

    every: Count | None = None
