"""LoRA files of whatever program: their names, reading, writing and merging."""
