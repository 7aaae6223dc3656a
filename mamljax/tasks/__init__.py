"""Task distributions: `sample(key) -> Task`, one task at a time, to be mapped over a meta-batch."""
