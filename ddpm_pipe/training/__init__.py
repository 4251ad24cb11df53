"""Algorithm 1 under Accelerate, and all that keeps a run alive and shows how it is."""
