"""Engines of the server: they run requests on a model and report results to the event loop."""
