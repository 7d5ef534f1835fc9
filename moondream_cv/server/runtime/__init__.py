"""Engines that run the requests of all clients: in a thread, in a process, or on another server."""
