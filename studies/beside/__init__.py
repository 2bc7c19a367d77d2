"""What an identity LoRA does beside the likeness, on the toy model."""
