"""The ensemble as NautilusTrader actors and a strategy, and the runners around them."""
