"""What an encoder is worth: frozen features, probes, baselines, channel ablation, and the report of it."""
