"""Admission of landed KV, continuous batching, and token streaming to the routers."""
