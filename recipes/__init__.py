"""One page per recipe, each to be read from top to bottom and copied."""
