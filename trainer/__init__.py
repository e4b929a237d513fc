"""Order, loading, models, objectives and the training loop."""
