"""The folder of a run: what lies where, files written whole, checkpoints."""
