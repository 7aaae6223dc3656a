"""The systems that the paper compares with; each builder returns a `MetaLearner`."""
