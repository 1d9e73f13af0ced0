"""The KV handoff: finished layers leave a prefill worker encoded and land, verified, in a decode worker's own pages.

Knows no model and no scheduler: it moves blocks of ``[tokens, kv_heads, head_dim]`` keys and values between two
callbacks, ``gather`` on the sending side and ``write`` on the receiving one.
"""
