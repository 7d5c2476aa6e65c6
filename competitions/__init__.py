"""One folder per competition."""
