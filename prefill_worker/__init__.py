"""Chunked prefill of prompts, the first token, and the handoff of finished layers to a decode worker."""
