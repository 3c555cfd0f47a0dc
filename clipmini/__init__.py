"""A CLIP-style image-text trainer: one config, the same run, on any cluster."""

__version__ = "0.1.0"
