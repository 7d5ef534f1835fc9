"""Fine-tuning on your own machine with the calls of the hosted tuning API: `ft(name="parts", rank=8)`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moondream_cv._lazy import lazy_names

if TYPE_CHECKING:
    from moondream_cv.finetune.finetune import Finetune, ft

__all__ = ["Finetune", "ft"]

__getattr__, __dir__ = lazy_names(__name__, {"Finetune": "finetune", "ft": "finetune"})
