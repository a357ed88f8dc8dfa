"""A folder of pictures to shards: few large files in place of many small ones, for network disks and object stores.

settings.py   what decides them
listing.py    which pictures there are, in which order
samples.py    one of them with what belongs to it, read and checked
tars.py       WebDataset
tables.py     Parquet
making.py     one shard
folder.py     all of them: what is there, what is left, and the index
"""

from data_tools.sharding.folder import Done, shard
from data_tools.sharding.settings import Settings, parse_size

__all__ = ["Done", "Settings", "parse_size", "shard"]
