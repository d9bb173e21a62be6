"""Callbacks that log, check and stop training. checkpoint.py has the one that saves it."""
