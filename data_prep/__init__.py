"""From long documents to token shards: `python -m data_prep --help`."""
