"""The round trip with Kaggle through the kaggle program: data in, submission out, score back."""
