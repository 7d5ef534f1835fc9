"""Annotation of frames: boxes, labels, zones, line counts, and the panel."""
