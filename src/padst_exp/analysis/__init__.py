"""What a model costs: FLOPs and bytes of a pass, counted on shapes alone."""
