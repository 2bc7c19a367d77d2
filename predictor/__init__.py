"""Beyond the paper: a person's mid and up predicted from an embedding of the face, without training."""
