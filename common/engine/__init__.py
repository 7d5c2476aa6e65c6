"""One optimizer step over a batch of samples, exact whatever fits into the memory."""
