"""Models out: as open_clip, transformers and onnxruntime load them, each checked by loading it."""
