"""What a trained model is used for: features, attention."""
