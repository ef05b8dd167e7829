"""The model runtime: configuration, families, decoder, loader, tokenizer."""
