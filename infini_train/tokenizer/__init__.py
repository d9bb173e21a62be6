"""Tokenizers, as preparation, streaming and exports use them."""
