"""The model over HTTP, in the dialects of the clients that exist for it; `moondream_cv.server.app` puts it together."""
