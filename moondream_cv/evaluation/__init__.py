"""How good a model is, against ground truth."""
