"""Model cards, the Hub, and checkpoints of other projects."""
