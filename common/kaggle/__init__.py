"""The round trip with Kaggle: data in, submission out, score back; the kaggle program does the talking."""
