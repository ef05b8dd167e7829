"""STARS engine: alignment at decoding time, one language model and one reward model in one engine."""
