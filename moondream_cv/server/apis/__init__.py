"""HTTP routes, one module or package per API."""
