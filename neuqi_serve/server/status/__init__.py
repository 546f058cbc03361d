"""The status port: a small process that answers probes from the first second to the last."""
