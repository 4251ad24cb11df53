"""Images and their labels: found, decoded, kept in memory or streamed."""
