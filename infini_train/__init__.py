"""Pretraining of long-context language models with Infini-attention (arXiv 2404.07143)."""
