"""Networks on plain tensors: no files, no environments."""
