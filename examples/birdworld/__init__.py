"""A rendered world of birds with parts, captions and masks, and a tiny CLIP pre-trained on it."""
