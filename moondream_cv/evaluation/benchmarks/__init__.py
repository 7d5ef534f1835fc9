"""Published benchmarks on disk: layouts, prompts, predictions and metrics of `moondream-cv evaluate`."""
