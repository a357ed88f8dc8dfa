"""``python -m finetune``: the same as ``finetune``."""

from finetune.cli import main

main()
