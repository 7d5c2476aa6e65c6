"""One optimizer step over a window of samples, exact whatever fits into the memory."""
