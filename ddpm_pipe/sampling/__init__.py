"""This package draws many images from a trained model."""
