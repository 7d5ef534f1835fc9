"""Files of a labeled dataset that all exports share."""

from __future__ import annotations

LABELS = "labels.jsonl"
"""One line per input image, in input order: the source of truth."""

SETTINGS = "labeling.json"
"""Classes, prompts, model and options of the run. A folder with this file is a labeled dataset."""

REPORT = "report.html"
"""Report for people."""

FRAMES = "frames"
"""Folder of the frames that are extracted from videos."""

WORK = ".labeling"
"""Folder with the list of images, hashes, batches that wait, and the lock."""
