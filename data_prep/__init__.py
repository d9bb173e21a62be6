"""Turns long documents into token shards: `infini-train prep --help`."""
