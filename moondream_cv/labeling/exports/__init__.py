"""Export `labels.jsonl` as a dataset in a format that training and labeling tools read."""

from moondream_cv.labeling.exports.export import FORMATS, ExportSummary, check_format, export_dataset
from moondream_cv.labeling.exports.files import Manifest, ManifestEntry, check_unchanged, read_manifest

__all__ = [
    "FORMATS",
    "ExportSummary",
    "Manifest",
    "ManifestEntry",
    "check_format",
    "check_unchanged",
    "export_dataset",
    "read_manifest",
]
