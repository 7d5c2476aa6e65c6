"""`make kernel` and `make notebook`: train and predict on Kaggle's own machines."""
