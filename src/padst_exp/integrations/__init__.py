"""Our models in the programs that others evaluate and serve with; each needs an extra."""
