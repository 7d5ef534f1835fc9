"""Adapters for labeling tools: one module per tool."""
