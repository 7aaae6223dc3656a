"""The systems that the paper compares with: each a builder of a `MetaLearner`, but `meta_lstm`, which is a rule for `maml`."""
