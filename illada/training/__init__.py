"""Training: data, noise, segments, the Trainer and its recipes."""
