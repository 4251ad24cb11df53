"""The folder of a run: where its files lie, how they are written whole, and its checkpoints."""
