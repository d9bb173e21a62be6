"""Measurements of a model that both training and evaluation use."""
