"""Between text and tokens: prompts, blanks, the checkpoint to load, the record of a denoising."""
