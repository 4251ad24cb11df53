"""Checkpoints of other projects, converted to pipelines of this package."""
