"""`make kernel`: train on Kaggle's own machines."""
