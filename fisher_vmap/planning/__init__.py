"""What a run will take, counted on a model without weights."""
