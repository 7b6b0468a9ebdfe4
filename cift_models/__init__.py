"""Features, models, training and inference: pure numerics, without NautilusTrader."""
