"""Moondream's batch API: files of JSON lines that clients upload in parts and that run in the background."""
