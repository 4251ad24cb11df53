"""This package converts checkpoints of other projects to pipelines of ddpm_pipe."""
