"""What image competitions share: files to samples, backbones and their weights, normalisation, flips."""
