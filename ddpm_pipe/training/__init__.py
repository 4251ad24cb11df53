"""Training by Algorithm 1 of DDPM under Accelerate, with checkpoints, logs and validation."""
