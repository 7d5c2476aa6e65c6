"""Understanding Clouds from Satellite Images: segmentation of four cloud patterns."""
