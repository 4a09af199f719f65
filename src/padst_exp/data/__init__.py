"""Data sets with their losses, metrics and loaders; knows nothing of sparsity."""
