"""Programs that measure; `results/` holds what they wrote."""
