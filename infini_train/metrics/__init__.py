"""What is measured of a trained model, in training and in evaluation alike."""
