"""The operations of the engine, one a file: a torch reference beside each faster version."""
