"""Digit Recognizer: 28x28 grey images of handwritten digits, ten classes, accuracy."""
