"""Label images with a model: folders, lists, videos and datasets → `labels.jsonl` and datasets in common formats."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moondream_cv._lazy import lazy_names

if TYPE_CHECKING:
    from moondream_cv.labeling.run import LabelingProgress, LabelingResult, label, merge_review

__all__ = ["LabelingProgress", "LabelingResult", "label", "merge_review"]

__getattr__, __dir__ = lazy_names(__name__, dict.fromkeys(__all__, "run"))
