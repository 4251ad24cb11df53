"""How good a model is, with the protocol of each number."""
