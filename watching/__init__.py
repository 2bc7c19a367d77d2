"""A person while they are learned: what pictures, scores and LoRA files of the states on the way."""
