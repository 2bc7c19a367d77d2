"""LoRA files of FLUX.1, of whatever program: their names, reading, writing and merging."""
