"""Dense models over timm and transformers, one module per kind; they know nothing of sparsity."""
