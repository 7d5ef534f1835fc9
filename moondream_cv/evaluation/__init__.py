"""Evaluation against ground truth: detection, pointing, counting, captions, calibration and tracking."""
