"""The playground: a page in the browser to try the model."""
