"""fal's API: synchronous calls, streams and the queue."""
