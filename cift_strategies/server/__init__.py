"""The API and the page: a process of its own, fed by the node over a local socket (`python -m cift_strategies.server`)."""
