"""The playground: one page at `/`."""
