"""One exact optimizer step over a batch of samples, however little of it fits into memory at once."""
