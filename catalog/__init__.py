"""How market data gets in, and where it lies. Knows nothing of models; imports Nautilus only where it writes catalogs."""
