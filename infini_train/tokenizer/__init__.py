"""Tokenizer files: what `data_prep`, streaming and exports share."""
