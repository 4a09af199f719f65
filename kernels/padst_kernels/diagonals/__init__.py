"""Products with single pseudo-diagonals, on CUDA cores: correct, and not claimed to be fast."""
