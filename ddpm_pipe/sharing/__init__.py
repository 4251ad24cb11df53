"""This package writes model cards and pushes runs to the Hub."""
