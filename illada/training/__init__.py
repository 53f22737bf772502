"""Training: the corpus of the embedded model, corruption, windows and collation, and the recipe."""
