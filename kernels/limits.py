"""The largest shapes that the kernels for a GPU take: refused at their launch, and before, where a model is loaded."""

MAX_HIDDEN = 16384
"""Columns of a row of the residual stream: one program holds them all."""

MAX_HEADS_A_KEY = 16
"""Query heads of one key head: the least height of a tile of attention."""

MAX_VOCAB = 1 << 18
"""Tokens whose probabilities the sampler can add up exactly."""
