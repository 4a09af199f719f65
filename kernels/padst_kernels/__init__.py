"""Sparse matrix products, one folder for each structure; nothing here knows of the framework."""
