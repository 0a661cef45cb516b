"""One run: configuration, folder, checkpoints, seeds, progress, parallel work and its line in the ledger."""
