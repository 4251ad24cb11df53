"""This package measures how good a model is, and records how each number was measured."""
