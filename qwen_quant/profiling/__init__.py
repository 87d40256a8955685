"""Speed and memory of a model, each figure from a process of its own: the parts of the `profile` stage."""
