"""Finding images and their labels, decoding them, and keeping them in memory or streaming them."""
