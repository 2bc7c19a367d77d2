"""A person's mid and up predicted from an embedding of the face, without training. This is beyond the paper."""
