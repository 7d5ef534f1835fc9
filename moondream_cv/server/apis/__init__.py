"""The HTTP APIs, one module or package per API."""
