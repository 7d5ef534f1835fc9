"""Keyframe detection, tracking, interpolation between keyframes, and boxes for redaction."""
