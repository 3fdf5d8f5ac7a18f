"""Serving: the engine that batches requests and the gateway that speaks HTTP."""
