"""Turns long documents into token shards: `python -m data_prep --help`."""
