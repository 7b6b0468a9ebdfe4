"""Features, models, training and inference: pure numerics, without NautilusTrader."""

import catalog  # noqa: F401 - names the folder of compiled kernels before any is made
