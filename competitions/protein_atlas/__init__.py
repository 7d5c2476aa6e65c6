"""Human Protein Atlas: where in the cell a protein is, 28 labels, four-channel microscopy, macro F1."""
